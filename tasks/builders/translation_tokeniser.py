"""Train `translate.model`: one vocabulary for all languages of translation, with a tag for each, such as <2de>.

    cd tasks/data
    python -m moe_jax.tasks.builders.translation_tokeniser translate.train.jsonl.gz translate.model

Give it the train split alone. Languages have shares by the square root of their text (`text.tokeniser.fair_sample`),
those of `translation.NEW` too: a vocabulary cannot grow later.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_jax.tasks.translation import LANGUAGES, read
from moe_jax.text.tokeniser import Unigram, fair_sample, train

CHARACTERS = 3_000_000


def tokeniser(path: Path, size: int) -> Unigram:
    """Raises ValueError, in one line, for a file that cannot be read or has too little text."""
    rows = [row for _, row in read(path)]
    texts = {language: [row[language] for row in rows if language in row] for language in LANGUAGES}
    return train(fair_sample(texts, CHARACTERS, seed=0), size, symbols=[f"<2{language}>" for language in LANGUAGES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="translate.train.jsonl.gz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=8000, help="pieces in all (default: %(default)s)")
    args = parser.parse_args()
    try:
        tokeniser(args.text, args.size).save(args.out)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

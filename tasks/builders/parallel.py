"""Make `translate.{train,valid,test}.jsonl.gz`: sentences in up to nine languages, one object a line.

    python -m moe_jax.tasks.builders.parallel FILES... --output tasks/data \\
        --others tasks/data/{asr,ocr,mt,gec}.*.jsonl.gz

FILES hold an object a line, language -> sentence, and "set": gnome-help, asterisk or bible, others are left out; their
names tell the split, which stays. A line is kept as it is, for all directions: half of what they would take apart.

Languages (`translation.LANGUAGES`): of those that are translated into most, so that every direction has what to learn
from, three families with relatives in each: German and Swedish; Spanish, Catalan, French and Italian; Russian and
Czech. Spanish is the rich one (the Bible besides GNOME Help), Italian the poor one (a fifth of GNOME Help), and Russian
is written in other letters. Spanish prompts of telephones lack accents and are left out. Of the verses some are drawn,
so that the files stay small and the Bible does not outweigh the rest of a test set.

A sentence of a test row, in any language, is in no valid or train row; in train none contains or is contained in a
held-out one either (`splits.HeldOut`). The same holds for the references of OTHERS, files of other tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moe_jax.tasks.builders.clean_text import held_out_sentences, write_gz
from moe_jax.tasks.builders.collect import SPLITS, split_of
from moe_jax.tasks.builders.splits import HeldOut, letters
from moe_jax.tasks.translation import LANGUAGES

SETS = ("gnome-help", "asterisk", "bible")
VERSES = {"train": 12_000, "valid": 300, "test": 300}

Row = Mapping[str, str]


def rows(path: Path) -> Iterator[Row]:
    """Rows of `SETS` in two of our languages or more. Raises ValueError, in one line, for what cannot be read."""
    number = 0
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (for the message)
                row = json.loads(line)
                without = ("es",) if row["set"] == "asterisk" else ()
                texts = {name: row[name] for name in LANGUAGES if name in row and name not in without}
                if row["set"] in SETS and len(texts) > 1:
                    yield texts | {"set": row["set"]}
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}:{number}: not an object of texts by language with "set"') from None


def sentences(row: Row) -> list[str]:
    return [text for key, text in row.items() if key != "set"]


def drawn(candidates: Sequence[Row], verses: int) -> list[Row]:
    """All rows but verses, and so many of these: in the order of a hash."""
    others = [row for row in candidates if row["set"] != "bible"]
    bible = [row for row in candidates if row["set"] == "bible"]
    return others + sorted(bible, key=_drawn)[:verses]


def _drawn(row: Row) -> bytes:
    return hashlib.sha1(b"verse:" + (row.get("en") or sentences(row)[0]).encode()).digest()


def select(candidates: Mapping[str, Sequence[Row]], others: Mapping[str, Sequence[str]]) -> dict[str, list[Row]]:
    """Rows by split whose sentences are in no other split: see above. `others` are sentences of other tasks."""
    known = {split: set(map(letters, texts)) for split, texts in others.items()}
    found: dict[str, list[Row]] = {}
    held: list[str] = []
    for split in SPLITS:
        elsewhere = set().union(*(texts for other, texts in known.items() if other != split))
        held_out = HeldOut(held)
        found[split] = [
            row
            for row in drawn(candidates[split], VERSES[split])
            if not any(letters(text) in elsewhere or text in held_out for text in sentences(row))
        ]
        held += [text for row in found[split] for text in sentences(row)] + list(others[split])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the three files")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="files of other tasks, with their splits")
    args = parser.parse_args()
    try:
        candidates = {split: [r for p in args.files if split_of(p) == split for r in rows(p)] for split in SPLITS}
        others = {
            split: [s for p in args.others if split_of(p) == split for s in held_out_sentences(p)] for split in SPLITS
        }
        found = select(candidates, others)
    except ValueError as error:
        sys.exit(str(error))
    for split in SPLITS:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found[split])
        write_gz(args.output / f"translate.{split}.jsonl.gz", lines)
        counts = Counter((row["set"], name) for row in found[split] for name in row if name != "set")
        for name in SETS:
            total = sum(row["set"] == name for row in found[split])
            print(split, name, total, *(f"{language}={counts[name, language]}" for language in LANGUAGES))


if __name__ == "__main__":
    main()

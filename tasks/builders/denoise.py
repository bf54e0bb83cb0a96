"""Make `denoise.train.jsonl.gz` to pretrain a base model: clean text with noise learned from real errors.

    python -m moe_jax.tasks.builders.denoise OUT_DIR --passes 3

Each pass goes once over the clean English sentences (`clean.en.txt.gz`), each with the noise of a family
drawn for it, and once over the references of the asr, ocr and gec train files, with the noise of their family
and language. Rows are records like those of the corpus, with `task` "denoise" and the family under `noise`.
Half of the lists are of a better recogniser than the real ones, from as good to faultless: whoever learns from
errors alone mends what is right.
Printed at the end: error rates of the real train lists beside those of the noise put on the same references.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from moe_jax.tasks.builders.noise import NoiseModel

DATA = Path(__file__).parents[1] / "data"
SHARES = {"gec": 0.35, "ocr": 0.35, "asr": 0.3}  # of the clean sentences
FEWEST_LISTS = 40  # of a language, to learn its noise from

Row = dict[str, Any]
Models = Mapping[tuple[str, str], NoiseModel]  # (family, language) -> noise


def read_lines(path: Path) -> list[str]:
    try:
        return gzip.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        sys.exit(f"{path}: cannot be read as gzipped text ({error}); --data names the folder of the corpus")


def read_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            texts = [*row["hypotheses"], *(row[key] for key in ("reference", "task", "lang", "source_set"))]
            if not row["hypotheses"] or not all(isinstance(text, str) for text in texts):
                raise ValueError("an empty n-best list, or a value that is no text")
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"{path}:{number}: not a record of the corpus ({error!r}); see tasks/data/README.md")
        rows.append(row)
    return rows


def fit_models(rows: Sequence[Row]) -> dict[tuple[str, str], NoiseModel]:
    """A noise model for each family and language with at least `FEWEST_LISTS` lists."""
    counts = Counter((row["task"], row["lang"]) for row in rows)
    return {
        (family, lang): NoiseModel.fit([r for r in rows if (r["task"], r["lang"]) == (family, lang)])
        for (family, lang), count in sorted(counts.items())
        if count >= FEWEST_LISTS
    }


def noisy_rows(clean: Sequence[str], rows: Sequence[Row], models: Models, rng: np.random.Generator) -> Iterator[Row]:
    """One pass, in random order."""
    families, shares = zip(*SHARES.items(), strict=True)
    drawn = rng.choice(families, size=len(clean), p=shares)
    jobs = [(str(family), "en", "clean", sentence) for family, sentence in zip(drawn, clean, strict=True)]
    jobs += [(r["task"], r["lang"], r["source_set"], r["reference"]) for r in rows if (r["task"], r["lang"]) in models]
    for i in rng.permutation(len(jobs)):
        family, lang, source_set, sentence = jobs[i]
        model = models[family, lang]
        yield {
            "task": "denoise",
            "source_set": source_set,
            "hypotheses": model.nbest(sentence, rng, strength=max(0.0, 2 * rng.random() - 1)),
            "reference": model.style(sentence),
            "lang": lang,
            "noise": family,
        }


def rates(references: Iterable[str], lists: Iterable[Sequence[str]]) -> dict[str, float]:
    """Corpus-level error rates (1 is as many errors as words) of n-best lists."""
    sums: Counter[str] = Counter()
    for reference, hypotheses in zip(references, lists, strict=True):
        words = reference.split()
        errors = [Levenshtein.distance(words, h.split()) for h in hypotheses]
        sums["lists"] += 1
        sums["words"] += len(words)
        sums["chars"] += len(reference)
        sums["first"] += errors[0]
        sums["best"] += min(errors)
        sums["first_chars"] += Levenshtein.distance(reference, hypotheses[0])
        sums["untouched"] += hypotheses[0] == reference
        sums["hypotheses"] += len(hypotheses)
    return {
        "WER": sums["first"] / sums["words"],
        "oracle WER": sums["best"] / sums["words"],
        "CER": sums["first_chars"] / sums["chars"],
        "untouched": sums["untouched"] / sums["lists"],
        "n-best": sums["hypotheses"] / sums["lists"],
    }


def compare(rows: Sequence[Row], models: Models, rng: np.random.Generator) -> str:
    """A table: real lists, and noise on their references, for each family and language."""
    lines = []
    for (family, lang), model in models.items():
        mine = [r for r in rows if (r["task"], r["lang"]) == (family, lang)]
        references = [r["reference"] for r in mine]
        real = rates(references, [r["hypotheses"] for r in mine])
        noise = rates(references, [model.nbest(r, rng) for r in references])
        cells = [f"{name} {real[name]:.3f} / {noise[name]:.3f}" for name in real]
        lines.append(f"{family} {lang} ({len(mine)} lists), real / noise: " + "   ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to; made if there is none")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the corpus (default: the embedded one)")
    args = parser.parse_args()
    if args.passes < 1:
        parser.error(f"--passes must be at least 1, got {args.passes}")
    rows = [row for family in SHARES for row in read_rows(args.data / f"{family}.train.jsonl.gz")]
    models = fit_models(rows)
    if missing := [family for family in SHARES if (family, "en") not in models]:
        sys.exit(f"{args.data}: fewer than {FEWEST_LISTS} English train lists of {', '.join(missing)}")
    clean = read_lines(args.data / "clean.en.txt.gz")

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{args.out}: no folder can be made there ({error})")
    path = args.out / "denoise.train.jsonl.gz"
    aside = path.with_name(path.name + ".part")
    written = 0
    with open(aside, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as f:
        for number in range(args.passes):
            for row in noisy_rows(clean, rows, models, np.random.default_rng([args.seed, number])):
                f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                written += 1
    os.replace(aside, path)
    print(f"{path}: {written} rows, {args.passes} passes")
    print(compare(rows, models, np.random.default_rng(args.seed)))


if __name__ == "__main__":
    main()

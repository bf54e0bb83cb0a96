"""How many tokens of the embedded corpus: bytes, and SentencePiece models of several sizes.

    python benchmarks/tokeniser.py            # about 1 minute on one core; prints a markdown table

Models are trained on references and hypotheses of the train split (languages by the square root of their
size) and measured on the valid split, whose sentences they have not seen. The shipped one saw clean text too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from moe_jax.text.prompt import LAYOUTS, encode_example
from moe_jax.text.tokeniser import FIRST_BYTE, Tokeniser, Unigram, fair_sample, train

DATA = Path(__file__).parents[1] / "tasks" / "data"
FAMILIES = ("asr", "ocr", "mt", "gec")
SAMPLE = 4_000_000  # characters


class Bytes(Unigram):
    """The same ids without any pieces: every byte is a token."""

    def encode_words(self, words) -> list[int]:
        return [FIRST_BYTE + byte for byte in "".join(" " + word for word in words).encode()]

    @property
    def vocab_size(self) -> int:
        return FIRST_BYTE + 256


def read(split: str) -> list[dict[str, Any]]:
    rows = []
    for family in FAMILIES:
        with gzip.open(DATA / f"{family}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    return rows


def measure(tokeniser: Tokeniser, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Characters a token of references (all, and Ukrainian), and tokens of prompt and target, means."""

    def characters_a_token(texts: list[str]) -> float:
        return sum(map(len, texts)) / sum(len(tokeniser.encode(text)) for text in texts)

    found = {
        "chars/token": characters_a_token([row["reference"] for row in rows]),
        "uk": characters_a_token([row["reference"] for row in rows if row["lang"] == "uk"]),
        "target": mean(len(tokeniser.encode(row["reference"])) + 1 for row in rows),
    }
    for layout in LAYOUTS:
        prompts = defaultdict(list)
        for row in rows:
            example = encode_example(tokeniser, row["hypotheses"], max_length=1 << 20, layout=layout)
            assert example is not None
            prompts[row["task"]].append(len(example.tokens))
        found |= {f"{layout} {family}": mean(prompts[family]) for family in FAMILIES}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    sizes = parser.parse_args().sizes
    texts = defaultdict(list)
    for row in read("train"):
        texts[row["lang"]] += [row["reference"], *row["hypotheses"]]
    sample = list(fair_sample(texts, SAMPLE, seed=0))
    rows = read("valid")
    shipped = Tokeniser.load(DATA / "tokeniser.model")
    tables = {"bytes": measure(Bytes(shipped.model), rows)}
    for size in sizes:
        start = time.perf_counter()
        tokeniser = train(sample, size)
        seconds = time.perf_counter() - start
        tables[f"{size:,}"] = measure(tokeniser, rows) | {"seconds": seconds}
    tables["shipped"] = measure(shipped, rows)
    columns = list(tables["bytes"])
    print("| vocabulary | " + " | ".join(columns) + " | training |")
    print("| --- |" + " --: |" * (len(columns) + 1))
    for name, table in tables.items():
        seconds = f"{table['seconds']:.0f} s" if "seconds" in table else ""
        print(f"| {name} | " + " | ".join(f"{table[column]:.2f}" for column in columns) + f" | {seconds} |")


if __name__ == "__main__":
    main()

"""Make `clean.en.txt.gz`: clean English sentences, one a line, that noise is put on to pretrain a denoiser.

Six novels by Jane Austen and the World English Bible, both in the public domain. Needs the Debian packages
`r-cran-janeaustenr` (it brings `Rscript`), `sword-text-web` and `libsword-utils` (`mod2imp`). Run:

    python -m moe_jax.tasks.builders.clean_text clean.en.txt.gz \\
        --held-out tasks/data/*.valid.jsonl.gz tasks/data/*.test.jsonl.gz

No line repeats, contains or is contained in a sentence of the held-out files (`splits.HeldOut`): give every
file that something is ever measured on. Besides, only sentences that `splits.split_of` calls "train" are
kept, so that test sentences that are not at hand are left out as well.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.tasks.builders.splits import HeldOut, letters, split_of

AUSTEN = ["Rscript", "-e", r"cat(as.character(janeaustenr::austen_books()$text), sep='\n')"]
BIBLE = ["mod2imp", "engWEB2015eb"]
MIN_WORDS, MAX_WORDS = 4, 40
SENTENCE_KEYS = ("reference", "reference_written", "output", "en")  # ours; HyPoradise's; parallel text's

HEADING = re.compile(r"(?i:chapter|volume) [0-9IVXL]+\.?|[^a-z]*")
NO_SENTENCE_END = re.compile(r"\b(Mr|Mrs|Dr|St|Messrs|Capt|Col|Hon|Rev|[A-Z])\.$")
SENTENCE_END = re.compile(r"""([.!?]["”’')]*)(?:\s+|—)(?=["“‘'(]*[A-Z])""")
WHOLE_SENTENCE = re.compile(r"""["“‘'(]*[A-Z].*[.!?]["”’')]*""")
NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
MARKUP = re.compile(r"<title\b.*?</title>|<[^>]*>", re.DOTALL)


def austen_passages(text: str) -> Iterator[str]:
    """Paragraphs of the novels: wrapped lines joined, headings and editors' notes left out."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        paragraph = " ".join(x for x in lines if not HEADING.fullmatch(x))
        if not paragraph.startswith("["):
            yield paragraph.replace("_", "").replace("--", "—")


def bible_passages(imp: str) -> Iterator[str]:
    """Chapters of a SWORD Bible as `mod2imp` writes it ("$$$Genesis 1:1", then the verse as OSIS)."""
    chapter, verses = "", []
    for entry in imp.split("$$$")[1:]:
        name, _, osis = entry.partition("\n")
        if not (at := re.fullmatch(r"(.+ \d+):([1-9]\d*)", name.strip())):
            continue  # book and chapter headings
        if at[1] != chapter:
            yield " ".join(verses)
            chapter, verses = at[1], []
        text = MARKUP.sub("", NOTE.sub(" ", osis))  # a note stands where a space would be
        verses.append(re.sub(r"\s+([.,;:!?”’])", r"\1", text).strip())
    yield " ".join(verses)


def sentences(passage: str) -> Iterator[str]:
    """The sentences of a passage. Quotation marks that open in one and close in another are dropped."""
    start, passage = 0, " ".join(passage.split())
    for end in SENTENCE_END.finditer(passage):
        if not NO_SENTENCE_END.search(passage[start : end.start() + 1]):
            yield _balanced(passage[start : end.end(1)])
            start = end.end()
    yield _balanced(passage[start:])


def _balanced(sentence: str) -> str:
    if sentence.count('"') % 2 or sentence.count("“") != sentence.count("”"):
        sentence = re.sub('["“”]', "", sentence)
    if sentence.count("(") != sentence.count(")"):
        sentence = re.sub("[()]", "", sentence)
    if sentence.startswith("‘") and "’" not in sentence[-2:]:
        sentence = sentence[1:]
    if "‘" not in sentence:  # elsewhere ’ is an apostrophe
        sentence = re.sub(r"(?<=[.!?])’$", "", sentence)
    return sentence.strip(" —")


def keep(candidates: Iterable[str], held_out: HeldOut) -> list[str]:
    """Train sentences of `MIN_WORDS` to `MAX_WORDS` words, no two of the same letters, in a hash's order."""
    kept: dict[str, str] = {}
    for sentence in candidates:
        fits = MIN_WORDS <= len(sentence.split()) <= MAX_WORDS and WHOLE_SENTENCE.fullmatch(sentence)
        if fits and split_of(sentence) == "train" and sentence not in held_out:
            kept.setdefault(letters(sentence), sentence)
    # The salt makes the order independent of `split_of`.
    return [kept[x] for x in sorted(kept, key=lambda x: hashlib.sha1(b"order:" + x.encode()).digest())]


def held_out_sentences(path: Path) -> list[str]:
    """Every sentence of a file of records: a JSON list or JSON lines, plain, .gz or .xz."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as f:
            text = f.read()
        rows: list[dict[str, Any]] = (
            json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        )
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        sys.exit(f"{path}: cannot be read as JSON lines or a JSON list ({error}); give files of records")
    found = [
        row[key] for row in rows for key in SENTENCE_KEYS if isinstance(row, dict) and isinstance(row.get(key), str)
    ]
    if not found:
        sys.exit(f"{path}: no sentence under {', '.join(SENTENCE_KEYS)}; give files of records")
    return found


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed: see the Debian packages named in {Path(__file__).name}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(command)} failed: {error.stderr.strip()}")


def write_gz(path: Path, text: str) -> None:
    """Reproducible bytes (no time, no name), written aside and then renamed."""
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    held_out = HeldOut(s for path in args.held_out for s in held_out_sentences(path))
    passages = [*austen_passages(output_of(AUSTEN)), *bible_passages(output_of(BIBLE))]
    kept = keep((s for p in passages for s in sentences(p)), held_out)
    write_gz(args.out, "".join(s + "\n" for s in kept))
    words = sum(len(s.split()) for s in kept)
    print(f"{args.out}: {len(kept)} sentences, {words} words; {len(held_out)} sentences held out")


if __name__ == "__main__":
    main()

"""Readers and writers of users' files.

A reader turns a file into its parts, in order: records, bad records, and the text between them. A writer
gives a record back with its correction added; joined with the text between, that is the same file with no
other change. So order, unknown fields, the digits of numbers, line endings and a byte-order mark stay, and
files of any size stream.

| name  | extensions             | shape                                                                |
|-------|------------------------|----------------------------------------------------------------------|
| json  | .json                  | a list of objects: HyPoradise `{"input": [...], "output": ...}`, ... |
| jsonl | .jsonl .ndjson (.json) | an object a line: `{"hypotheses": [...]}`; NeMo manifests            |
| text  | .txt .text             | a first-pass line a line                                             |
| tsv   | .tsv                   | columns of hypotheses, the best first, with or without a header      |

Keys are listed in `objects.py`, columns in `lines.py`.

Each may be compressed: `.gz`, `.xz`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TextIO

from moe_jax.formats import json_list, lines, objects
from moe_jax.formats.record import Bad, FormatError, Part, Record, sample

__all__ = [
    "FORMATS",
    "Bad",
    "FormatError",
    "Part",
    "Record",
    "by_extension",
    "detect",
    "parts",
    "read",
    "sample",
    "split_file",
]

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Format:
    """How to read a file and how to give its records back.

    Attributes:
      extensions: lower case, with the dot.
      read: (stream, its name for messages, the key or column to add, or None) -> parts.
      corrected: (record, correction, key or column) -> the text to write for it.
      failed: a bad record -> the text to write for it.
    """

    extensions: tuple[str, ...]
    read: Callable[[TextIO, object, str | None], Iterator[Part]]
    corrected: Callable[[Record, str, str], str]
    failed: Callable[[Bad], str]


FORMATS = {
    "json": Format((".json",), json_list.read, objects.corrected, objects.failed),
    "jsonl": Format((".jsonl", ".ndjson"), lines.read_jsonl, objects.corrected, objects.failed),
    "text": Format((".txt", ".text"), lines.read_text, lines.corrected_text, lines.failed),
    "tsv": Format((".tsv",), lines.read_tsv, lines.corrected_tsv, lines.failed),
}

OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def by_extension(path: PathLike) -> str | None:
    """The name of the format that the file's name tells, or None."""
    name = Path(path)
    suffix = (name.with_suffix("") if name.suffix.lower() in OPENERS else name).suffix.lower()
    return next((f for f, format in FORMATS.items() if suffix in format.extensions), None)


def detect(path: PathLike, fmt: str | None = None) -> str:
    """The format of a file: `fmt` if given, else by extension; a `.json` file that starts with `{` is JSONL.

    Raises FormatError if there is no such format or file, or if the file is empty or cannot be read.
    """
    known = " ".join(FORMATS)
    if fmt is not None and fmt not in FORMATS:
        raise FormatError(path, None, f"unknown format {fmt!r}", f"choose one of: {known}")
    name = fmt or by_extension(path)
    if name is None:
        raise FormatError(path, None, "cannot tell its format from its name", f"pass --format, one of: {known}")
    if Path(path).exists() and not Path(path).is_file():
        raise FormatError(path, None, "not a regular file", "save what it holds to one first")
    with _opened(path) as stream:
        first = stream.read(4096)
    if not first:
        raise FormatError(path, None, "the file is empty", "check what wrote it")
    if fmt is None and name == "json" and first.lstrip("\ufeff" + objects.SPACE).startswith("{"):
        return "jsonl"
    return name


def split_file(folder: PathLike, split: str, stem: str = "") -> Path:
    """The file of a split in a corpus folder, `stem` + split + `.jsonl.gz`, `.jsonl` or `.json` (a list, as HyPoradise
    has it); of several, the first.

    Raises ValueError, in one line, where there is none.
    """
    paths = [Path(folder) / f"{stem}{split}{suffix}" for suffix in (".jsonl.gz", ".jsonl", ".json")]
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"{paths[0]}: no such file, nor one that ends in .jsonl or .json")


def parts(path: PathLike, fmt: str | None = None, field: str | None = None) -> Iterator[Part]:
    """The parts of a file, in order, `field` being the key or column that a correction will be added under.

    Raises FormatError where the rest of the file cannot be told apart into records, or if `field` is taken.
    """
    format = FORMATS[detect(path, fmt)]
    with _opened(path) as stream:
        yield from format.read(stream, path, field)


def read(path: PathLike, fmt: str | None = None) -> Iterator[Record]:
    """The records of a file. Raises FormatError at the first bad one."""
    for part in parts(path, fmt):
        if isinstance(part, Bad):
            raise part.error
        if isinstance(part, Record):
            yield part


@contextlib.contextmanager
def _opened(path: PathLike) -> Generator[TextIO]:
    """The file as text whose lines end at "\\n" alone and whose bytes all come back on writing."""
    opener = OPENERS.get(Path(path).suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as e:
        raise FormatError(path, None, f"torn or not compressed: {e}", "compress it again, or mend its name") from None
    except OSError as e:
        raise FormatError(path, None, f"cannot be read: {e.strerror}", "check the path and its permissions") from None

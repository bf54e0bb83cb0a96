"""Formats of one record a line: plain text, tab-separated columns, JSONL.

A line ends at "\\n" alone; a "\\r" before it belongs to the ending. Endings, a byte-order mark and blank
lines are kept where they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TextIO

from moe_jax.formats import objects
from moe_jax.formats.record import Bad, FormatError, Part, Place, Record, check_utf8

HYPOTHESIS = re.compile(r"(hyp|hypothesis)[ _-]?\d*", re.IGNORECASE)
SOURCE = re.compile(r"source([ _-]?\w+)?", re.IGNORECASE)
FLAT = str.maketrans({"\n": " ", "\r": " ", "\t": " "})


def read_text(stream: TextIO, path: object, field: str | None) -> Iterator[Part]:
    """One first-pass hypothesis a line; a line of spaces is a blank line."""

    def parse(body: str, place: Place) -> Part:
        if body.isspace():
            return body
        return _checked(Record(place.line, (body,), (), None, None, body, place.line), place)

    return _read(stream, path, parse, "")


def read_jsonl(stream: TextIO, path: object, field: str | None) -> Iterator[Part]:
    """One JSON object a line."""

    def parse(body: str, place: Place) -> Part:
        try:
            value = objects.DECODER.decode(body)
        except RecursionError:
            return Bad(place.error("JSON nested too deeply", "remove the record"), body)
        except json.JSONDecodeError as e:
            fix = "write one JSON object a line, or pass --format=json if the file is one list"
            return Bad(place.error(f"not JSON: {e.msg} at character {e.pos + 1}", fix), body)
        return objects.parse(value, body, place, field)

    return _read(stream, path, parse, objects.SPACE)


def read_tsv(stream: TextIO, path: object, field: str | None) -> Iterator[Part]:
    """Columns of hypotheses, the best first.

    If the first line names a column `hyp`, `hyp1`, `hypothesis`, `hypothesis_2`, ..., it is a header: only
    columns so named are hypotheses; `task`, `reference` and `source...` are read too, and others are kept.
    There is no quoting: a tab always separates. Short rows are padded to the first row's width, so that the
    new column lines up.
    """
    names: list[str] = []

    def parse(body: str, place: Place) -> Part:
        cells = body.split("\t")
        if names:
            return _row(body, names, place)
        if not any(HYPOTHESIS.fullmatch(cell.strip()) for cell in cells):
            names.extend(["hyp"] * len(cells))
            return _row(body, names, place)
        if field in cells:
            fix = "choose another with --field"
            raise place.error(f"the column {objects.quoted(field)} is there already", fix)
        names.extend(cell.strip().lower() for cell in cells)
        return body if field is None else f"{body}\t{field}"

    return _read(stream, path, parse, "")


def corrected_text(record: Record, text: str, field: str) -> str:
    """The corrected line, in the place of the line; a correction never breaks the line that it mends."""
    return text.translate(FLAT)


def corrected_tsv(record: Record, text: str, field: str) -> str:
    """The row with the correction as a new last column."""
    return f"{record.raw}\t{text.translate(FLAT)}"


def failed(bad: Bad) -> str:
    return bad.raw


def _read(stream: TextIO, path: object, parse: Callable[[str, Place], Part], strip: str) -> Iterator[Part]:
    """`parse` of every line that is not empty; its ending, and `strip` at both ends, stay outside."""
    for number, line in enumerate(stream, 1):
        mark = "\ufeff" if number == 1 and line.startswith("\ufeff") else ""
        body = line.removeprefix(mark).removesuffix("\n").removesuffix("\r").strip(strip)
        if not body:
            yield line
            continue
        start = line.index(body, len(mark))
        yield line[:start]
        yield parse(body, Place(path, number))
        yield line[start + len(body) :]


def _checked(record: Record, place: Place) -> Record | Bad:
    try:
        check_utf8(record.raw, place)
    except FormatError as error:
        return Bad(error, record.raw)
    return record


def _row(body: str, names: list[str], place: Place) -> Record | Bad:
    cells = body.split("\t")
    if len(cells) > len(names):
        what = f"{len(cells)} columns where the first row has {len(names)}"
        return Bad(place.error(what, "give every row as many columns as the first"), body)
    columns = list(zip(names, cells, strict=False))
    hypotheses = [cell for name, cell in columns if HYPOTHESIS.fullmatch(name)]
    if not hypotheses:
        what = "no hypotheses: the row ends before their column"
        return Bad(place.error(what, "add one or remove the row"), body)
    while len(hypotheses) > 1 and not hypotheses[-1]:  # a list shorter than the others ends in empty cells
        hypotheses.pop()
    sources = tuple(cell for name, cell in columns if SOURCE.fullmatch(name))
    rest = dict(columns)
    task, reference = rest.get("task") or None, rest.get("reference") or None
    raw = body + "\t" * (len(names) - len(cells))
    return _checked(Record(place.line, tuple(hypotheses), sources, task, reference, raw, place.line), place)

"""One JSON list of objects, read through a sliding window so that a large file never sits in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

from moe_jax.formats import objects
from moe_jax.formats.record import FormatError, Part, Place

CHUNK = 1 << 16  # characters
SLACK = 16  # a literal, number or escape that the window cuts fails within this many characters of its end
BLANK = re.compile(rf"[{objects.SPACE}]*")
TORN = "write the file again, or close the list after the last whole record"


class _Window:
    """The characters of `stream` from `pos` on, as far as they have been read."""

    def __init__(self, stream: TextIO, path: object) -> None:
        self.stream, self.path = stream, path
        self.text, self.pos, self.line = "", 0, 1

    def more(self) -> bool:
        """Reads on and drops what was taken; False at the end.

        Doubling what is held keeps the repeated scans of a long record linear.
        """
        chunk = self.stream.read(max(CHUNK, len(self.text) - self.pos))
        if chunk:
            self.text, self.pos = self.text[self.pos :] + chunk, 0
        return bool(chunk)

    def take(self, end: int) -> str:
        piece = self.text[self.pos : end]
        self.pos, self.line = end, self.line + piece.count("\n")
        return piece

    def peek(self) -> str:
        """The next character, or "" at the end."""
        return self.text[self.pos : self.pos + 1] if self.pos < len(self.text) or self.more() else ""

    def char(self) -> str:
        return self.take(self.pos + 1)

    def blank(self) -> str:
        while True:
            match = BLANK.match(self.text, self.pos)
            end = match.end() if match else self.pos
            if end < len(self.text) or not self.more():
                return self.take(end)

    def value(self, place: Place) -> tuple[object, str]:
        """The next JSON value and its characters. Raises FormatError if it is not JSON or the file ends."""
        while True:
            try:
                value, end = objects.DECODER.raw_decode(self.text, self.pos)
            except json.JSONDecodeError as e:
                open_string = e.msg.startswith("Unterminated string")
                if (open_string or e.pos > len(self.text) - SLACK) and self.more():
                    continue
                if open_string or not self.text[e.pos :].strip():
                    raise place.error("the file ends inside this record", TORN) from None
                line = self.line + self.text.count("\n", self.pos, e.pos)
                raise place.error(f"not JSON: {e.msg} (line {line})", "mend the record") from None
            except RecursionError:
                raise place.error("JSON nested too deeply", "remove the record") from None
            if self.text[end - 1] in '}]"' or end < len(self.text) - SLACK or not self.more():
                return value, self.take(end)


def read(stream: TextIO, path: object, field: str | None) -> Iterator[Part]:
    """The records of a list and, as they stand in the file, the characters between them."""
    window = _Window(stream, path)
    gap = window.char() if window.peek() == "\ufeff" else ""
    gap += window.blank()
    if window.peek() != "[":
        fix = "pass --format=jsonl if it holds an object a line"
        raise FormatError(path, window.line, 'expected a JSON list "[...]"', fix)
    gap += window.char() + window.blank()
    number = 0
    while window.peek() != "]" or number:
        number += 1
        place = Place(path, window.line, number)
        value, raw = window.value(place)
        yield gap
        yield objects.parse(value, raw, place, field)
        gap = window.blank()
        if window.peek() == "]":
            break
        if window.peek() != ",":
            raise _unfinished(window, number)
        gap += window.char() + window.blank()
    gap += window.char() + window.blank()
    if window.peek():
        raise FormatError(path, window.line, 'text after the closing "]"', "remove it, or pass --format=jsonl")
    yield gap


def _unfinished(window: _Window, number: int) -> FormatError:
    after = f"after record {number}"
    if not window.peek():
        return FormatError(window.path, window.line, f"the file ends {after}, before the closing ]", TORN)
    what = f"expected , or ] {after}, found {objects.quoted(window.peek())}"
    return FormatError(window.path, window.line, what, "mend the list")

"""What every format yields: records, bad records, and errors that say where and how to mend."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence


class FormatError(ValueError):
    """A user's file is not what it should be. `str(error)` is one line: `path:line: what; how to mend it`."""

    def __init__(self, path: object, line: int | None, what: str, fix: str) -> None:
        self.path, self.line, self.what, self.fix = path, line, what, fix
        where = f"{path}:{line}" if line else f"{path}"
        super().__init__(" ".join(f"{where}: {what}; {fix}".splitlines()))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record starts: its file, its line and, where a line may hold several, its number; from 1."""

    path: object
    line: int
    number: int | None = None

    def error(self, what: str, fix: str) -> FormatError:
        return FormatError(self.path, self.line, f"record {self.number}: {what}" if self.number else what, fix)


@dataclasses.dataclass(frozen=True)
class Record:
    """One utterance, line or sentence of a recogniser's output.

    Attributes:
      line: where it starts in the file, from 1.
      hypotheses: at least one, the best first; each may be empty (the recogniser heard nothing).
      sources: what was translated, one text per source language; empty for other tasks.
      task: the name of a task family as the file gives it, or None.
      reference: the right text where the file holds it, else None. Correction never reads it.
      raw: the record as the file writes it; writers splice into it, so that unknown fields stay as given.
      number: which record of its file it is, from 1, where a line may hold several; else its line.
    """

    line: int
    hypotheses: tuple[str, ...]
    sources: tuple[str, ...]
    task: str | None
    reference: str | None
    raw: str
    number: int

    @classmethod
    def of(cls, hypotheses: Sequence[str], *, task: str | None = None, number: int = 1) -> Record:
        """One that is in memory. Raises ValueError without a hypothesis."""
        if isinstance(hypotheses, str) or not hypotheses:
            raise ValueError("a record is a list of hypotheses, one at least")
        raw = json.dumps({"hypotheses": list(hypotheses)}, ensure_ascii=False)
        return cls(number, tuple(hypotheses), (), task, None, raw, number)


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that cannot be corrected but whose extent is known, so that it can be passed through."""

    error: FormatError
    raw: str


def sample(records: Sequence[Record], size: int) -> list[Record]:
    """At most `size` of the records, in their order: those that a hash of their text picks, whatever the order."""
    digests = [
        hashlib.sha1(f"{r.hypotheses[0]}\t{r.reference}".encode("utf-8", "surrogatepass")).digest() for r in records
    ]
    kept = sorted(range(len(records)), key=lambda i: digests[i])[:size]
    return [records[i] for i in sorted(kept)]


# A file is its parts in order: text between records (copied as it is), records, and bad records.
Part = str | Record | Bad


def check_utf8(raw: str, place: Place) -> None:
    """Raises FormatError if `raw`, decoded with `surrogateescape`, held bytes that are not UTF-8."""
    try:
        raw.encode()
    except UnicodeEncodeError as e:
        byte, offset = ord(raw[e.start]) & 0xFF, len(raw[: e.start].encode())
        what = f"not UTF-8: byte 0x{byte:02x} at byte {offset} of the record"
        raise place.error(what, "convert the file, for example with iconv -t UTF-8") from None

"""Line up an n-best list with its reference: at which sites do hypotheses depart from it, and how?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


@dataclasses.dataclass(frozen=True)
class Site:
    """A stretch of the reference where at least one hypothesis differs.

    Attributes:
      start, end: word positions in the reference; equal where words were inserted.
      clean: the words of the reference there, "" where words were inserted.
      readings: what each hypothesis has there, best hypothesis first; "" where it dropped the words.
    """

    start: int
    end: int
    clean: str
    readings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AlignedList:
    """An n-best list beside its reference: words of the reference, number of hypotheses, sites."""

    words: list[str]
    size: int
    sites: list[Site]


def align(reference: str, hypotheses: Sequence[str]) -> AlignedList:
    """The sites of an n-best list, in order; words are what lies between spaces."""
    clean = reference.split()
    lines = [h.split() for h in hypotheses]
    edits = [_edits(clean, words) for words in lines]
    spans: list[list[int]] = []
    for start, end in sorted((start, end) for of_one in edits for start, end, _ in of_one):
        if spans and (start < spans[-1][1] or start == spans[-1][0] or start == end == spans[-1][1]):
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    readings: list[list[str]] = [[] for _ in spans]
    for words, of_one in zip(lines, edits, strict=True):
        shift = done = 0  # how far this hypothesis lies ahead of the reference; how many of its edits are used
        for (start, end), here in zip(spans, readings, strict=True):
            begin = start + shift
            while done < len(of_one) and start <= of_one[done][0] <= of_one[done][1] <= end:
                shift += of_one[done][2]
                done += 1
            here.append(" ".join(words[begin : end + shift]))
    found = [
        Site(start, end, " ".join(clean[start:end]), tuple(here))
        for (start, end), here in zip(spans, readings, strict=True)
    ]
    return AlignedList(clean, len(lines), found)


def _edits(reference: Sequence[str], words: Sequence[str]) -> list[tuple[int, int, int]]:
    """(start, end, words gained) of each edit.

    Words replaced one for one are an edit each, unless a lost or a new word beside them leaves open which
    stands for which: then they are one edit.
    """
    changes = [op for op in Levenshtein.opcodes(reference, words) if op.tag != "equal"]
    edits: list[tuple[int, int, int]] = []
    for i, op in enumerate(changes):
        joins_next = i + 1 < len(changes) and changes[i + 1].src_start == op.src_end
        gained = op.dest_end - op.dest_start - (op.src_end - op.src_start)
        if i and changes[i - 1].src_end == op.src_start:
            start, _, before = edits.pop()
            edits.append((start, op.src_end, before + gained))
        elif op.tag == "replace" and not joins_next:
            edits += [(at, at + 1, 0) for at in range(op.src_start, op.src_end)]
        else:
            edits.append((op.src_start, op.src_end, gained))
    return edits

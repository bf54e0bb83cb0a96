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
      readings: what each hypothesis has there, best hypothesis first ("" where it dropped the words).
    """

    start: int
    end: int
    readings: tuple[str, ...]


def sites(reference: Sequence[str], hypotheses: Sequence[Sequence[str]]) -> list[Site]:
    """The sites of an n-best list, in order. Words in, so that callers decide what a word is."""
    edits = [_edits(reference, h) for h in hypotheses]
    spans: list[list[int]] = []
    for start, end in sorted((start, end) for edits_of_one in edits for start, end, _ in edits_of_one):
        touches = spans and (start < spans[-1][1] or start == end == spans[-1][1] or start == spans[-1][0])
        if touches:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    readings: list[list[str]] = [[] for _ in spans]
    for words, edits_of_one in zip(hypotheses, edits, strict=True):
        shift = done = (
            0  # how far this hypothesis lies ahead of the reference; how many of its edits are used
        )
        for (start, end), here in zip(spans, readings, strict=True):
            begin = start + shift
            while done < len(edits_of_one) and start <= edits_of_one[done][0] <= edits_of_one[done][1] <= end:
                shift += edits_of_one[done][2]
                done += 1
            here.append(" ".join(words[begin : end + shift]))
    return [Site(start, end, tuple(here)) for (start, end), here in zip(spans, readings, strict=True)]


def _edits(reference: Sequence[str], words: Sequence[str]) -> list[tuple[int, int, int]]:
    """(start, end, words gained) of each edit. Words replaced one for one are an edit each, unless a lost or a
    new word beside them leaves open which stands for which: then all are one edit."""
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

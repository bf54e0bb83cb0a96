"""Word-level differences: what a correction changed, judged against the reference."""

from __future__ import annotations

import re

from markupsafe import Markup, escape
from rapidfuzz.distance import Levenshtein

PLAIN, FIXED, BROKEN, MISSED = range(4)
"""Marks: as it should be; a change for the good; a change for the bad; an error that was left alone."""

Piece = str | tuple[str, int]  # plain text, or (text, mark)

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # written without spaces: a character is a word
_WORD = re.compile(rf"(\s*)([{_CJK}]|[^\s{_CJK}]+)")


def marked(first: str, corrected: str, reference: str) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """The three texts, cut into plain and marked pieces; each list of pieces joins to its text.

    In the correction a new word is FIXED if the reference has it there, else BROKEN; an old word that the
    reference lacks is MISSED. In the first pass the word that went away carries the mark of its going. In
    the reference BROKEN is a word that the first pass had right and the correction lost, MISSED one that
    both lack.
    Words are compared as written, without a metric's normaliser.
    """
    words_f, words_c, words_r = ([word for _, word in _WORD.findall(text)] for text in (first, corrected, reference))
    kept, swapped = _matches(words_f, words_c), _matches(words_f, words_c, "replace")
    in_first, wrong_in_first = _matches(words_f, words_r), _matches(words_f, words_r, "replace")
    in_correction = _matches(words_c, words_r)
    old = set(kept.values())
    marks_c = [
        (PLAIN if j in in_correction else MISSED) if j in old else (FIXED if j in in_correction else BROKEN)
        for j in range(len(words_c))
    ]
    marks_f = []
    for i in range(len(words_f)):
        if i in kept:
            marks_f.append(marks_c[kept[i]])
        elif i in in_first:
            marks_f.append(BROKEN)
        elif i in swapped:  # An error went away: for the good, unless another error took its place.
            marks_f.append(FIXED if marks_c[swapped[i]] == FIXED else MISSED)
        else:  # Nothing took its place: for the good, unless the reference has a word there.
            marks_f.append(MISSED if i in wrong_in_first else FIXED)
    right, was_right = set(in_correction.values()), set(in_first.values())
    marks_r = [PLAIN if k in right else BROKEN if k in was_right else MISSED for k in range(len(words_r))]
    return _pieces(first, marks_f), _pieces(corrected, marks_c), _pieces(reference, marks_r)


COLOURS = {FIXED: "#1b7f3b", BROKEN: "#c0392b", MISSED: "#b8860b"}


def html(first: str, corrected: str, reference: str) -> str:
    """The three texts under each other, for a notebook: what was mended green, broken red, missed yellow."""
    lines = Markup("")
    for name, pieces in zip(("first pass", "corrected", "meant"), marked(first, corrected, reference), strict=True):
        text = Markup("")
        for piece in pieces:
            if isinstance(piece, str) or piece[1] == PLAIN:
                text += escape(piece if isinstance(piece, str) else piece[0])
            else:
                text += Markup('<b style="color:{}">{}</b>').format(COLOURS[piece[1]], piece[0])
        head = Markup('<td style="color:#888;text-align:right">{}</td>').format(name)
        lines += Markup('<tr>{}<td style="text-align:left">{}</td></tr>').format(head, text)
    return str(Markup("<table>{}</table>").format(lines))


def _matches(a: list[str], b: list[str], tag: str = "equal") -> dict[int, int]:
    """Position in `a` -> position in `b`, for the word pairs that a Levenshtein alignment tags so."""
    return {
        op.src_start + n: op.dest_start + n
        for op in Levenshtein.opcodes(a, b)
        if op.tag == tag
        for n in range(op.src_end - op.src_start)
    }


def _pieces(text: str, marks: list[int]) -> list[Piece]:
    """Join neighbours with the same mark; the space between two different marks is plain."""
    runs: list[list] = []
    before, end = PLAIN, 0
    for match, mark in zip(_WORD.finditer(text), marks, strict=True):
        for part, as_mark in ((match[1], mark if mark == before else PLAIN), (match[2], mark)):
            if part and runs and runs[-1][1] == as_mark:
                runs[-1][0] += part
            elif part:
                runs.append([part, as_mark])
        before, end = mark, match.end()
    if end < len(text):
        runs.append([text[end:], PLAIN])
    return [part if mark == PLAIN else (part, mark) for part, mark in runs]

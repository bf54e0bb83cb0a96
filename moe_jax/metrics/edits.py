"""Precision, recall and F0.5 of a correction's edits, as grammar correction is judged.

The source is aligned with the correction and with the reference; an edit is right when its span in the source
and its replacement are those of a reference edit. F0.5 weighs precision twice as much as recall: a wrong
change costs more than a missed one. Neighbouring edits are joined as ERRANT's main rule does (substitutions
in a row stay apart, a substitution with an insertion or deletion beside it is one edit: "alot" -> "a lot"),
but there is no linguistic merging and no error type, so numbers are near ERRANT's and not equal to them.
Tokens carry no spaces: an edit of only the spaces around punctuation does not count, in the reference or in
the correction.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from moe_jax.metrics.normalisers import WRITTEN, Normaliser, tokens

Edit = tuple[int, int, tuple[str, ...]]  # start and end in the source's tokens, replacement


@dataclasses.dataclass(frozen=True, slots=True)
class EditCounts:
    """Edits made rightly, made wrongly and missed; additive over lines."""

    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0

    def __add__(self, other: EditCounts) -> EditCounts:
        return EditCounts(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
        )

    @property
    def precision(self) -> float:
        """1 when nothing was changed, as in ERRANT and M2."""
        made = self.true_positives + self.false_positives
        return self.true_positives / made if made else 1.0

    @property
    def recall(self) -> float:
        """1 when nothing was to be changed."""
        wanted = self.true_positives + self.false_negatives
        return self.true_positives / wanted if wanted else 1.0

    @property
    def f_half(self) -> float:
        counts = (self.true_positives, self.false_positives, self.false_negatives)
        return float(f_half(np.array([counts], np.float64))[0])


def f_half(counts_Rx3: np.ndarray) -> np.ndarray:
    """F0.5 of rows of (true positives, false positives, false negatives), one a row."""
    true, made, wanted = counts_Rx3[:, 0], counts_Rx3[:, :2].sum(1), counts_Rx3[:, [0, 2]].sum(1)
    precision = np.where(made > 0, true / np.maximum(made, 1), 1.0)
    recall = np.where(wanted > 0, true / np.maximum(wanted, 1), 1.0)
    below = 0.25 * precision + recall
    return np.where(below > 0, 1.25 * precision * recall / np.where(below > 0, below, 1), 0.0)


def edits(source: Sequence[str], target: Sequence[str]) -> set[Edit]:
    """The edits that turn the tokens of `source` into those of `target`."""
    found: set[Edit] = set()
    for equal, group in itertools.groupby(Levenshtein.opcodes(source, target), lambda op: op.tag == "equal"):
        if equal:
            continue
        run = list(group)
        start, end = run[0].src_start, run[-1].src_end
        replacement = tuple(target[run[0].dest_start : run[-1].dest_end])
        if all(op.tag == "replace" for op in run):
            found.update((start + k, start + k + 1, (token,)) for k, token in enumerate(replacement))
        else:
            found.add((start, end, replacement))
    return found


def edit_counts(source: str, correction: str, reference: str, normaliser: Normaliser = WRITTEN) -> EditCounts:
    """The counts of one line."""
    source_tokens, corrected, wanted = (tokens(normaliser(text)) for text in (source, correction, reference))
    made, right = edits(source_tokens, corrected), edits(source_tokens, wanted)
    return EditCounts(len(made & right), len(made - right), len(right - made))

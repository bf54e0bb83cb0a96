"""Word and character error rates with their substitutions, deletions and insertions.

Counts are additive: a corpus rate is the sum of the edits over the sum of the reference lengths, so long
lines weigh more. `mean_line_rate` is the other habit, the mean of per-utterance rates (Hypo2Trans' inference
script); the two differ whenever lines differ in length, so never compare one with the other.

Words are what white space separates after normalising: the word rate says little about scripts that do not
write spaces; read the character rate there. Characters are code points, spaces included (as in jiwer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from rapidfuzz.distance import Levenshtein

from moe_jax.metrics.normalisers import RAW, Normaliser

Units = Sequence[str]  # the words or the characters of one line


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorCounts:
    """Edits that turn a reference into a hypothesis, and the reference's length, in words or characters."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_length + other.reference_length,
        )

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors a reference unit, in [0, inf). An empty reference counts as one unit long (as in jiwer)."""
        return self.errors / max(self.reference_length, 1)


def words(text: str) -> Units:
    return text.split()


def characters(text: str) -> Units:
    return text


def count(reference: Units, hypothesis: Units) -> ErrorCounts:
    """The counts of one line, of a minimum edit alignment. Either side may be empty."""
    tags = [op.tag for op in Levenshtein.editops(reference, hypothesis)]
    return ErrorCounts(tags.count("replace"), tags.count("delete"), tags.count("insert"), len(reference))


def line_errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normaliser: Normaliser = RAW,
    units: Callable[[str], Units] = words,
) -> list[ErrorCounts]:
    """The counts of each line. Raises ValueError when the two sides differ in length."""
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses; give one a line")
    return [
        count(units(normaliser(reference)), units(normaliser(hypothesis)))
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]


def total(lines: Iterable[ErrorCounts]) -> ErrorCounts:
    return sum(lines, ErrorCounts())


def wer(references: Sequence[str], hypotheses: Sequence[str], normaliser: Normaliser = RAW) -> ErrorCounts:
    """Corpus word errors; `.rate` is the WER."""
    return total(line_errors(references, hypotheses, normaliser, words))


def cer(references: Sequence[str], hypotheses: Sequence[str], normaliser: Normaliser = RAW) -> ErrorCounts:
    """Corpus character errors; `.rate` is the CER."""
    return total(line_errors(references, hypotheses, normaliser, characters))


def mean_line_rate(lines: Sequence[ErrorCounts]) -> float:
    """The mean of the lines' own rates: every line weighs the same. Not the corpus rate. 0 without lines."""
    return sum(line.rate for line in lines) / max(len(lines), 1)

"""What an n-best list makes possible (HyPoradise, arXiv 2309.15701): bounds to read a corrector against.

`n_best` (o_nb) bounds any method that picks one hypothesis. `compositional` (o_cp) bounds any method that may
use only words of the list: it can be beaten only by writing words that nobody recognised. Hence o_cp <= o_nb
<= first pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from moe_jax.metrics.errors import ErrorCounts, Units, count


def n_best(reference: Units, hypotheses: Sequence[Units]) -> ErrorCounts:
    """The counts of the hypothesis with the fewest errors. Needs at least one hypothesis."""
    return count(reference, min(hypotheses, key=lambda units: Levenshtein.distance(reference, units)))


def compositional(reference: Units, hypotheses: Sequence[Units]) -> ErrorCounts:
    """One deletion for every reference unit that no hypothesis contains; order and repetition are free.

    The union is a set, as in the authors' code: a word heard once serves whenever the reference says it.
    """
    heard = set().union(*hypotheses)
    return ErrorCounts(deletions=sum(unit not in heard for unit in reference), reference_length=len(reference))

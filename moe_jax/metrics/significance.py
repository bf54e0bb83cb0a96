"""Is a change more than luck? Resampling over lines, for any metric that is a function of summed line
statistics.

Interval: paired bootstrap (Koehn 2004; Bisani and Ney 2004). Lines are drawn with replacement, the same lines
for both systems, and the relative change of the corpus score is taken each time; the interval is its 2.5 and
97.5 percentiles.

p-value: paired approximate randomisation (Noreen 1989; Riezler and Maxwell 2005), the test of "no change":
under it the two outputs of a line may be swapped. p is the share of random swaps whose difference is at least
the observed one in size, two-sided, with one added above and below (so p is never 0). Unlike a bootstrap p,
it stays honest on few lines: a single line gives p = 1, n lines no less than 2 / 2^n.

Both take lines as independent. Lines of one document or speaker are not quite: read p as optimistic there, or give what
belongs together as one (`by_cluster`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Score = Callable[[np.ndarray], np.ndarray]  # summed statistics RxK -> scores R

_CHUNK = 2_000_000  # resamples x lines held at once: 16 MB of weights


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A corrected corpus against its first pass.

    Attributes:
      relative_change: (corrected - first) / first; 0 when both are equal, inf when only the first is 0.
      ci95: its 95 % interval; an end may be inf where resamples have a first pass of 0. (nan, nan) below two
        lines, which say nothing of spread.
      corrected_ci95: the 95 % interval of the corrected score itself.
      p_value: two-sided, of "no change", in (0, 1].
    """

    relative_change: float
    ci95: tuple[float, float]
    corrected_ci95: tuple[float, float]
    p_value: float


def error_rate(sums_RxK: np.ndarray) -> np.ndarray:
    """Errors over length: the last column is the reference length, those before it are kinds of errors."""
    return sums_RxK[:, :-1].sum(1) / np.maximum(sums_RxK[:, -1], 1)


def relative_change(first_R: np.ndarray, corrected_R: np.ndarray) -> np.ndarray:
    """(corrected - first) / first; 0 where both are equal, inf where only the first is 0."""
    difference = corrected_R - first_R
    change = np.where(difference == 0, 0.0, np.inf)
    return np.divide(difference, first_R, out=change, where=first_R != 0)


def by_cluster(statistics_NxK: np.ndarray, cluster_N: np.ndarray, group_N: np.ndarray, groups: int) -> np.ndarray:
    """Cx(groups K): what the lines of each cluster have together, group by group. `compare` then draws and swaps whole
    clusters, such as the translations of one sentence into several languages, which share its difficulty."""
    _, place_N = np.unique(cluster_N, return_inverse=True)
    out_CxGxK = np.zeros((place_N.max(initial=-1) + 1, groups, statistics_NxK.shape[1]))
    np.add.at(out_CxGxK, (place_N, group_N), statistics_NxK)
    return out_CxGxK.reshape(len(out_CxGxK), -1)


def mean_of_groups(score: Score, groups: int) -> Score:
    """The mean over groups of each group's own corpus score, of sums laid out as by `by_cluster`."""
    return lambda sums_RxGK: score(sums_RxGK.reshape(len(sums_RxGK) * groups, -1)).reshape(-1, groups).mean(1)


def compare(
    first_NxK: np.ndarray,
    corrected_NxK: np.ndarray,
    score: Score = error_rate,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares two outputs for the same N lines, given each line's K additive statistics.

    For error rates K is 2, (errors, reference length), or more kinds of errors before the length. The result
    depends on nothing but the arguments. Raises ValueError when the shapes differ or there is no line.
    """
    if first_NxK.shape != corrected_NxK.shape or first_NxK.ndim != 2 or not len(first_NxK):
        raise ValueError(f"need two equal, non-empty NxK arrays, got {first_NxK.shape} and {corrected_NxK.shape}")
    first_NxK, corrected_NxK = first_NxK.astype(np.float64), corrected_NxK.astype(np.float64)
    rng = np.random.default_rng(seed)
    observed = score(np.stack([first_NxK.sum(0), corrected_NxK.sum(0)]))
    ci95, corrected_ci95 = _bootstrap(first_NxK, corrected_NxK, score, resamples, rng)
    return Comparison(
        relative_change=float(relative_change(observed[:1], observed[1:])[0]),
        ci95=ci95,
        corrected_ci95=corrected_ci95,
        p_value=_randomisation(first_NxK, corrected_NxK, score, resamples, rng, abs(observed[1] - observed[0])),
    )


def _bootstrap(first_NxK, corrected_NxK, score: Score, resamples: int, rng: np.random.Generator):
    lines = len(first_NxK)
    if lines < 2:
        return (np.nan, np.nan), (np.nan, np.nan)
    changes, corrected = [], []
    for rows in _chunks(resamples, lines):
        drawn = rng.integers(lines, size=(rows, lines)) + lines * np.arange(rows)[:, None]
        weights_RxN = np.bincount(drawn.ravel(), minlength=rows * lines).reshape(rows, lines).astype(np.float64)
        corrected.append(score(weights_RxN @ corrected_NxK))
        changes.append(relative_change(score(weights_RxN @ first_NxK), corrected[-1]))
    return _interval(changes), _interval(corrected)


def _randomisation(
    first_NxK, corrected_NxK, score: Score, resamples: int, rng: np.random.Generator, observed: float
) -> float:
    difference_NxK = corrected_NxK - first_NxK
    as_large = 0
    for rows in _chunks(resamples, len(first_NxK)):
        swapped_RxN = rng.integers(2, size=(rows, len(first_NxK)), dtype=np.int8).astype(np.float64)
        moved_RxK = swapped_RxN @ difference_NxK
        gap = score(first_NxK.sum(0) + moved_RxK) - score(corrected_NxK.sum(0) - moved_RxK)
        as_large += int((np.abs(gap) >= observed - 1e-12).sum())  # rounding must not break ties
    return (as_large + 1) / (resamples + 1)


def _chunks(resamples: int, lines: int) -> Iterator[int]:
    step = max(_CHUNK // lines, 1)
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


def _interval(values: list[np.ndarray]) -> tuple[float, float]:
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975], method="inverted_cdf")  # no inf - inf
    return float(low), float(high)

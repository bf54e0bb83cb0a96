"""From the lines of one task family to the additive statistics of each metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.metrics import edits, errors, oracles, translation
from moe_jax.metrics.normalisers import WRITTEN, Normaliser, family_normaliser
from moe_jax.metrics.significance import Score, error_rate


@dataclasses.dataclass(frozen=True)
class Measure:
    """One metric of N lines, before any sum is taken.

    Attributes:
      metric: `wer`, `cer`, `bleu`, `chrf` or `f0.5`.
      score: summed statistics RxK -> R scores.
      first_NxK, corrected_NxK: the statistics of the first hypothesis and of the correction.
      oracle_nb_NxK: those of the best hypothesis of each line.
      oracle_cp_NxK: those of the compositional oracle; None where it is not defined.
      gain_N: above 0 where the correction made the line better, below 0 where worse.
      normaliser, signature: what was forgiven; sacreBLEU metrics have a signature and no normaliser.
    """

    metric: str
    score: Score
    first_NxK: np.ndarray
    corrected_NxK: np.ndarray
    oracle_nb_NxK: np.ndarray
    oracle_cp_NxK: np.ndarray | None
    gain_N: np.ndarray
    normaliser: str | None = None
    signature: str | None = None


def measures(family: str, examples: Sequence[Mapping[str, Any]], corrections: Sequence[str]) -> list[Measure]:
    """The metrics of a family: `wer` and `cer`; with them `bleu` and `chrf` for mt and st, `f0.5` for gec."""
    references = [example["reference"] for example in examples]
    n_bests = [list(example["hypotheses"]) for example in examples]
    normaliser = family_normaliser(family)
    found = [_error_rate(metric, references, n_bests, corrections, normaliser) for metric in ("wer", "cer")]
    if family in ("mt", "st"):
        found += [_translation(m, references, n_bests, corrections) for m in (translation.bleu(), translation.chrf())]
    if family == "gec":
        found.append(_edit_f(references, n_bests, corrections))
    return found


def _error_rate(
    metric: str,
    references: Sequence[str],
    n_bests: Sequence[Sequence[str]],
    corrections: Sequence[str],
    normaliser: Normaliser,
) -> Measure:
    split = {"wer": errors.words, "cer": errors.characters}[metric]
    first, corrected, best, composed = [], [], [], []
    for reference, n_best, correction in zip(references, n_bests, corrections, strict=True):
        wanted = split(normaliser(reference))
        heard = [split(normaliser(hypothesis)) for hypothesis in n_best]
        first.append(errors.count(wanted, heard[0]))
        corrected.append(errors.count(wanted, split(normaliser(correction))))
        best.append(oracles.n_best(wanted, heard))
        composed.append(oracles.compositional(wanted, heard))
    first_N, corrected_N = (np.array([line.errors for line in lines]) for lines in (first, corrected))
    return Measure(
        metric=metric,
        score=error_rate,
        first_NxK=_rows(first),
        corrected_NxK=_rows(corrected),
        oracle_nb_NxK=_rows(best),
        oracle_cp_NxK=_rows(composed) if metric == "wer" else None,
        gain_N=first_N - corrected_N,
        normaliser=normaliser.signature,
    )


def _rows(lines: Sequence[errors.ErrorCounts]) -> np.ndarray:
    """Nx4: substitutions, deletions, insertions, reference length."""
    return np.array([(c.substitutions, c.deletions, c.insertions, c.reference_length) for c in lines])


def _translation(
    metric: translation.TranslationMetric,
    references: Sequence[str],
    n_bests: Sequence[Sequence[str]],
    corrections: Sequence[str],
) -> Measure:
    first_NxK = metric.statistics([n_best[0] for n_best in n_bests], references)
    corrected_NxK = metric.statistics(corrections, references)
    best = []
    for reference, n_best in zip(references, n_bests, strict=True):
        statistics = metric.statistics(n_best, [reference] * len(n_best))
        best.append(statistics[np.argmax(metric.line_scores(statistics))])
    return Measure(
        metric=metric.name,
        score=metric.score,
        first_NxK=first_NxK,
        corrected_NxK=corrected_NxK,
        oracle_nb_NxK=np.array(best),
        oracle_cp_NxK=None,
        gain_N=metric.line_scores(corrected_NxK) - metric.line_scores(first_NxK),
        signature=metric.signature,
    )


def _edit_f(references: Sequence[str], n_bests: Sequence[Sequence[str]], corrections: Sequence[str]) -> Measure:
    """The first hypothesis is the source text, so the first pass edits nothing; a line's errors are its
    wrong and missed edits."""
    first, corrected, best = [], [], []
    for reference, n_best, correction in zip(references, n_bests, corrections, strict=True):
        of_hypotheses = [edits.edit_counts(n_best[0], hypothesis, reference) for hypothesis in n_best]
        first.append(of_hypotheses[0])
        corrected.append(edits.edit_counts(n_best[0], correction, reference))
        best.append(max(of_hypotheses, key=lambda counts: counts.f_half))
    first_Nx3, corrected_Nx3, best_Nx3 = (
        np.array([(c.true_positives, c.false_positives, c.false_negatives) for c in lines])
        for lines in (first, corrected, best)
    )
    return Measure(
        metric="f0.5",
        score=edits.f_half,
        first_NxK=first_Nx3,
        corrected_NxK=corrected_Nx3,
        oracle_nb_NxK=best_Nx3,
        oracle_cp_NxK=None,
        gain_N=(first_Nx3 - corrected_Nx3)[:, 1:].sum(1),
        normaliser=WRITTEN.signature,
    )

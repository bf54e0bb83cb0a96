"""BLEU and chrF by sacreBLEU, with the signature that makes a number comparable.

Scores are fractions in [0, 1] like every other rate here (sacreBLEU prints them times 100). Text goes in as
it is: sacreBLEU tokenises it itself (13a for BLEU, which fits languages that write spaces; read chrF for the
others).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF


class TranslationMetric:
    """One sacreBLEU metric with one reference a line, and its additive line statistics for resampling.

    The statistics come from the methods on which sacreBLEU's own significance tests stand; they are not
    public, so a test holds them to `corpus_score`.
    """

    def __init__(self, name: str, corpus: Metric, sentence: Metric):
        self.name = name
        self._corpus = corpus
        self._sentence = sentence  # BLEU of one line needs the effective order
        self.signature = self.corpus([""], [""])[1]  # sacreBLEU knows the number of references after a first score

    def corpus(self, hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
        """The corpus score and sacreBLEU's signature of it."""
        score = self._corpus.corpus_score(list(hypotheses), [list(references)]).score / 100
        return score, str(self._corpus.get_signature())

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """NxK: the additive statistics of each line."""
        return np.array(self._corpus._extract_corpus_statistics(hypotheses, [references]), np.float64)

    def score(self, sums_RxK: np.ndarray) -> np.ndarray:
        """R corpus scores from summed statistics."""
        return _scores(self._corpus, sums_RxK)

    def line_scores(self, statistics_NxK: np.ndarray) -> np.ndarray:
        """N sentence scores."""
        return _scores(self._sentence, statistics_NxK)


def _scores(metric: Metric, rows: np.ndarray) -> np.ndarray:
    return np.array([metric._compute_score_from_stats(row).score for row in rows.tolist()]) / 100


def bleu() -> TranslationMetric:
    """BLEU; `force` only silences sacreBLEU's hint about tokenised input."""
    return TranslationMetric("bleu", BLEU(force=True), BLEU(force=True, effective_order=True))


def chrf() -> TranslationMetric:
    """chrF2: characters only, beta 2 (chrF++ would add words)."""
    return TranslationMetric("chrf", CHRF(), CHRF())

"""Metrics of corrections: error rates, oracles, edits, translation scores, significance. No JAX, no model.

`score` gives the rows of a report and `to_markdown` a table of them; the modules hold the parts.
"""

from moe_jax.metrics.errors import ErrorCounts, cer, mean_line_rate, wer
from moe_jax.metrics.normalisers import FAMILY_NORMALISER, NORMALISERS, Normaliser, family_normaliser
from moe_jax.metrics.scoring import score, to_markdown

__all__ = [
    "FAMILY_NORMALISER",
    "NORMALISERS",
    "ErrorCounts",
    "Normaliser",
    "cer",
    "family_normaliser",
    "mean_line_rate",
    "score",
    "to_markdown",
    "wer",
]

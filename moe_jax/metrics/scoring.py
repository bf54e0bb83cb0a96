"""Corrections against their first pass: the rows of a report, and a table of them.

rows = score(examples, corrections)
print(to_markdown(rows))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.metrics.edits import EditCounts
from moe_jax.metrics.measures import Measure, measures
from moe_jax.metrics.significance import compare

ALL = "all"
"""The `set` of a family's own row."""

Row = dict[str, Any]


def score(
    examples: Sequence[Mapping[str, Any]], corrections: Sequence[str], *, seed: int = 0, resamples: int = 2000
) -> list[Row]:
    """Scores each correction against its example's reference, with the first hypothesis as the first pass.

    Args:
      examples: mappings with `task` (family), `source_set`, `hypotheses` (best first) and `reference`.
      corrections: one string an example, in the same order.
      seed, resamples: of the intervals and p-values; see `significance`.

    Returns:
      JSON-safe rows: for each family (in order of appearance) its metrics with set "all", then those of each
      source set. The metrics are `wer` and `cer`; with them `bleu` and `chrf` for mt and st and `f0.5` for gec,
      where higher is better. Scores are fractions (BLEU 0.25 is sacreBLEU's 25). Keys:
        task, set, lines, metric, normaliser (null for sacreBLEU metrics), signature (sacreBLEU's, else null);
        first_pass, corrected, oracle_nb, oracle_cp (wer only, else null): scores;
        relative_change: (corrected - first_pass) / first_pass, null when only the first pass is 0;
        ci95: [low, high] of relative_change, an end null when unbounded or below two lines; p_value;
        fixed, broken, untouched: lines that got better, got worse, stayed (by the metric's own errors; by
        sentence score for bleu and chrf; by wrong and missed edits for f0.5);
        substitutions, deletions, insertions: of the corrections (wer and cer, else null).
        `f0.5` rows also hold precision, recall and corrected_ci95, the interval of `corrected` itself: their
        first pass edits nothing and so scores 0, from which no relative change can be taken.

    Raises:
      ValueError: one line naming the example, when something is missing or of the wrong kind.
    """
    _check(examples, corrections)
    rows: list[Row] = []
    for family, lines in _groups(examples, range(len(examples)), "task").items():
        of_family = [examples[line] for line in lines]
        found = measures(family, of_family, [corrections[line] for line in lines])
        sets = {ALL: list(range(len(lines)))} | _groups(of_family, range(len(lines)), "source_set")
        rows += [
            _row(family, name, measure, chosen, seed, resamples) for name, chosen in sets.items() for measure in found
        ]
    return rows


def _check(examples: Sequence[Mapping[str, Any]], corrections: Sequence[str]) -> None:
    if len(examples) != len(corrections):
        raise ValueError(f"{len(examples)} examples but {len(corrections)} corrections; give one an example")
    if not examples:
        raise ValueError("no examples to score")
    for index, (example, correction) in enumerate(zip(examples, corrections, strict=True)):
        for key in ("task", "source_set", "hypotheses", "reference"):
            if key not in example:
                raise ValueError(f"example {index}: key {key!r} is missing")
        for key in ("task", "source_set", "reference"):
            if not isinstance(example[key], str):
                raise ValueError(f"example {index}: {key!r} is not a string: {example[key]!r:.60}")
        hypotheses = example["hypotheses"]
        if not isinstance(hypotheses, list | tuple) or not all(isinstance(text, str) for text in hypotheses):
            raise ValueError(f"example {index}: 'hypotheses' is not a list of strings: {hypotheses!r:.60}")
        if not hypotheses:
            raise ValueError(f"example {index}: 'hypotheses' is empty; give at least the first pass")
        if example["source_set"] == ALL:
            raise ValueError(f"example {index}: a source set cannot be called {ALL!r}, the name of a family's total")
        if not isinstance(correction, str):
            raise ValueError(f"correction {index} is not a string: {correction!r:.60}")


def _groups(examples: Sequence[Mapping[str, Any]], lines: Sequence[int], key: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for line in lines:
        groups.setdefault(examples[line][key], []).append(line)
    return groups


def _row(family: str, name: str, measure: Measure, lines: Sequence[int], seed: int, resamples: int) -> Row:
    first_NxK, corrected_NxK, gain_N = (
        array[lines] for array in (measure.first_NxK, measure.corrected_NxK, measure.gain_N)
    )
    comparison = compare(first_NxK, corrected_NxK, measure.score, seed=seed, resamples=resamples)
    row: Row = {
        "task": family,
        "set": name,
        "lines": len(lines),
        "metric": measure.metric,
        "normaliser": measure.normaliser,
        "signature": measure.signature,
        "first_pass": _total(measure, first_NxK),
        "corrected": _total(measure, corrected_NxK),
        "oracle_nb": _total(measure, measure.oracle_nb_NxK[lines]),
        "oracle_cp": None if measure.oracle_cp_NxK is None else _total(measure, measure.oracle_cp_NxK[lines]),
        "relative_change": finite(comparison.relative_change),
        "ci95": [finite(end) for end in comparison.ci95],
        "p_value": comparison.p_value,
        "fixed": int((gain_N > 0).sum()),
        "broken": int((gain_N < 0).sum()),
        "untouched": int((gain_N == 0).sum()),
        **dict.fromkeys(("substitutions", "deletions", "insertions")),
    }
    sums = corrected_NxK.sum(0)
    if measure.metric in ("wer", "cer"):
        row["substitutions"], row["deletions"], row["insertions"] = (int(kind) for kind in sums[:3])
    if measure.metric == "f0.5":
        counts = EditCounts(*(int(kind) for kind in sums))
        row["precision"], row["recall"] = counts.precision, counts.recall
        row["corrected_ci95"] = [finite(end) for end in comparison.corrected_ci95]
    return row


def _total(measure: Measure, lines_NxK: np.ndarray) -> float:
    return float(measure.score(lines_NxK.sum(0, keepdims=True))[0])


def finite(value: float) -> float | None:
    """For JSON, which has no inf and no nan."""
    return value if math.isfinite(value) else None


_HEADER = (
    "task",
    "metric",
    "lines",
    "first pass",
    "corrected",
    "n-best oracle",
    "comp. oracle",
    "change (95 % CI)",
    "p",
    "fixed / broken / same",
    "normaliser",
)


def to_markdown(rows: Sequence[Row]) -> str:
    """A table of the families' own rows (set "all"); scores in percent. Ends with a newline."""
    table: list[tuple[str, ...]] = [_HEADER, ("---", "---", *["---:"] * 8, "---")]
    table += [_cells(row) for row in rows if row["set"] == ALL]
    return markdown(table)


def markdown(table: Iterable[Sequence[str]]) -> str:
    """A table of cells, its first two rows the titles and their rule; no cell breaks out of it."""
    escaped = ([cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in table)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def _cells(row: Row) -> tuple[str, ...]:
    low, high = (percent(end, sign="+", digits=1) for end in row["ci95"])
    change = percent(row["relative_change"], sign="+", digits=1)
    arrow = " ↑" if row["metric"] in ("bleu", "chrf", "f0.5") else " ↓"
    return (
        row["task"],
        row["metric"] + arrow,
        f"{row['lines']:,}",
        *(percent(row[key]) for key in ("first_pass", "corrected", "oracle_nb", "oracle_cp")),
        change if change == "–" else f"{change} % ({low} to {high})",
        f"{row['p_value']:.4f}",
        f"{row['fixed']} / {row['broken']} / {row['untouched']}",
        row["normaliser"] or row["signature"],
    )


def percent(value: float | None, *, sign: str = "", digits: int = 2) -> str:
    """A fraction as the tables show it; a dash for None."""
    return "–" if value is None else f"{100 * value:{sign}.{digits}f}"

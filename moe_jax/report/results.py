"""Score rows as a reader meets them: did it help, where, at what cost."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from moe_jax.report import svg
from moe_jax.report.read import METRICS

Row = dict[str, Any]

LOWER_IS_BETTER = {"wer", "cer"}
PERCENT = {"wer", "cer", "f0.5"}  # BLEU and chrF are customarily written without the sign
SPELLED = {
    "wer": "word error rate",
    "cer": "character error rate",
    "bleu": "BLEU",
    "chrf": "chrF",
    "f0.5": "F0.5 of the edits",
}
TASKS = {
    "asr": "Speech recognition",
    "ocr": "Text recognition",
    "mt": "Machine translation",
    "gec": "Grammar",
    "denoise": "Noisy text",
    "tn": "Text normalisation",
    "itn": "Inverse text normalisation",
    "st": "Speech translation",
}
VERDICTS = {"helps": "helps", "flat": "no clear change", "hurts": "hurts", "untested": "not tested"}
ICONS = {"helps": "✓", "flat": "○", "hurts": "✕", "untested": "·"}

NONE = "–"
LEVEL = 0.05


def task_name(task: str) -> str:
    return TASKS.get(task, task)


def verdict(row: Row) -> str:
    """helps, hurts, flat (p of at least 0.05, or no difference) or untested (no p-value)."""
    gain = _gain(row, row["corrected"] - row["first_pass"])
    if row["p_value"] is None:
        return "untested"
    return "flat" if row["p_value"] >= LEVEL or gain == 0 else "helps" if gain > 0 else "hurts"


def headlines(rows: list[Row]) -> list[Row]:
    """The row of each family that its card tells: the first "all" row, or the first row of its only set."""
    chosen = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        whole = [row for row in own if row["set"] == "all"]
        if not whole and len({row["set"] for row in own}) == 1:
            whole = own
        chosen += whole[:1]
    return chosen


def cards(rows: list[Row]) -> list[dict[str, Any]]:
    """One card a family; the scale of the intervals is common to all."""
    chosen = headlines(rows)
    scale = _scale(chosen)
    return [
        {
            "row": row,
            "name": task_name(row["task"]),
            "verdict": verdict(row),
            "change": change(row),
            "what": SPELLED[row["metric"]],
            "from": score(row, "first_pass"),
            "to": score(row, "corrected"),
            "interval": interval(row),
            "whisker": _whisker(row, scale),
            "p": p_value(row["p_value"]),
            "others": [
                f"{METRICS[other['metric']]} {score(other, 'first_pass')} → {score(other, 'corrected')}"
                for other in rows
                if (other["task"], other["set"]) == (row["task"], row["set"]) and other is not row
            ],
        }
        for row in chosen
    ]


def summary(rows: list[Row]) -> list[str]:
    """The answer in one or two sentences."""
    chosen = headlines(rows)
    said = []
    for key, words in (
        ("helps", "helps with {}"),
        ("hurts", "hurts {}"),
        ("flat", "makes no clear difference to {}"),
        ("untested", "was not tested for significance on {}"),
    ):
        names = [task_name(r["task"]) for r in chosen if verdict(r) == key]
        if names:
            said.append(words.format(_and([n if n.isupper() else n[0].lower() + n[1:] for n in names])))
    sentences = [f"The corrector {'; it '.join(said)}."] if said else []
    counted = [r for r in chosen if r["fixed"] is not None and r["broken"] is not None]
    if counted:
        lines, fixed, broken = (sum(r[key] for r in counted) for key in ("lines", "fixed", "broken"))
        sentences.append(f"Of {lines:,} lines it left {fixed:,} with fewer errors and {broken:,} with more.")
    return sentences


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """Every score row, ready for the score table."""
    scale = _scale(rows)
    return [
        {
            "row": row,
            "metric": METRICS[row["metric"]],
            "verdict": verdict(row),
            **{k: score(row, k) for k in ("first_pass", "corrected", "oracle_nb", "oracle_cp")},
            "change": change(row),
            "interval": interval(row),
            "whisker": _whisker(row, scale),
            "p": p_value(row["p_value"]),
            "edits": edits(row),
        }
        for row in rows
    ]


def bars(rows: list[Row]) -> list[dict[str, Any]]:
    """Fixed, broken and untouched lines of each set, counted by the set's first metric that has counts."""
    seen: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["fixed"] is not None and row["broken"] is not None:
            seen.setdefault((row["task"], row["set"]), row)
    drawn = []
    for row in seen.values():
        fixed, broken = row["fixed"], row["broken"]
        rest = row["lines"] - fixed - broken
        label = f"{row['task']}, {row['set']}: {fixed} fixed, {broken} broken, {rest} untouched"
        parts = [("fixed", fixed), ("broken", broken), ("untouched", rest)]
        drawn.append(
            {
                "row": row,
                "untouched": rest,
                "svg": svg.stacked(parts, row["lines"], label=label),
                "ratio": f"{fixed / broken:.1f}" if broken else NONE,
            }
        )
    return drawn


def score(row: Row, key: str) -> str:
    value = row[key]
    if value is None:
        return NONE
    return f"{100 * value:.2f}" + ("\u202f%" if row["metric"] in PERCENT else "")


def change(row: Row) -> tuple[str, str]:
    """(number, unit): the relative change, or points where the first pass leaves nothing to divide by."""
    if row["relative_change"] is not None:
        return signed(100 * row["relative_change"]), "%"
    return signed(100 * (row["corrected"] - row["first_pass"])), "points"


def interval(row: Row) -> str:
    if row["ci95"] is None or row["relative_change"] is None:
        return NONE
    low, high = row["ci95"]
    return f"{signed(100 * low)} … {signed(100 * high)}\u202f%"


def signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def p_value(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def edits(row: Row) -> str:
    counts = [row[key] for key in ("substitutions", "deletions", "insertions")]
    return NONE if None in counts else " / ".join(f"{n:,}" for n in counts)


def _gain(row: Row, change: float) -> float:
    """A change with the sign turned so that more is better."""
    return -change if row["metric"] in LOWER_IS_BETTER else change


def _scale(rows: list[Row]) -> svg.Point:
    """A common scale, in gains, that holds zero and every interval, up to a change of 100 % either way."""
    gains = [
        _gain(row, v)
        for row in rows
        if row["relative_change"] is not None
        for v in (row["relative_change"], *(row["ci95"] or ()))
    ]
    low, high = max(-1.0, min([*gains, -0.02])), min(1.0, max([*gains, 0.02]))
    return low - 0.15 * (high - low), high


def _whisker(row: Row, scale: svg.Point) -> Markup | None:
    if row["relative_change"] is None:
        return None
    low, high = row["ci95"] or [row["relative_change"]] * 2
    gains = [_gain(row, v) for v in (row["relative_change"], low, high)]
    label = f"change {' '.join(change(row))}, 95 % interval {interval(row)}"
    return svg.whisker(*gains, scale=scale, label=label)


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

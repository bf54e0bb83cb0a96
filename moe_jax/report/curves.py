"""Learning curves: the training log as small charts on common scales."""

from __future__ import annotations

import math
from typing import Any

from moe_jax.report import svg
from moe_jax.report.results import task_name

Log = dict[int, dict[str, float]]
Chart = dict[str, Any]

HEALTH = {
    "load_balance": "Load balance loss",
    "router_z": "Router z loss",
    "entropy": "Router entropy, nats",
    "dropped": "Dropped assignments",
    "tokens_per_s": "Tokens a second",
}


def curves(log: Log) -> dict[str, Any] | None:
    """Charts in three groups: `loss` (train and validation, all tasks and each), `health`, `other`.

    None if the log has no number to draw. Each chart is {"title", "svg", "notes"}.
    """
    names = list(dict.fromkeys(name for row in log.values() for name in row))
    tasks = [n.removeprefix("loss/") for n in names if n.startswith("loss/")]
    tasks += [n.removeprefix("valid/loss/") for n in names if n.startswith("valid/loss/")]
    suffixes = {"": "All tasks", **{f"/{t}": task_name(t) for t in dict.fromkeys(tasks)}}
    panels = {title: [f"loss{end}", f"valid/loss{end}"] for end, title in suffixes.items()}
    drawn = {name for pair in panels.values() for name in pair}
    common = _range([v for name in drawn for _, v in _points(log, name)])
    loss = [_chart(log, title, pair, common) for title, pair in panels.items()]
    health = [_chart(log, title, [name]) for name, title in HEALTH.items()]
    other = [_chart(log, n, [n]) for n in names if n not in drawn and n not in HEALTH]
    groups = {
        key: [chart for chart in charts if chart]
        for key, charts in (("loss", loss), ("health", health), ("other", other))
    }
    return {**groups, "last": max(log), "log": _log_scale(common)} if any(groups.values()) else None


def _chart(log: Log, title: str, names: list[str], loss_range: svg.Point | None = None) -> Chart | None:
    """One chart of the named values, on the losses' common scale if that is given. None without any value."""
    points = {name: found for name in names if (found := _points(log, name))}
    if not points:
        return None
    series, notes, last = [], [], []
    for name, found in points.items():
        label, css_class = ("validation", "valid") if name.startswith("valid/") else ("training", "train")
        series.append(svg.Series(label if loss_range else "", css_class, found))
        finite = [value for _, value in found if math.isfinite(value)]
        last += [f"{label if loss_range else ''} {finite[-1]:.4g}".strip()] if finite else []
        wrong = [step for step, value in found if not math.isfinite(value)]
        if wrong:
            more = f" and {len(wrong) - 1:,} later steps" if wrong[1:] else ""
            notes.append(f"{name} is not a finite number at step {wrong[0]:,.0f}{more}")
    chart = svg.line_chart(
        series,
        x_range=(min(log), max(log)),
        y_range=loss_range or _range([value for found in points.values() for _, value in found]),
        log_y=loss_range is not None and _log_scale(loss_range),
        label=f"{title} by step; last value: {', '.join(last) or 'not finite'}",
    )
    return {
        "title": title,
        "svg": chart,
        "notes": notes,
        "last": "at the end " + ", ".join(last) if last else "",
    }


def _points(log: Log, name: str) -> list[svg.Point]:
    return [(float(step), row[name]) for step, row in log.items() if name in row]


def _range(values: list[float]) -> svg.Point:
    """From the least to the greatest finite value with a little air; losses stay above 0."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    if _log_scale((low, high)):
        return low / 1.1, high * 1.1
    return (max(low - air, 0.0) if low >= 0 else low - air), high + air


def _log_scale(span: svg.Point) -> bool:
    return span[0] > 0 and span[1] / span[0] > 8

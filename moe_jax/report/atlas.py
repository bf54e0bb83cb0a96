"""The routing atlas: which experts each task uses, layer by layer."""

from __future__ import annotations

import math
from typing import Any

from moe_jax.report.results import task_name

SHADES = 20


def atlas(routing: dict[str, Any]) -> dict[str, Any]:
    """Grids of shares in per cent with shades from 0 to `SHADES` (a common scale), and words about them."""
    tasks, experts, mapped = routing["tasks"], routing["experts"], routing["mapped"]
    most = max((v for layer in routing["load"] for row in layer for v in row), default=0) or 1
    layers = []
    for depth, load in enumerate(routing["load"]):
        entropy = routing["entropy"][depth] if routing["entropy"] else None
        layers.append(
            {
                "entropy": None if entropy is None else f"{entropy:.2f} of {math.log(len(experts)):.2f} nats",
                "told_apart": f"{told_apart(load):.2f}",
                "rows": [
                    {
                        "task": task,
                        "name": task_name(task),
                        "cells": [
                            {
                                "text": f"{100 * share:.0f}" if any(row) else "–",
                                "exact": f"{task}, expert {expert}: {100 * share:.1f} %",
                                "shade": round(SHADES * share / most),
                                "mapped": e in mapped.get(task, ()),
                            }
                            for e, (expert, share) in enumerate(zip(experts, row, strict=True))
                        ],
                    }
                    for task, row in zip(tasks, load, strict=True)
                ],
            }
        )
    return {
        "experts": experts,
        "layers": layers,
        "even": f"{100 / len(experts):.0f}" if experts else "–",
        "mapped": mapped,
        "agreement": [
            {"task": t, "experts": [experts[e] for e in mapped.get(t, ())], "share": f"{100 * v:.1f}"}
            for t, v in routing["agreement"].items()
        ],
    }


def told_apart(load: list[list[float]]) -> float:
    """How far the experts tell the tasks apart in one layer, from 0 (all tasks use them alike) to 1 (no two
    tasks share one): the mutual information of task and expert, tasks weighted alike, over log(tasks)."""
    rows = [row for row in load if any(row)]
    if len(rows) < 2:
        return 0.0
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    pairs = [(v, m) for row in rows for v, m in zip(row, mean, strict=True) if v > 0]
    nats = sum(v * math.log(v / m) for v, m in pairs) / len(rows)
    return min(1.0, max(0.0, nats / math.log(len(rows))))

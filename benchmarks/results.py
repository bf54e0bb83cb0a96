"""RESULTS.md from results/*/table.json; `--check` says whether it agrees, as CI does.

python -m benchmarks.results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
HIGHER = ("bleu", "chrf", "f0.5")
HEAD = """# Results

Made by `python -m benchmarks.results` from `results/*/table.json`; CI checks that it agrees. Values are percentages.
An arm's value is the mean over its seeds, ± their standard deviation; the change is relative to the first pass; the
interval is the 95 % paired bootstrap over lines of the first seed, p its paired randomisation test. Thresholds were
tuned on validation text; test text was scored once a run.
"""


def table(data: dict[str, Any]) -> str:
    """One experiment: the families, every metric, every arm."""
    rows = [r for r in data["rows"] if r["set"] == "all"]
    meta = data["meta"]
    out = [
        f"## {data['experiment']}\n",
        f"`{meta['command']}` · {meta['split']} · {meta['date']} · {meta['step']} steps\n",
    ]
    out.append("| task | metric | arm | value | seeds | change | 95 % interval | p | fixed / broken |")
    out.append("|---|---|---|--:|--:|--:|--:|--:|--:|")
    for task, metric in unique((r["task"], r["metric"]) for r in rows):
        mine = [r for r in rows if (r["task"], r["metric"]) == (task, metric)]
        for arm in unique(r["arm"] for r in mine):
            out.append(line(task, metric, arm, [r for r in mine if r["arm"] == arm]))
    return "\n".join(out) + "\n"


def line(task: str, metric: str, arm: str, rows: list[dict[str, Any]]) -> str:
    values = np.array([r["value"] for r in rows], float) * 100
    spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    first = rows[0]
    changes = [r["relative_change"] for r in rows if r["relative_change"] is not None]
    change = f"{100 * np.mean(changes):+.1f} %" if changes else ""
    interval = (
        ""
        if not first["ci95"] or None in first["ci95"]
        else "{:+.1f} to {:+.1f}".format(*(100 * x for x in first["ci95"]))
    )
    p = "" if first["p_value"] is None else f"{first['p_value']:.4f}"
    counts = "" if first["fixed"] is None else f"{first['fixed']} / {first['broken']}"
    arrow = "↑" if metric in HIGHER else "↓"
    seeds = "" if first["seed"] is None else str(len(rows))
    cells = (task, f"{metric} {arrow}", arm, f"{values.mean():.2f}{spread}", seeds, change, interval, p, counts)
    return f"| {' | '.join(cells)} |"


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def results() -> str:
    """The text of RESULTS.md: each experiment's own remarks (results/<experiment>/notes.md) follow its table."""
    parts = [HEAD]
    for path in sorted((ROOT / "results").glob("*/table.json")):
        parts.append(table(json.loads(path.read_text("utf-8"))))
        notes = path.with_name("notes.md")
        if notes.exists():
            parts.append(notes.read_text("utf-8"))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = ROOT / "RESULTS.md"
    if not args.check:
        path.write_text(results(), "utf-8")
    elif not path.exists() or path.read_text("utf-8") != results():
        sys.exit("RESULTS.md does not agree with results/*/table.json: run python -m benchmarks.results")


if __name__ == "__main__":
    main()

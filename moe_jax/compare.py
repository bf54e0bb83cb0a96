"""`moe-jax compare`: what differs between runs, in their configurations and in what they came to."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moe_jax.metrics.scoring import markdown
from moe_jax.partfile import unfit, write_text
from moe_jax.report import svg
from moe_jax.report.read import read_log
from moe_jax.sweep import rows_of

COLOURS = ("#1f4e79", "#c0504d", "#4f8f3c", "#8064a2", "#d98b28", "#3d9aa8", "#7a7a7a", "#b0307a")
BLOCKS = "▁▂▃▄▅▆▇█"
STYLE = """body { font: 14px sans-serif; margin: 2em; max-width: 1200px } table { border-collapse: collapse }
td, th { padding: 2px 10px; text-align: left; border-bottom: 1px solid #ddd } .charts { display: flex; flex-wrap: wrap }
figure { margin: 0 12px 12px 0; width: 360px } .tick { font-size: 10px; fill: #666 } .grid { stroke: #eee }
.line { fill: none; stroke-width: 1.5 } .band { opacity: 0.15 } """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="run folders, two or more")
    parser.add_argument("--output", metavar="HTML", help="a page with the tables and the curves of every metric, large")


def main(args: argparse.Namespace) -> int:
    """Runs `moe-jax compare`. Raises ValueError, in one line, for what is no run."""
    runs = names(args.runs)
    if len(runs) < 2:
        raise ValueError("give two runs or more")
    if args.output and (why := unfit(Path(args.output), overwrite=True)):
        raise ValueError(why)
    settings = differences({name: config(folder) for name, folder in runs.items()})
    scores = {name: {r["metric"]: r["value"] for r in rows_of({}, 0, folder)} for name, folder in runs.items()}
    first = table("setting", settings, runs) if settings else "The configurations are alike.\n"
    metrics = {
        m: {name: scores[name].get(m) for name in runs} for m in dict.fromkeys(m for s in scores.values() for m in s)
    }
    second = table("at the end", metrics, runs)
    paths = {name: folder / "metrics.jsonl" for name, folder in runs.items()}
    logs = {name: read_log(path, live=True) if path.exists() else {} for name, path in paths.items()}
    drawn = curves(logs)
    third = f"\n{table('curve', drawn, runs)}" if drawn else ""
    print(f"{first}\n{second}{third}", end="")
    if args.output:
        write_text(Path(args.output), page(settings, metrics, logs))
        print(f"\n{args.output}")
    elif drawn:
        print("\ncurves: give --output page.html")
    return 0


def names(given: Sequence[str]) -> dict[str, Path]:
    """Each run by the shortest end of its path that no other has."""
    paths = list(dict.fromkeys(Path(path).resolve() for path in given))
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        found = {"/".join(path.parts[-parts:]): path for path in paths}
        if len(found) == len(paths):
            return found
    raise AssertionError("paths that are distinct have distinct ends")


def config(folder: Path) -> dict[str, Any]:
    """What a run was made with, flat: name of a binding or setting -> value. Raises ValueError for what is no run."""
    try:
        said = json.loads((folder / "config.json").read_text("utf-8"))
        bound = {f"{selector}.{key}": v for selector, of in said.pop("config").items() for key, v in of.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder}: is no run's folder ({error}); it has no config.json that can be read") from None
    bound.pop("RUN_DIR/gin.macro.value", None)  # of course
    macros = {key.removesuffix("/gin.macro.value"): v for key, v in bound.items() if key.endswith("/gin.macro.value")}
    rest = {key: v for key, v in bound.items() if not key.endswith("/gin.macro.value")}
    return (
        macros | rest | {key: said[key] for key in ("model", "data", "families", "batch_size", "seed") if key in said}
    )


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Setting -> run -> value, of those that are not the same in all; of nested ones what is inside."""
    flat = {name: _flat(of) for name, of in configs.items()}
    keys = dict.fromkeys(key for of in flat.values() for key in of)
    out = {key: {name: of.get(key, "–") for name, of in flat.items()} for key in keys}
    return {
        key: values for key, values in out.items() if len({json.dumps(v, sort_keys=True) for v in values.values()}) > 1
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        out = {}
        for key, inner in value.items():
            out |= _flat(inner, f"{path}.{key}" if path else str(key))
        return out
    return {path: value}


def table(what: str, rows: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Any]) -> str:
    def said(value: Any) -> str:
        return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [(key, *(said(values[name]) for name in runs)) for key, values in rows.items()]
    return markdown([(what, *runs), ("---", *["---"] * len(runs)), *lines])


def curves(logs: Mapping[str, Mapping[int, Mapping[str, float]]], width: int = 16) -> dict[str, dict[str, Any]]:
    """Metric -> run -> its course in blocks, all runs of a metric on one scale and over the same steps, and its last
    value; None where a run has none."""
    out: dict[str, dict[str, Any]] = {}
    steps = [step for log in logs.values() for step in log]
    begin = min(steps, default=0)
    wide = max(steps, default=0) - begin or 1
    for metric in dict.fromkeys(m for log in logs.values() for row in log.values() for m in row):
        lines = {name: [(s, row[metric]) for s, row in log.items() if metric in row] for name, log in logs.items()}
        values = [y for points in lines.values() for _, y in points if math.isfinite(y)]
        low, span = min(values, default=0.0), (max(values, default=0.0) - min(values, default=0.0)) or 1.0
        out[metric] = dict.fromkeys(logs)
        for name, points in lines.items():
            if not points:
                continue
            places: list[list[float]] = [[] for _ in range(width)]
            for step, y in points:
                if math.isfinite(y):
                    places[min(width * (step - begin) // wide, width - 1)].append((y - low) / span)
            last = max((i for i, of in enumerate(places) if of), default=-1)
            drawn, height = "", " "
            for i, of in enumerate(places):  # between two points the line stays where it was
                height = BLOCKS[round(sum(of) / len(of) * (len(BLOCKS) - 1))] if of else height
                drawn += height if i <= last else " "
            out[metric][name] = f"`{drawn}` {points[-1][1]:.4g}"
    return out


def page(
    settings: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> str:
    """HTML: both tables, then a chart a metric with a line a run."""
    body = Markup("")
    for title, rows in (("What differs", settings), ("At the end", metrics)):
        head = Markup("").join(Markup("<th>{}</th>").format(name) for name in ("", *logs))
        lines = Markup("")
        for key, values in rows.items():
            shown = (f"{v:.4g}" if isinstance(v, float) else "–" if v is None else v for v in values.values())
            cells = Markup("").join(Markup("<td>{}</td>").format(v) for v in (key, *shown))
            lines += Markup("<tr>{}</tr>").format(cells)
        body += Markup("<h2>{}</h2><table><tr>{}</tr>{}</table>").format(title, head, lines)
    legend, style = Markup(""), STYLE
    for i, name in enumerate(logs):
        colour = COLOURS[i % len(COLOURS)]
        legend += Markup('<span style="color:{}">&#9632;</span> {} &nbsp; ').format(Markup(colour), name)
        style += f".run{i} {{ stroke: {colour}; fill: {colour} }} .line.run{i} {{ fill: none }} "
    charts = Markup("")
    for metric in dict.fromkeys(m for log in logs.values() for row in log.values() for m in row):
        lines = {
            name: [(float(s), row[metric]) for s, row in log.items() if metric in row] for name, log in logs.items()
        }
        values = [y for points in lines.values() for _, y in points if math.isfinite(y)]
        steps = [x for points in lines.values() for x, _ in points]
        if not values or min(steps) == max(steps):
            continue
        air = (max(values) - min(values)) * 0.05 or abs(max(values)) * 0.1 or 1.0
        series = [svg.Series(name, f"run{i}", points) for i, (name, points) in enumerate(lines.items()) if points]
        chart = svg.line_chart(
            series,
            x_range=(min(steps), max(steps)),
            y_range=(min(values) - air, max(values) + air),
            log_y=False,
            label=f"{metric} by step",
        )
        charts += Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(metric, chart)
    return str(
        Markup(
            '<!doctype html><meta charset="utf-8"><title>Runs compared</title><style>{}</style><h1>Runs compared</h1>'
            "{}<h2>Curves</h2><p>{}</p><div class=charts>{}</div>\n"
        ).format(Markup(style), body, legend, charts)
    )

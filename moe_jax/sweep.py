"""`moe-jax sweep`: a run for each point of a grid (or of a list) and each seed, and one table of what came of them."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from moe_jax.metrics.scoring import markdown
from moe_jax.partfile import write_text
from moe_jax.report import intervals
from moe_jax.report.read import read_log

Point = dict[str, str]  # binding -> value, as gin writes it
STOPS = (130, 143)  # exit codes of a run that was stopped, not of one that failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gin_file", action="append", required=True, help="of every run; may be repeated")
    add("--gin_bindings", action="append", default=[], metavar="NAME=VALUE", help="of every run; or --gin.NAME=VALUE")
    add("--grid", action="append", default=[], metavar="NAME=A,B,...", help="values to try; several make a grid")
    add("--points", metavar="FILE", help='instead of a grid: lines of JSON such as {"RATE": 0.001, "K": 2}')
    add("--seeds", nargs="+", type=int, default=[0], help="of each point (default: 0)")
    add("--output", required=True, metavar="FOLDER", help="of the runs, and of table.json, table.md and table.svg")
    add("--print", action="store_true", help="print the command of each run that is not finished, and run nothing")


def main(args: argparse.Namespace) -> int:
    """Runs `moe-jax sweep`. What is finished is not run again, what was stopped goes on.

    Returns 0, or 1 where a run failed (the others are done all the same). Raises ValueError, in one line.
    """
    points = listed(Path(args.points)) if args.points else grid(args.grid)
    if args.points and args.grid:
        raise ValueError("give --grid or --points, not both")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"gin_files": args.gin_file, "bindings": args.gin_bindings}
    _same(folder / "sweep.json", about)
    runs = {(i, seed): folder / f"{name(point)}-{seed}" for seed in args.seeds for i, point in enumerate(points)}
    failed = []
    for (i, seed), run in runs.items():
        if finished(run):
            continue
        given = [f"--gin_file={file}" for file in args.gin_file]
        given += [f"--gin_bindings={b}" for b in args.gin_bindings]
        given += [f"--gin_bindings={key}={value}" for key, value in points[i].items()]
        given += [f"--gin_bindings=RUN_DIR={run}", f"--gin_bindings=SEED={seed}"]
        command = [sys.executable, "-m", "moe_jax.main", *given]
        if args.print:
            print(shlex.join(["python", *command[1:]]))
            continue
        print(f"--- {run}", flush=True)
        if code := subprocess.run(command).returncode:
            if code in STOPS:
                print(f"stopped; the same command goes on with {run}", file=sys.stderr)
                return code
            failed.append(run)
            print(f"{run}: ended with {code}; going on with the others", file=sys.stderr)
        else:
            write_text(run / "finished.json", json.dumps({"point": points[i], "seed": seed}) + "\n")
    if args.print:
        return 0
    rows = [row for (i, seed), run in runs.items() if finished(run) for row in rows_of(points[i], seed, run)]
    if rows:
        write_text(folder / "table.json", json.dumps({**about, "rows": rows}, indent=1) + "\n")
        write_text(folder / "table.md", table(rows))
        write_text(folder / "table.svg", drawn(rows))
        print(f"{table(rows)}\n{folder}/table.json, table.md, table.svg")
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return int(bool(failed))


# --- which runs -------------------------------------------------------------------------------------------------------


def grid(given: Sequence[str]) -> list[Point]:
    """["A=1,2", "B=x,y"] -> four points. Commas within brackets and quotes belong to a value."""
    axes: dict[str, list[str]] = {}
    for one in given:
        key, equals, values = one.partition("=")
        if not equals or not key or not (found := _parted(values)):
            raise ValueError(f"--grid {one!r}: write NAME=VALUE,VALUE,...")
        if key in axes:
            raise ValueError(f"--grid: {key} is given twice")
        axes[key] = found
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _parted(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def listed(path: Path) -> list[Point]:
    """Raises ValueError, in one line, for what is no list of points."""
    points = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            point = json.loads(line)
            assert isinstance(point, dict) and point
        except (ValueError, AssertionError, RecursionError):
            raise ValueError(f'{path}:{number}: not a point; write one such as {{"RATE": 0.001}}') from None
        points.append({str(k): v if isinstance(v, str) else repr(v) for k, v in point.items()})
    if not points:
        raise ValueError(f"{path}: holds no points")
    return points


def name(point: Point) -> str:
    """A folder's name: the point itself where that is short and plain, with a digest where it is not."""
    plain = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()) or "base"
    short = re.sub(r"[^\w=,.+-]+", "_", plain)[:80]
    return short if short == plain else f"{short}.{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


def finished(run: Path) -> bool:
    return (run / "finished.json").exists() or (run / "scores.json").exists()


def _same(path: Path, about: Mapping[str, Any]) -> None:
    if not path.exists():
        write_text(path, json.dumps(about, indent=1) + "\n")
    elif json.loads(path.read_text("utf-8")) != about:
        raise ValueError(f"{path.parent}: holds a sweep of other gin files or bindings; give another --output")


# --- what came of them ------------------------------------------------------------------------------------------------


def rows_of(point: Point, seed: int, run: Path) -> list[dict[str, Any]]:
    """The scores of a run over whole sets, and its least validation loss."""
    out = []
    if (log := run / "metrics.jsonl").exists():
        losses = [row["valid/loss"] for row in read_log(log).values() if "valid/loss" in row]
        out += [("valid loss", min(losses))] if losses else []
    if (scores := run / "scores.json").exists():
        for row in json.loads(scores.read_text("utf-8"))["rows"]:
            value = row.get("corrected", row.get("value"))
            if row.get("set", "all") == "all" and value is not None:
                out.append((" ".join(row[key] for key in ("task", "decoding", "metric") if key in row), value))
    return [{"point": point, "seed": seed, "metric": metric, "value": value} for metric, value in out]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float, int]]]:
    """metric -> point -> (mean over seeds, half of its 95 % interval by Student's t: NaN of one seed, seeds)."""
    out: dict[str, dict[str, tuple[float, float, int]]] = {}
    for metric in dict.fromkeys(row["metric"] for row in rows):
        for point in dict.fromkeys(name(row["point"]) for row in rows):
            found = [r["value"] for r in rows if (r["metric"], name(r["point"])) == (metric, point)]
            if found:
                half = float("nan")
                if len(found) > 1:
                    half = float(stdtrit(len(found) - 1, 0.975) * np.std(found, ddof=1) / np.sqrt(len(found)))
                out.setdefault(metric, {})[point] = (float(np.mean(found)), half, len(found))
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A point a line, a metric a column: the mean over seeds ± half of its 95 % interval."""
    found = summary(rows)
    points = list(dict.fromkeys(name(row["point"]) for row in rows))

    def cell(metric: str, point: str) -> str:
        if point not in found[metric]:
            return ""
        mean, half, _ = found[metric][point]
        return f"{mean:.4g}" + (f" ± {half:.2g}" if np.isfinite(half) else "")

    seeds = {point: max(found[metric][point][2] for metric in found if point in found[metric]) for point in points}
    lines = [(point, str(seeds[point]), *(cell(metric, point) for metric in found)) for point in points]
    return markdown([("", "seeds", *found), ("---", *["--:"] * (1 + len(found))), *lines])


def drawn(rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG: a panel a metric, a line a point, its mean with its interval."""
    found = summary(rows)
    return intervals.panels({metric: {p: (m, h) for p, (m, h, _) in of.items()} for metric, of in found.items()})

"""`moe-jax sweep`: a run for each point of a grid (or of a list) and each seed, and one table of what came of them."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from moe_jax import main as jobs
from moe_jax.metrics.scoring import markdown
from moe_jax.partfile import lock, write_text
from moe_jax.report import intervals
from moe_jax.report.read import read_log, read_object

Point = dict[str, str]  # binding -> value, as gin writes it
OWN = {"SEED": "--seeds", "RUN_DIR": "--output"}  # what a sweep binds for each run
# Exit codes of a run that was stopped, not of one that failed: it saved and said so, or the signal ended it.
STOPS = {130: 130, 143: 143, -signal.SIGINT: 130, -signal.SIGTERM: 143}


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
    for binding in [*args.gin_bindings, *(key for point in points for key in point)]:
        if (own := OWN.get(key := binding.partition("=")[0].strip())) is not None:
            raise ValueError(f"{key} is the sweep's own: give {own}")
    names = [name(point) for point in points]
    if twice := [one for one in names if names.count(one) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    with nullcontext() if args.print else alone(folder):
        return _sweep(args, points, folder)


def _sweep(args: argparse.Namespace, points: Sequence[Point], folder: Path) -> int:
    about = {"gin_files": args.gin_file, "bindings": args.gin_bindings, "sha256": digests(args.gin_file)}
    _same(folder / "sweep.json", about)
    runs = {(i, seed): folder / f"{name(point)}-{seed}" for seed in args.seeds for i, point in enumerate(points)}
    failed: list[Path] = []
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
        print(f"--- {run} ({status(list(runs.values()), failed)})", flush=True)
        began = time.monotonic()
        code, stopped = _waited(command)
        (run / "failed.json").unlink(missing_ok=True)
        if not code:
            about_run = {"point": points[i], "seed": seed, "seconds": round(time.monotonic() - began, 1)}
            write_text(run / "finished.json", json.dumps(about_run) + "\n")
        if stop := stopped or STOPS.get(code):
            print(f"stopped; the same command goes on{f' with {run}' if code else ''}", file=sys.stderr)
            return stop
        if code:
            failed.append(run)
            if run.exists():
                write_text(run / "failed.json", json.dumps({"code": code}) + "\n")
            print(f"{run}: ended with {code}; going on with the others", file=sys.stderr)
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


@contextmanager
def alone(folder: Path) -> Generator[None]:
    """Raises ValueError where another sweep has the folder: two would run one point at once."""
    with (folder / "sweep.lock").open("w") as file:
        try:
            mine = lock(file)
        except OSError:  # a file system without locks
            mine = True
        if not mine:
            raise ValueError(f"{folder}: another sweep is running here; wait for it, or stop it")
        yield


def _waited(command: Sequence[str]) -> tuple[int, int]:
    """(its exit code; ours if a signal came meanwhile, else 0). A run saves when it is told to stop, however long that
    takes, so it is waited for: Ctrl-C it has from the terminal, a SIGTERM that came to us alone is passed on. So is a
    second Ctrl-C: a notebook's may come to us alone too."""
    caught = 0
    child: subprocess.Popen | None = None

    def note(signum: int, _: object) -> None:
        nonlocal caught
        if child and (caught or signum == signal.SIGTERM):
            child.send_signal(signum)
        caught = caught or signum

    # A handler, as what is ignored here would be ignored by the run too.
    in_main = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    try:
        child = subprocess.Popen(command)
        if caught:  # while it was being started
            child.send_signal(caught)
        code = child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return code, 128 + caught if caught else 0


def status(runs: Sequence[Path], failed: Sequence[Path] = ()) -> str:
    """ "7 of 12 done, about 40 min left", from the time that those took."""
    done = [run for run in runs if finished(run)]
    said = f"{len(done)} of {len(runs)} done" + (f", {len(failed)} failed" if failed else "")
    took = [_seconds(run) for run in done]
    known = [seconds for seconds in took if seconds is not None]
    if not known:
        return said
    left = sum(known) / len(known) * (len(runs) - len(done) - len(failed))
    return f"{said}, about {f'{max(left / 60, 1):.0f} min' if left < 5400 else f'{left / 3600:.1f} h'} left"


def _seconds(run: Path) -> float | None:
    try:
        return read_object(run / "finished.json").get("seconds")
    except ValueError:  # run by hand, from a printed command
        return None


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
    """A folder's name: the point itself where that is short, plain and the only one that reads so; else with a digest
    of the whole point."""
    plain = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()) or "base"
    short = re.sub(r"[^\w=,.+-]+", "_", plain)[:80]
    whole = all(not re.search("[.,=]", key) and not re.search("[,=]", value) for key, value in point.items())
    if short == plain and whole:
        return short
    return f"{short}.{hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:6]}"


def digests(files: Sequence[str]) -> dict[str, str]:
    """Of gin files and those that they include. Raises ValueError, in one line, for what is not there."""
    out: dict[str, str] = {}
    todo = list(files)
    while todo:
        file = todo.pop(0)
        if file in out:
            continue
        path = next((path for path in (Path(file), jobs.GIN / file) if path.is_file()), None)
        if path is None:
            raise ValueError(f"{file}: no such gin file, here or in {jobs.GIN}")
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
        out[file] = hashlib.sha256(text.encode()).hexdigest()
        todo += re.findall(r"^\s*include\s+[\"'](.+?)[\"']", text, re.MULTILINE)
    return out


def finished(run: Path) -> bool:
    """One that failed may have scores all the same; one by a printed command has nothing else."""
    return (run / "finished.json").exists() or ((run / "scores.json").exists() and not (run / "failed.json").exists())


def _same(path: Path, about: Mapping[str, Any]) -> None:
    """Raises ValueError for a folder whose runs were made otherwise: their scores would be taken for these."""
    if not path.exists():
        write_text(path, json.dumps(about, indent=1) + "\n")
        return
    said = read_object(path)
    if any(said.get(key) != about[key] for key in ("gin_files", "bindings")):
        raise ValueError(f"{path.parent}: holds a sweep of other gin files or bindings; give another --output")
    was, now = dict(said.get("sha256") or {}), about["sha256"]
    if edited := sorted(file for file in {**was, **now} if was.get(file) != now.get(file)):
        raise ValueError(
            f"{path.parent}: {', '.join(edited)} changed since this sweep began; undo that, or give another --output"
        )


# --- what came of them ------------------------------------------------------------------------------------------------


def rows_of(point: Point, seed: int, run: Path) -> list[dict[str, Any]]:
    """The scores of a run over whole sets, and its least validation loss. Raises ValueError for damaged files."""
    out: list[tuple[str, float]] = []
    if (log := run / "metrics.jsonl").exists():
        losses = [row["valid/loss"] for row in read_log(log, live=True).values() if "valid/loss" in row]
        out += [("valid loss", min(losses))] if losses else []
    if (scores := run / "scores.json").exists():
        found = read_object(scores).get("rows")
        for row in found if isinstance(found, list) else [None]:
            if not isinstance(row, dict):
                raise ValueError(f'{scores}: "rows" is not a list of objects')
            value = row.get("corrected", row.get("value"))
            if row.get("set", "all") == "all" and value is not None:
                metric = " ".join(str(row[key]) for key in ("task", "decoding", "metric") if key in row)
                if not isinstance(value, int | float):
                    raise ValueError(f"{scores}: the value of {metric} is not a number: {value!r}")
                out.append((metric, float(value)))
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

"""Run every arm of an experiment for several seeds, one after another, and leave `results/<experiment>/table.json`.

    python -m benchmarks.arms neko --seeds 0 1 2

An arm is a gin file of gin/experiments/<experiment>/. What a run leaves for the table, its scores and the word errors
of each test line, is kept in `results/<experiment>/runs/`: what is there is not run again, what was interrupted goes on
from runs/. Stop it when you like. The table has a row for each arm, seed, task, set and metric: the corrected value,
the 95 % interval of its relative change against the first pass and the p-value, and besides the arms the rows "first
pass", "oracle n-best" and "oracle compositional". Beside the rows stand comparisons of each two arms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kept
from moe_jax import partfile
from moe_jax.metrics import errors, significance
from moe_jax.metrics.normalisers import family_normaliser

ROOT = Path(__file__).resolve().parents[1]
BRANCHES = {"btm": "single"}  # arms made of the branches of another


def run_folder(experiment: str, arm: str, seed: int) -> Path:
    return Path("runs") / experiment / f"{arm}-{seed}"


def run_arm(experiment: str, arm: str, seed: int, extra: list[str]) -> None:
    """One arm, one seed, in a process of its own; nothing where it is kept already."""
    folder = run_folder(experiment, arm, seed)

    def make() -> dict[str, Any]:
        print(f"--- {arm}, seed {seed} -> {folder}", flush=True)
        command = [sys.executable, "-m", "moe_jax.main", f"--gin_file=experiments/{experiment}/{arm}.gin"]
        command += [f"--gin.RUN_DIR={folder}", f"--gin.SEED={seed}", *extra]
        if arm in BRANCHES:
            command += [f"--gin.BRANCHES={run_folder(experiment, BRANCHES[arm], seed)}"]
        if code := subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(code)
        return of_run(ROOT / folder)

    kept.once(experiment, f"{arm}-{seed}", make)


def of_run(folder: Path) -> dict[str, Any]:
    """What the table needs of a run folder: {"scores", "word_errors": task -> [errors, reference words]}."""
    scores = json.loads((folder / "scores.json").read_text("utf-8"))
    return {"scores": scores, "word_errors": {task: x.T.tolist() for task, x in word_errors(folder).items()}}


def read(experiment: str, arms: list[str], seeds: list[int]) -> dict[tuple[str, int], dict[str, Any]]:
    """(arm, seed) -> what `of_run` found, of the runs that are kept."""
    runs = {(arm, seed): kept.read(experiment, f"{arm}-{seed}") for arm in arms for seed in seeds}
    return {run: found for run, found in runs.items() if found}


def rows_of(arm: str, seed: int, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `scores.json` in the form of the evidence tables."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "task": row["task"],
            "set": row["set"],
            "metric": row["metric"],
            "value": row["corrected"],
            "relative_change": row["relative_change"],
            "ci95": row["ci95"],
            "p_value": row["p_value"],
            "fixed": row["fixed"],
            "broken": row["broken"],
            "lines": row["lines"],
        }
        for row in scores["rows"]
    ]


def references_of(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """First pass and oracles: they belong to the test set, not to an arm or a seed."""
    names = {"first pass": "first_pass", "oracle n-best": "oracle_nb", "oracle compositional": "oracle_cp"}
    none = {"relative_change": None, "ci95": None, "p_value": None, "fixed": None, "broken": None}
    return [
        {
            "arm": arm,
            "seed": None,
            "task": row["task"],
            "set": row["set"],
            "metric": row["metric"],
            "value": row[key],
            **none,
            "lines": row["lines"],
        }
        for arm, key in names.items()
        for row in scores["rows"]
        if row[key] is not None
    ]


def word_errors(folder: Path) -> dict[str, np.ndarray]:
    """task -> Nx2 (word errors, reference words) of a run's corrected test lines, in the order of the files."""
    with open(folder / "examples.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    out = {}
    for task in dict.fromkeys(line["task"] for line in lines):
        mine, normaliser = [line for line in lines if line["task"] == task], family_normaliser(task)
        counts = errors.line_errors([x["reference"] for x in mine], [x["correction"] for x in mine], normaliser)
        out[task] = np.array([(c.errors, c.reference_length) for c in counts])
    return out


def comparisons(runs: dict[tuple[str, int], dict[str, Any]], arms: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """Each two arms on the same test lines, the word errors of a line summed over the seeds that both have."""
    out = []
    found_in = {run: {task: np.array(x).T for task, x in found["word_errors"].items()} for run, found in runs.items()}
    for arm, against in itertools.combinations(arms, 2):
        both = [seed for seed in seeds if (arm, seed) in found_in and (against, seed) in found_in]
        if not both:
            continue
        ours, theirs = ([found_in[a, s] for s in both] for a in (arm, against))
        for task in ours[0]:
            before, after = (np.sum([x[task] for x in one], axis=0) for one in (theirs, ours))
            found = significance.compare(before, after)
            out.append(
                {
                    "arm": arm,
                    "against": against,
                    "seeds": both,
                    "task": task,
                    "metric": "wer",
                    "relative_change": found.relative_change,
                    "ci95": found.ci95,
                    "p_value": found.p_value,
                }
            )
    return out


def collect(experiment: str, arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """The table of all finished runs."""
    rows: list[dict[str, Any]] = []
    meta: dict[str, Any] = {}
    runs = read(experiment, arms, seeds)
    for (arm, seed), found in runs.items():
        scores = found["scores"]
        rows += ([] if rows else references_of(scores)) + rows_of(arm, seed, scores)
        meta = {"split": scores["meta"]["split"], "date": max(scores["meta"]["date"], meta.get("date", ""))}
    command = f"python -m benchmarks.arms {experiment} --arms {' '.join(arms)} --seeds {' '.join(map(str, seeds))}"
    about = {"experiment": experiment, "meta": {**meta, "command": command}}
    return {**about, "rows": rows, "comparisons": comparisons(runs, arms, seeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", help="a folder of gin/experiments")
    parser.add_argument("--arms", nargs="+", help="some of them (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    args, extra = parser.parse_known_args()
    folder = ROOT / "gin" / "experiments" / args.experiment
    arms = args.arms or sorted(p.stem for p in folder.glob("*.gin"))
    if not arms:
        sys.exit(f"{folder}: no such experiment, or no gin file in it")
    if not args.collect:
        for seed in args.seeds:  # seed by seed, so that every arm has one first
            for arm in arms:
                run_arm(args.experiment, arm, seed, extra)
    out = ROOT / "results" / args.experiment / "table.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(out, json.dumps(collect(args.experiment, arms, args.seeds), indent=1) + "\n")
    print(f"{out.relative_to(ROOT)} written; now python -m benchmarks.results")


if __name__ == "__main__":
    main()

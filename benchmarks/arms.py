"""Run every arm of an experiment for several seeds, one after another, and leave `results/<experiment>/table.json`.

    python -m benchmarks.arms neko --seeds 0 1 2

An arm is a gin file of gin/experiments/<experiment>/. What a run leaves for the table, its scores and the word errors
of each test line, is kept in `results/<experiment>/runs/`: what is there is not run again, what was interrupted goes on
from runs/. Stop it when you like. The table has a row for each arm, seed, task, set and metric: the corrected value,
the 95 % interval of its relative change against the first pass and the p-value, and besides the arms the rows "first
pass", "oracle n-best" and "oracle compositional". Metrics are those of the family, and `nll`, the nats a token of the
references as corrections, which tells arms apart that few lines' word errors cannot. Of mixtures there are `agreement`,
how often free routing chooses the task's mapped expert, `told apart` (`report.atlas`), and a picture, routing.svg.
Beside the rows stand comparisons of the arms with one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kept
from benchmarks.launch import launch
from moe_jax import partfile
from moe_jax.metrics import errors, significance
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.report.atlas import told_apart
from moe_jax.report.heatmap import heat_maps

ROOT = Path(__file__).resolve().parents[1]
BRANCHES = {"btm": "single"}  # arms made of the branches of another
NONE = dict.fromkeys(("relative_change", "ci95", "p_value", "fixed", "broken"))  # of rows that change no first pass


def run_folder(experiment: str, arm: str, seed: int) -> Path:
    return Path("runs") / experiment / f"{arm}-{seed}"


def make_base() -> Path:
    """The run folder of what correctors start from (gin/runs/noise.gin), made where it is not."""
    noise, base = ROOT / "prepared" / "denoise", ROOT / "runs" / "noise"
    if (base / "model.safetensors").exists():
        return base
    own = {k: v for k, v in os.environ.items() if k != "MOE_JAX_DATA"}  # the same base, whatever its arms learn
    if not noise.exists():
        command = [sys.executable, "-m", "moe_jax.tasks.builders.denoise", str(noise), "--passes", "2"]
        subprocess.run(command, cwd=ROOT, check=True, env=own)
    launch(["runs/noise.gin"], {}, env={**own, "MOE_JAX_DENOISE": str(noise)})
    return base


def run_arm(experiment: str, arm: str, seed: int, extra: list[str]) -> None:
    """One arm, one seed, in a process of its own; nothing where it is kept already."""
    folder = run_folder(experiment, arm, seed)

    def make() -> dict[str, Any]:
        if experiment.startswith("neko"):
            make_base()
        print(f"--- {arm}, seed {seed} -> {folder}", flush=True)
        about: dict[str, Any] = {"RUN_DIR": folder, "SEED": seed}
        if arm in BRANCHES:
            about["BRANCHES"] = run_folder(experiment, BRANCHES[arm], seed)
        launch([f"experiments/{experiment}/{arm}.gin"], about, extra)
        return of_run(ROOT / folder)

    kept.once(experiment, f"{arm}-{seed}", make)


def of_run(folder: Path) -> dict[str, Any]:
    """What the table needs of a run folder: {"scores", "routing" (None of a dense model), and of each task's test lines
    "word_errors": task -> [errors, reference words], "nll": task -> [nats, tokens]}."""
    with open(folder / "examples.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    routing = folder / "routing.json"
    found: dict[str, Any] = {
        "scores": json.loads((folder / "scores.json").read_text("utf-8")),
        "routing": json.loads(routing.read_text("utf-8")) if routing.exists() else None,
        "word_errors": {},
        "nll": {},
    }
    for task in dict.fromkeys(line["task"] for line in lines):
        mine, normaliser = [line for line in lines if line["task"] == task], family_normaliser(task)
        counts = errors.line_errors([x["reference"] for x in mine], [x["correction"] for x in mine], normaliser)
        found["word_errors"][task] = [[c.errors for c in counts], [c.reference_length for c in counts]]
        scored = [(round(x["reference_nll"] or 0.0, 3), x["reference_tokens"] or 0) for x in mine]
        found["nll"][task] = [list(x) for x in zip(*scored, strict=True)]
    return found


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
    return [
        {
            "arm": arm,
            "seed": None,
            "task": row["task"],
            "set": row["set"],
            "metric": row["metric"],
            "value": row[key],
            **NONE,
            "lines": row["lines"],
        }
        for arm, key in names.items()
        for row in scores["rows"]
        if row[key] is not None
    ]


METRICS = {"wer": "word_errors", "nll": "nll"}  # what is compared: its name, and what is kept of each line
MEAN = "mean"  # of the families, each counting alike


def of_lines(found: dict[str, Any], metric: str) -> dict[str, np.ndarray]:
    """task -> Nx2, errors (or nats) of each test line and what they are a share of; `MEAN`: all families' lines,
    weighed so that their quotient is the mean of the families'."""
    out = {task: np.array(x, float).T for task, x in found[METRICS[metric]].items()}
    weighed = [x / x[:, 1].sum() for x in out.values()]
    return {**out, MEAN: np.concatenate(weighed)}


def likelihoods(arm: str, seed: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run that its scores do not hold: nll, and what its routing does."""
    about = {"arm": arm, "seed": seed, "set": "all", **NONE}
    rows = []
    for task, lines in of_lines(found, "nll").items():
        nats, tokens = lines.sum(0)
        rows.append({**about, "task": task, "metric": "nll", "value": nats / tokens})
    if routing := found["routing"]:
        for task, share in routing.get("agreement", {}).items():
            rows.append({**about, "task": task, "metric": "agreement", "value": share})
        apart = float(np.mean([told_apart(load) for load in routing["load"]]))
        rows.append({**about, "task": "all", "metric": "told apart", "value": apart})
    return rows


def comparisons(
    runs: dict[tuple[str, int], dict[str, Any]], arms: list[str], seeds: list[int], against: str
) -> list[dict[str, Any]]:
    """Each arm with `against` on the same test lines: what a line has is summed over the seeds that both have. "alike":
    in how many seeds the change has the sign that all have together."""
    out = []
    for arm in arms:
        both = [seed for seed in seeds if (arm, seed) in runs and (against, seed) in runs]
        for metric in METRICS if both and arm != against else ():
            after, before = ([of_lines(runs[a, seed], metric) for seed in both] for a in (arm, against))
            for task in after[0]:
                pairs = [(b[task], a[task]) for b, a in zip(before, after, strict=True)]
                change = significance.compare(*np.sum(pairs, axis=0))
                signs = [np.sign(a[:, 0].sum() - b[:, 0].sum()) for b, a in pairs]
                alike = sum(bool(sign == np.sign(change.relative_change)) for sign in signs)
                out.append(
                    {
                        "arm": arm,
                        "against": against,
                        "seeds": both,
                        "task": task,
                        "metric": metric,
                        "relative_change": change.relative_change,
                        "ci95": change.ci95,
                        "p_value": change.p_value,
                        "alike": alike,
                    }
                )
    return out


def picture(runs: dict[tuple[str, int], dict[str, Any]], arms: list[str], seed: int) -> str | None:
    """An SVG of who uses which experts: a row of panels an arm. None without mixtures."""
    parts = {}
    for arm in arms:
        if routing := runs.get((arm, seed), {}).get("routing"):
            parts[arm] = {"tasks": routing["tasks"], "load": routing["load"]}
    return heat_maps(parts) if parts else None


def collect(
    experiment: str, runs: dict[tuple[str, int], dict[str, Any]], arms: list[str], seeds: list[int], against: str
) -> dict[str, Any]:
    """The table of all finished runs, as `read` has them."""
    rows: list[dict[str, Any]] = []
    meta: dict[str, Any] = {}
    for (arm, seed), found in runs.items():
        scores = found["scores"]
        rows += [] if rows else references_of(scores)
        rows += [*rows_of(arm, seed, scores), *likelihoods(arm, seed, found)]
        meta = {"split": scores["meta"]["split"], "date": max(scores["meta"]["date"], meta.get("date", ""))}
    command = f"python -m benchmarks.arms {experiment} --arms {' '.join(arms)} --seeds {' '.join(map(str, seeds))}"
    about = {"experiment": experiment, "meta": {**meta, "command": command}}
    return {**about, "rows": rows, "comparisons": comparisons(runs, arms, seeds, against)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", help="a folder of gin/experiments")
    parser.add_argument("--arms", nargs="+", help="some of them (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--against", help="the arm that the others are compared with (default: the first)")
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
    runs = read(args.experiment, arms, args.seeds)
    made = collect(args.experiment, runs, arms, args.seeds, args.against or arms[0])
    partfile.write_text(out, json.dumps(made, indent=1) + "\n")
    if drawn := picture(runs, arms, args.seeds[0]):
        partfile.write_text(out.with_name("routing.svg"), drawn)
    print(f"{out.relative_to(ROOT)} written; now python -m benchmarks.results")


if __name__ == "__main__":
    main()

"""Merge the corrector tuned on four families apart by every method, score it, and leave results/merging/table.json.

    python -m benchmarks.merging --seeds 0 1 2

Trains the arms of gin/experiments/merging (separate, joint, sequential) where they are not finished, chooses each
method's scale on validation data, merges, and scores on test data without the guard: text by word error rate, and the
mean negative log-likelihood a token (nll). What is finished (results/merging/runs) is not done again:
stop it when you like.

The normalised performance (npf) of a merge is ours (the paper's formula is not known), of means over families:

    (nll of the base - nll of the merge) / (nll of the base - nll of the families' own models)

1 is as good as the families' own models, 0 no better than the base. (A family's own quotient says nothing where its
model hardly gains on the base, or loses.) Interference is the nll of the merge minus that of the family's own model.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kept
from moe_jax import evaluate, main, partfile, prepare
from moe_jax.branches import FAMILIES
from moe_jax.merging import experts, merge, search, statistics
from moe_jax.merging.methods import METHODS
from moe_jax.metrics import errors, significance
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "merging"
SCALES = [0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
FIXED = {"average": [1.0], "fisher": [1.0], "regmean": [1.0]}  # means of weights: there is nothing to scale
AUTHORS = {"lors": {}, "magnitude": {}, "singular_values": {}}  # besides, as the authors had them
THEIRS = ", authors' settings"
EXPERTS = "experts, task known"


def slug(arm: str) -> str:
    """An arm's name as that of a file."""
    return re.sub(r"\W+", "_", arm)


def train(arm: str, seed: int) -> Path:
    """The run folder of an arm of gin/experiments/merging, trained if it is not."""
    folder = RUNS / f"{arm}-{seed}"
    last = {"joint": folder}.get(arm, folder / FAMILIES[-1])
    if not (last / "model.safetensors").exists():
        print(f"--- {arm}, seed {seed} -> {folder}", flush=True)
        command = [sys.executable, "-m", "moe_jax.main", f"--gin_file=experiments/merging/{arm}.gin"]
        command += [f"--gin.RUN_DIR={folder.relative_to(ROOT)}", f"--gin.SEED={seed}"]
        if code := subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(code)
    return last


def arms(methods: Sequence[str]) -> list[str]:
    """All that is compared: what was trained, and each method's merges."""
    own = [f"separate/{family}" for family in FAMILIES]
    merged = [arm for name in methods for arm in (name, f"{name}{THEIRS}") if arm == name or name in AUTHORS]
    return ["base", *own, "joint", "sequential", *merged, EXPERTS]


def candidate(arm: str, seed: int, loss: search.Loss) -> Path:
    """The arm's checkpoint, made if it is not. `loss`: on validation data, by which a method's scale is chosen."""
    if arm == "base":
        return Path(main.shipped("base.safetensors"))
    if arm in ("joint", "sequential"):
        return train(arm, seed)
    own = {family: train("separate", seed).parent / family for family in FAMILIES}
    if arm.startswith("separate/"):
        return own[arm.removeprefix("separate/")]
    made = RUNS / f"merged-{seed}"
    made.mkdir(parents=True, exist_ok=True)
    output = made / f"{slug(arm)}.safetensors"
    if output.exists():
        return output
    if arm == EXPERTS:
        experts.to_experts(str(output), models={family: str(path) for family, path in own.items()})
        return output
    name = arm.removesuffix(THEIRS)
    models: list[Any] = [str(path) for path in own.values()]
    if kind := METHODS[name].statistics:
        models = [{"path": p, "statistics": s} for p, s in zip(models, _statistics(kind, own, made), strict=True)]
    if name == "slerp":  # of two and two
        models = [{"merge": {"method": "slerp", "models": pair}} for pair in (models[:2], models[2:])]
    recipe: dict[str, Any] = {"base": main.shipped("base.safetensors"), "models": models, "method": name}
    if arm == name:
        space = {"scale": FIXED.get(name, SCALES)}
        folder = str(made / f"{name}.search")
        found = search.search(folder, recipe=recipe, space=space, valid=loss.data, loss=loss)
        print(f"{name}: {found.options}, valid nll {found.loss:.4f}", flush=True)
        recipe["options"] = found.options
    merge.merge(str(output), **recipe)
    return output


def _statistics(kind: str, own: dict[str, Path], made: Path) -> list[str]:
    out = []
    for family, path in own.items():
        output = made / f"{family}.{kind}.safetensors"
        if not output.exists():
            statistics.gather(str(path), str(ROOT / "prepared" / f"correct_all_{family}"), kind, str(output), rows=64)
        out.append(str(output))
    return out


def scored(arm: str, seed: int, path: Path, nll: search.Loss) -> dict[str, Any]:
    """{"nll": family -> nll, "word_errors": family -> those of each test line}: what `kept` keeps."""
    families = [arm.split("/")[1]] if arm.startswith("separate/") else list(FAMILIES)
    print(f"--- scoring {arm}, seed {seed}", flush=True)
    counts = {}
    for family in families:
        pipeline = Pipeline.load(path, task=family if arm == EXPERTS else None)
        records, rows = evaluate.read_rows(main.corpus("test", [family]))
        texts = [p.guarded(-math.inf).text for p in evaluate.propose(pipeline, records)]
        counts[family] = [c.errors for c in _compared(rows, texts, family)]
    return {
        "nll": {f: x for f, x in nll.by_family(str(path)).items() if f in families},
        "word_errors": counts,
        "date": datetime.date.today().isoformat(),
    }


def _compared(rows: list[dict[str, Any]], texts: list[str], family: str) -> list[errors.ErrorCounts]:
    return errors.line_errors([row["reference"] for row in rows], texts, family_normaliser(family))


def table(found: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """The evidence table. `found`: (arm, seed) -> what `scored` returns."""
    first = {}
    for family in FAMILIES:
        _, lines = evaluate.read_rows(main.corpus("test", [family]))
        compared = _compared(lines, [line["hypotheses"][0] for line in lines], family)
        first[family] = np.array([(c.errors, c.reference_length) for c in compared])
    arms = dict.fromkeys("separate" if arm.startswith("separate/") else arm for arm, _ in found)

    def of(arm: str, seed: int, family: str) -> dict[str, Any]:
        return found[f"separate/{family}" if arm == "separate" else arm, seed]

    def counts(run: dict[str, Any], family: str) -> np.ndarray:
        return np.stack([run["word_errors"][family], first[family][:, 1]], 1)

    rows: list[dict[str, Any]] = []
    nothing = {"ci95": None, "p_value": None}
    for family in FAMILIES:
        n = first[family]
        about = {"arm": "first pass", "seed": None, "task": family, "set": "all", "metric": "wer"}
        rows.append({**about, "value": n[:, 0].sum() / n[:, 1].sum(), **nothing})
    for arm, seed in itertools.product(arms, seeds):
        about, nlls = {"arm": arm, "seed": seed, "set": "all"}, []
        for family in FAMILIES:
            try:
                mine = of(arm, seed, family)
            except KeyError:
                break
            n = counts(mine, family)
            change = significance.compare(counts(of("joint", seed, family), family), n)
            about["task"] = family
            rows.append(
                {
                    **about,
                    "metric": "wer",
                    "value": n[:, 0].sum() / n[:, 1].sum(),
                    "relative_change": change.relative_change,  # against the joint model
                    "ci95": change.ci95,
                    "p_value": change.p_value,
                }
            )
            nll, base, own = (of(a, seed, family)["nll"][family] for a in (arm, "base", "separate"))
            nlls.append((nll, base, own))
            rows.append({**about, "metric": "nll", "value": nll, **nothing})
            rows.append({**about, "metric": "interference", "value": nll - own, **nothing})
        else:
            nll, base, own = np.mean(nlls, axis=0)
            rows.append({**about, "task": "mean", "metric": "npf", "value": (base - nll) / (base - own), **nothing})
    command = f"python -m benchmarks.merging --seeds {' '.join(map(str, seeds))}"
    meta = {"split": "test", "date": max(run["date"] for run in found.values()), "command": command}
    return {"experiment": "merging", "meta": meta, "rows": rows}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    args = parser.parse_args()
    found = {}
    losses = [search.Loss(str(ROOT / "prepared" / f"correct_all.{split}")) for split in ("valid", "test")]
    for loss, split in zip(losses, ("valid", "test"), strict=True):
        if not args.collect:
            prepare.prepare(
                loss.data, mixture="correct_all", tokeniser=main.shipped("tokeniser.model"), split=split, passes=1
            )
    valid, test = losses
    for seed, arm in itertools.product(args.seeds, arms(args.methods)):
        name = f"{slug(arm)}-{seed}"
        if run := kept.read("merging", name):
            found[arm, seed] = run
        elif not args.collect:
            found[arm, seed] = scored(arm, seed, candidate(arm, seed, valid), test)
            kept.write("merging", name, found[arm, seed])
    output = ROOT / "results" / "merging" / "table.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(output, json.dumps(table(found, args.seeds), indent=1) + "\n")


if __name__ == "__main__":
    run()

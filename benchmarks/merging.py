"""Merge the corrector tuned on four families apart by every method, score it, and leave results/merging/table.json.

    python -m benchmarks.merging --seeds 0 1 2

Trains the arms of gin/experiments/merging (separate, joint, sequential) where they are not finished, chooses each
method's scale on validation data, merges, and scores on test data without the guard: text by word error rate, and the
mean negative log-likelihood a token (nll). What is finished is not done again: stop it when you like.

The normalised performance (npf) of a merge on a family is ours (the paper's formula is not known):

    (nll of the base - nll of the merge) / (nll of the base - nll of the family's own model)

1 is as good as the family's own model, 0 no better than the base; "mean" is that over families. Interference is the
nll of the merge minus that of the family's own model.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import evaluate, main, partfile, prepare
from moe_jax.branches import FAMILIES
from moe_jax.merging import experts, merge, search, statistics
from moe_jax.merging.methods import METHODS
from moe_jax.metrics import errors, significance
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "merging"
SCALES = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
FIXED = {"average": [1.0], "fisher": [1.0], "regmean": [1.0]}  # means of weights: there is nothing to scale
AUTHORS = {"lors": {}, "magnitude": {}, "singular_values": {}}  # besides, as the authors had them
TRAINED = ("separate", "joint", "sequential")


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


def candidates(seed: int, names: list[str]) -> dict[str, Path]:
    """arm -> checkpoint: the base, what was trained, and every merge of the separate models."""
    base = Path(main.shipped("base.safetensors"))
    separate = train("separate", seed).parent
    own = {family: separate / family for family in FAMILIES}
    out = {"base": base, "joint": train("joint", seed), "sequential": train("sequential", seed)}
    made = RUNS / f"merged-{seed}"
    made.mkdir(parents=True, exist_ok=True)
    stats = {kind: _statistics(kind, own, made) for kind in ("fisher", "gram")}
    valid = str(ROOT / "prepared" / "correct_all.valid")
    loss = search.Loss(valid)
    for name in names:
        models: list[Any] = [str(path) for path in own.values()]
        if kind := METHODS[name].statistics:
            models = [{"path": p, "statistics": s} for p, s in zip(models, stats[kind], strict=True)]
        if name == "slerp":  # of two and two
            pairs = [models[:2], models[2:]]
            models = [{"merge": {"method": "slerp", "models": pair}} for pair in pairs]
        recipe: dict[str, Any] = {"base": str(base), "models": models, "method": name}
        output = made / f"{name}.safetensors"
        if not output.exists():
            space = {"scale": FIXED.get(name, SCALES)}
            found = search.search(str(made / f"{name}.search"), recipe=recipe, space=space, valid=valid, loss=loss)
            print(f"{name}: {found.options}, valid nll {found.loss:.4f}", flush=True)
            merge.merge(str(output), **recipe, options=found.options)
        out[name] = output
        if name in AUTHORS:
            output = made / f"{name}.authors.safetensors"
            if not output.exists():
                merge.merge(str(output), **recipe)
            out[f"{name}, authors' settings"] = output
    mixed = made / "experts.safetensors"
    if not mixed.exists():
        experts.to_experts(str(mixed), models={family: str(path) for family, path in own.items()})
    return out | {"experts, task known": mixed} | {f"separate/{family}": path for family, path in own.items()}


def _statistics(kind: str, own: dict[str, Path], made: Path) -> list[str]:
    out = []
    for family, path in own.items():
        output = made / f"{family}.{kind}.safetensors"
        if not output.exists():
            statistics.gather(str(path), str(ROOT / "prepared" / f"correct_all_{family}"), kind, str(output), rows=64)
        out.append(str(output))
    return out


def scored(arm: str, seed: int, path: Path, nll: search.Loss) -> dict[str, Any]:
    """{"nll": family -> nll, "texts": family -> corrections}, kept beside the runs."""
    kept = RUNS / f"scores-{seed}" / f"{arm.replace('/', '.').replace(' ', '_')}.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))
    families = [arm.split("/")[1]] if arm.startswith("separate/") else list(FAMILIES)
    print(f"--- scoring {arm}, seed {seed}", flush=True)
    texts = {}
    for family in families:
        pipeline = Pipeline.load(path, task=family if arm == "experts, task known" else None)
        records, _ = evaluate.read_rows(main.corpus("test", [family]))
        texts[family] = [p.guarded(-math.inf).text for p in evaluate.propose(pipeline, records)]
    found = {"nll": {f: x for f, x in nll.by_family(str(path)).items() if f in families}, "texts": texts}
    kept.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(kept, json.dumps(found, ensure_ascii=False))
    return found


def table(found: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """The evidence table. `found`: (arm, seed) -> what `scored` returns."""
    references, first = {}, {}
    for family in FAMILIES:
        _, rows = evaluate.read_rows(main.corpus("test", [family]))
        references[family] = [row["reference"] for row in rows]
        first[family] = [row["hypotheses"][0] for row in rows]
    arms = dict.fromkeys("separate" if arm.startswith("separate/") else arm for arm, _ in found)

    def of(arm: str, seed: int, family: str) -> dict[str, Any]:
        return found[f"separate/{family}" if arm == "separate" else arm, seed]

    def counts(texts: list[str], family: str) -> np.ndarray:
        lines = errors.line_errors(references[family], texts, family_normaliser(family))
        return np.array([(c.errors, c.reference_length) for c in lines])

    rows: list[dict[str, Any]] = []
    nothing = {"ci95": None, "p_value": None}
    for family in FAMILIES:
        n = counts(first[family], family)
        about = {"arm": "first pass", "seed": None, "task": family, "set": "all", "metric": "wer"}
        rows.append({**about, "value": n[:, 0].sum() / n[:, 1].sum(), **nothing})
    for arm, seed in itertools.product(arms, seeds):
        about, npf = {"arm": arm, "seed": seed, "set": "all"}, []
        for family in FAMILIES:
            try:
                mine = of(arm, seed, family)
            except KeyError:
                break
            n = counts(mine["texts"][family], family)
            change = significance.compare(counts(of("joint", seed, family)["texts"][family], family), n)
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
            npf.append((base - nll) / (base - own))
            rows.append({**about, "metric": "nll", "value": nll, **nothing})
            rows.append({**about, "metric": "npf", "value": npf[-1], **nothing})
            rows.append({**about, "metric": "interference", "value": nll - own, **nothing})
        else:
            rows.append({**about, "task": "mean", "metric": "npf", "value": float(np.mean(npf)), **nothing})
    command = f"python -m benchmarks.merging --seeds {' '.join(map(str, seeds))}"
    meta = {"split": "test", "date": datetime.date.today().isoformat(), "command": command}
    return {"experiment": "merging", "meta": meta, "rows": rows}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    test = str(ROOT / "prepared" / "correct_all.test")
    found = {}
    for seed in args.seeds:
        arms = candidates(seed, args.methods)  # trains, which prepares the data
        prepare.prepare(test, mixture="correct_all", tokeniser=main.shipped("tokeniser.model"), split="test", passes=1)
        nll = search.Loss(test)
        for arm, path in arms.items():
            found[arm, seed] = scored(arm, seed, path, nll)
        output = ROOT / "results" / "merging" / "table.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        partfile.write_text(output, json.dumps(table(found, args.seeds[: args.seeds.index(seed) + 1]), indent=1) + "\n")
        print(f"{output} holds seeds {args.seeds[: args.seeds.index(seed) + 1]}", flush=True)


if __name__ == "__main__":
    run()

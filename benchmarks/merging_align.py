"""When the experts of models must be put in one order before these merge; leaves results/merging_align/table.json.

    python -m benchmarks.merging_align --seeds 0 1 2

One dense base becomes a mixture of 4 experts several times, each with a router of its own (gin/experiments/merging/
mixture.gin), and each is trained on all four families. Which expert learns what is then chance: the mean of two such
models is of experts that have little to do with each other. Every pair is averaged with the experts as they are, in
the order of the first's (`align`), and, to know how bad an order can be, in another at random. Values are test nll, a
mean over the families; of the arm `alone`, of one model. What is finished (results/merging_align/runs) is not done
again.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import kept
from benchmarks.arms import make_base
from benchmarks.merging_settings import ROOT, Corrector, Nll, trained
from moe_jax import checkpoint, launch, partfile
from moe_jax.merging import merge, models
from moe_jax.merging.align import orders

EXPERIMENT = "merging_align"
ARMS = ("as they are", "aligned", "shuffled")


def model(seed: int) -> Path:
    """The run folder of a mixture, trained where it is not."""
    make_base()
    about = {"RUN_DIR": f"runs/merging/mixture-{seed}", "SEED": seed}
    return trained("experiments/merging/mixture.gin", about)


def averaged(first: Path, second: Path, arm: str) -> Path:
    """Their mean."""
    output = ROOT / "runs" / "merging" / f"{first.name}.{second.name}.{arm.replace(' ', '_')}.safetensors"
    if not output.exists():
        if arm == "shuffled":
            second = shuffled(second)
        two = [str(first), str(second)]
        merge.merge(str(output), base=str(first), models=two, method="average", align=arm == "aligned")
    return output


def shuffled(path: Path) -> Path:
    """The same model with the experts of each layer in another order, none where it was."""
    output = path.with_name(f"{path.name}.shuffled.safetensors")
    table, meta = checkpoint.read_safetensors(str(path))
    made = dict(table)
    for name, x in table.items():
        if "/experts/" in name:
            made[name] = jax.numpy.roll(x, 1, axis=1)  # layer, expert, ...
        elif "/router/" in name and x.ndim == 3:
            made[name] = jax.numpy.roll(x, 1, axis=-1)
    checkpoint.write_safetensors(str(output), made, meta)
    return output


def moved(first: Path, second: Path) -> float:
    """The share of the second's experts that `align` takes from their places."""
    found = orders(*(models.open_model(str(path)) for path in (first, second)))
    order_NxE = next(iter(found.values()), None)
    return 0.0 if order_NxE is None else float(np.mean(order_NxE != np.arange(order_NxE.shape[1])))


def scored(first: int, second: int, test: Nll) -> dict[str, Any]:
    """What `kept` keeps of a pair: {"nll": arm -> task -> nll, "moved", "date"}."""
    pair = [model(seed) for seed in (first, second)]
    found = {arm: test(str(averaged(*pair, arm))) for arm in ARMS}
    return {"nll": found, "moved": moved(*pair), "date": datetime.date.today().isoformat()}


def alone(seed: int, test: Nll) -> dict[str, Any]:
    return {"nll": {"alone": test(str(model(seed)))}, "date": datetime.date.today().isoformat()}


def table(found: dict[str, dict[str, Any]], command: str) -> dict[str, Any]:
    """The evidence table. `found`: "0" or "0-1" -> what is kept."""
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        for arm, nll in one["nll"].items():
            mean = {"mean": float(np.mean(list(nll.values())))}
            for task, value in {**nll, **mean}.items():
                about = {"arm": arm, "seed": name, "task": task, "set": "all", "metric": "nll"}
                rows.append({**about, "value": value, "ci95": None, "p_value": None})
        if "moved" in one:
            about = {"arm": "aligned", "seed": name, "task": "mean", "set": "all", "metric": "moved"}
            rows.append({**about, "value": one["moved"], "ci95": None, "p_value": None})
    meta = {"split": "test", "date": max(one["date"] for one in found.values()), "command": command}
    return {"experiment": EXPERIMENT, "meta": meta, "rows": rows}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    args = parser.parse_args()
    os.chdir(ROOT)
    names: dict[str, tuple[int, ...]] = {str(seed): (seed,) for seed in args.seeds}
    names |= {f"{a}-{b}": (a, b) for a, b in itertools.combinations(args.seeds, 2)}
    if args.collect:
        found = {name: kept.read(EXPERIMENT, name) for name in names}
    else:
        setting = Corrector()
        setting.prepare()
        test = setting.nll("test")
        make = {1: alone, 2: scored}
        found = {
            name: kept.once(EXPERIMENT, name, lambda seeds=seeds: make[len(seeds)](*seeds, test))
            for name, seeds in names.items()
        }
    command = f"python -m benchmarks.merging_align --seeds {' '.join(map(str, args.seeds))}"
    made = table({name: one for name, one in found.items() if one}, command)
    partfile.write_text(ROOT / "results" / EXPERIMENT / "table.json", json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    launch.command()
    run()

"""Train every arm of gin/experiments/task_moe for several seeds, and leave results/task_moe/table.json.

    python -m benchmarks.task_moe --seeds 0 1 2

BLEU and chrF by direction (sacreBLEU, signatures in the runs' scores.json), their means over groups of directions, and
the share of outputs in another language than asked. Then the new language: its directions trained with their static
adapters alone, with their rows of the dynamic adapters' gates alone, and with everything. What is finished
(results/task_moe/runs) is not run again, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kept
from benchmarks.launch import launch
from moe_jax import checkpoint, main, partfile
from moe_jax.metrics import significance, translation
from moe_jax.tasks.translation import NEW as NEW_DIRECTIONS
from moe_jax.tasks.translation import ZERO_SHOT, languages, trained

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("dense", "top_k", "task_gated", "task_level", "static_adapters", "dynamic_adapters")
NEW = {"new_static": "static_adapters", "new_dynamic": "dynamic_adapters", "new_full": "static_adapters"}  # and of what
AGAINST = ("dense", "top_k")  # what others are compared with


def run(arm: str, seed: int) -> dict[str, Any]:
    """What the table needs of the arm, trained and scored if it is not kept."""
    folder = Path("runs/task_moe") / f"{arm}-{seed}"

    def make() -> dict[str, Any]:
        print(f"--- {arm}, seed {seed} -> {folder}", flush=True)
        about: dict[str, Any] = {"RUN_DIR": folder, "SEED": seed}
        if arm in NEW:
            about["BASE"] = f"runs/task_moe/{NEW[arm]}-{seed}"
        launch([f"experiments/task_moe/{arm}.gin"], about)
        return of_run(arm, seed, ROOT / folder)

    return kept.once("task_moe", f"{arm}-{seed}", make)


def of_run(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """{"rows", "date", "chrf": what chrF is made of, a list a statistic, of each line that is not zero-shot}."""
    out: dict[str, Any] = {"rows": rows_of(arm, seed, folder), "date": datetime.date.today().isoformat()}
    if arm in NEW:
        return out
    lines = [json.loads(line) for line in (folder / "translations.jsonl").read_text("utf-8").splitlines()]
    lines = [line for line in lines if line[0] not in ZERO_SHOT]
    found = translation.chrf().statistics([line[2] for line in lines], [line[3] for line in lines])
    return out | {"chrf": found.T.astype(int).tolist()}


def groups(direction: str) -> list[str]:
    """Those over which a direction's scores are averaged."""
    source, target = languages(direction)
    if direction in ZERO_SHOT:
        return ["zero-shot"]
    if direction in NEW_DIRECTIONS:
        return ["new"]
    kind = "en-xx" if source == "en" else "xx-en" if target == "en" else "xx-yy"
    return [kind, "low-resource" if direction in low_resource() else "high-resource", "trained"]


@functools.cache
def low_resource() -> frozenset[str]:
    """The half of the trained directions with the fewer sentences to learn from."""
    sentences = {d: len(pairs) for d, pairs in main.parallel("train", trained()).items()}
    return frozenset(sorted(sentences, key=lambda d: sentences[d])[: len(sentences) // 2])


def rows_of(arm: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """By direction, and the means of groups."""
    found = json.loads((folder / "scores.json").read_text("utf-8"))["rows"]
    nothing = {"ci95": None, "p_value": None}
    about = {"arm": arm, "seed": seed, "set": "test"}
    rows = [{**about, "task": r["task"], "metric": r["metric"], "value": r["value"], **nothing} for r in found]
    for metric in ("bleu", "chrf", "off-target", "references off-target"):
        mine = [
            (name, r["value"])
            for r in found
            if r["metric"] == metric and r["value"] is not None
            for name in groups(r["task"])
        ]
        for name in dict.fromkeys(g for g, _ in mine):
            mean = float(np.mean([v for g, v in mine if g == name]))
            rows.append({**about, "task": name, "metric": metric, "value": mean, **nothing})
    if arm in NEW:  # what moved, alone where something stood still
        file = next(f for f in (folder / "adapters.safetensors", folder / "model.safetensors") if f.exists())
        moved = sum(x.size for x in checkpoint.read_safetensors(str(file))[0].values())
        rows.append({**about, "task": "new", "metric": "trained parameters", "value": moved, **nothing})
    return rows


def comparisons(runs: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Each arm against those of `AGAINST` by chrF of the same lines: all trained directions' lines, all seeds'."""
    metric = translation.chrf()
    arms = [arm for arm in dict.fromkeys(arm for arm, _ in runs) if all((arm, seed) in runs for seed in seeds)]
    found = {arm: np.concatenate([np.array(runs[arm, seed]["chrf"], float).T for seed in seeds]) for arm in arms}
    out = []
    for against in AGAINST:
        for arm in found:
            if arm == against or against not in found or found[arm].shape != found[against].shape:
                continue
            change = significance.compare(found[against], found[arm], metric.score)
            about = {
                "arm": arm,
                "against": against,
                "seeds": list(seeds),
                "task": "trained directions",
                "metric": "chrf",
            }
            numbers = {"relative_change": change.relative_change, "ci95": change.ci95, "p_value": change.p_value}
            out.append(about | numbers)
    return out


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[*ARMS, *NEW])
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    args = parser.parse_args()
    names = list(itertools.product(args.seeds, args.arms))
    runs = {
        (arm, seed): kept.read("task_moe", f"{arm}-{seed}") if args.collect else run(arm, seed) for seed, arm in names
    }
    runs = {key: found for key, found in runs.items() if found}
    told = {key: found for key, found in runs.items() if key[0] not in NEW}
    meta = {"split": "test", "date": max((found["date"] for found in runs.values()), default="")}
    meta["command"] = f"python -m benchmarks.task_moe --seeds {' '.join(map(str, args.seeds))}"
    rows = [row for found in runs.values() for row in found["rows"]]
    table = {"experiment": "task_moe", "meta": meta, "rows": rows, "comparisons": comparisons(told, args.seeds)}
    output = ROOT / "results" / "task_moe" / "table.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(output, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    run_all()

"""Merge models that were tuned apart by every method, score them, and leave results/merging_<setting>/table.json.

    python -m benchmarks.merging corrector --seeds 0 1 2
    python -m benchmarks.merging translator --seeds 0 1 2
    python -m benchmarks.merging recogniser --list prompts.jsonl --seeds 0 1 2

Of one base, a model is tuned on each task alone (`separate`), on all in as many steps together (`joint`), and on one
after another (`sequential`); what the settings are, benchmarks/merging_settings.py says. Each method's scale is chosen
on validation data, and the merges are scored on test data: text (without the guard), and the mean negative
log-likelihood a token (nll). What is finished (results/merging_<setting>/runs) is not done again: stop it when you
like.

The normalised performance (npf) of a merge is ours (the paper's formula is not known), of means over tasks:

    (nll of the base - nll of the merge) / (nll of the base - nll of the tasks' own models)

1 is as good as the tasks' own models, 0 no better than the base. (A task's own quotient says nothing where its model
hardly gains on the base, or loses.) Interference is the nll of the merge minus that of the task's own model.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kept
from benchmarks.merging_settings import ROOT, Corrector, Nll, Setting, Speech, Translator
from moe_jax import branches, launch, partfile
from moe_jax.merging import experts, merge, search, statistics
from moe_jax.merging.methods import METHODS
from moe_jax.merging.models import open_model
from moe_jax.metrics import significance

FIXED = ("average", "fisher", "regmean")  # means of weights: there is nothing to scale
AUTHORS = ("lors", "magnitude", "singular_values")  # besides, as the authors had them
THEIRS = ", authors' settings"
EXPERTS = "experts, task known"


def slug(arm: str) -> str:
    """An arm's name as that of a file."""
    return re.sub(r"\W+", "_", arm)


def arms(setting: Setting, methods: Sequence[str]) -> list[str]:
    """All that is compared: what was trained, and each method's merges."""
    own = [f"separate/{task}" for task in setting.tasks]
    merged = [arm for name in methods for arm in (name, f"{name}{THEIRS}") if arm == name or name in AUTHORS]
    return ["base", *own, "joint", "sequential", *merged, *([EXPERTS] if setting.to_experts else [])]


def paired(models: list[Any], method: str) -> dict[str, Any]:
    """The recipe of checkpoints, two and two, for what goes from one model to one other; each weighs as many as it
    is made of, so that all count alike."""
    parts = [{"path": path, "weight": 1} for path in models]
    while len(parts) > 2:
        twos = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [
            {"merge": {"method": method, "models": two}, "weight": sum(part["weight"] for part in two)}
            if len(two) == 2
            else two[0]
            for two in twos
        ]
    return {"models": parts, "method": method}


class Bench:
    """The models of a setting and a seed, each made where it is not."""

    def __init__(self, setting: Setting, seed: int, valid: Nll):
        self.setting, self.seed, self.valid = setting, seed, valid
        self.folder = ROOT / "runs" / "merging" / f"{setting.name}-{seed}"

    def tuned(self, arm: str) -> dict[str, Path]:
        """The run folders of `separate` or `sequential`, by task."""
        out: dict[str, Path] = {}
        at = base = self.setting.base()
        for task, steps in branches.shares(self.setting.steps, self.setting.sizes()).items():
            start = at if arm == "sequential" else base
            at = out[task] = self.setting.tune(task, steps, start, self.folder / arm / task, self.seed)
        return out

    def joint(self) -> Path:
        return self.setting.tune(None, self.setting.steps, self.setting.base(), self.folder / "joint", self.seed)

    def candidate(self, arm: str) -> Path:
        """An arm's checkpoint."""
        if arm == "base":
            return self.setting.base()
        if arm == "joint":
            return self.joint()
        self.joint()  # whose data say how the steps are shared
        if arm == "sequential":
            return list(self.tuned(arm).values())[-1]
        own = self.tuned("separate")
        if arm.startswith("separate/"):
            return own[arm.removeprefix("separate/")]
        output = self.folder / f"{slug(arm)}.safetensors"
        if not output.exists():
            self._merge(arm, own, output)
        return output

    def _merge(self, arm: str, own: dict[str, Path], output: Path) -> None:
        if arm == EXPERTS:
            experts.to_experts(str(output), models={task: str(path) for task, path in own.items()})
            return
        name = arm.removesuffix(THEIRS)
        models: list[Any] = [str(path) for path in own.values()]
        if kind := METHODS[name].statistics:
            models = [{"path": str(path), "statistics": self._statistics(kind, t, path)} for t, path in own.items()]
        recipe: dict[str, Any] = {"base": str(self.setting.base()), "models": models, "method": name}
        recipe |= paired(models, name) if name == "slerp" else {}
        if arm == name:
            asked: dict[str, Any] = {
                "recipe": recipe,
                "space": {"scale": [1.0] if name in FIXED else [*self.setting.scales]},
                "loss": self._mean,
            }
            found = search.search(str(self.folder / f"{name}.search"), valid=f"{self.setting.joint}.valid", **asked)
            print(f"{name}: {found.options}, valid nll {found.loss:.4f}", flush=True)
            recipe["options"] = found.options
        merge.merge(str(output), **recipe)

    def _mean(self, path: str) -> float:
        return float(np.mean(list(self.valid(path).values())))

    def _statistics(self, kind: str, task: str, path: Path) -> str:
        output = self.folder / f"{task}.{kind}.safetensors"
        if not output.exists():
            statistics.gather(str(path), str(ROOT / "prepared" / self.setting.data(task)), kind, str(output), rows=64)
        return str(output)

    def scored(self, arm: str, test: Nll) -> dict[str, Any]:
        """What `kept` keeps: {"nll": task -> nll, "lines": task -> what the setting's score takes the sums of}."""
        path = self.candidate(arm)
        tasks = [arm.removeprefix("separate/")] if arm.startswith("separate/") else self.setting.tasks
        print(f"--- scoring {arm}, seed {self.seed}", flush=True)
        return {
            "nll": {task: x for task, x in test(str(path)).items() if task in tasks},
            "lines": {task: self.setting.lines(path, task, told=arm == EXPERTS) for task in tasks},
            "date": datetime.date.today().isoformat(),
            "base": open_model(str(self.setting.base())).digest(),
        }


def table(setting: Setting, found: dict[tuple[str, int], dict[str, Any]], command: str) -> dict[str, Any]:
    """The evidence table. `found`: (arm, seed) -> what `scored` returns.

    Raises ValueError for runs that began with different bases."""
    if len(bases := {run["base"] for run in found.values() if "base" in run}) > 1:
        raise ValueError(f"{setting.name}: runs began with {len(bases)} different bases: remove those of the older one")
    nothing = {"ci95": None, "p_value": None}
    seeds = sorted({seed for _, seed in found})

    def of(arm: str, seed: int, task: str) -> dict[str, Any]:
        return found[f"separate/{task}" if arm == "separate" else arm, seed]

    def lines(arm: str, seed: int, task: str) -> np.ndarray:
        return np.array(of(arm, seed, task)["lines"][task], float)

    rows: list[dict[str, Any]] = []
    names = dict.fromkeys("separate" if arm.startswith("separate/") else arm for arm, _ in found)
    for arm, seed in itertools.product(names, seeds):
        about, nlls = {"arm": arm, "seed": seed, "set": "all"}, []
        for task in setting.tasks:
            try:
                mine, other = lines(arm, seed, task), lines("joint", seed, task)
                three = [of(a, seed, task)["nll"][task] for a in (arm, "base", "separate")]
            except KeyError:  # not made yet
                break
            change = significance.compare(other, mine, setting.score)
            about["task"] = task
            value = float(setting.score(mine.sum(0, keepdims=True))[0])
            text = {"metric": setting.metric, "value": value, "relative_change": change.relative_change}
            rows.append({**about, **text, "ci95": change.ci95, "p_value": change.p_value})  # against the joint model
            rows.append({**about, "metric": "nll", "value": three[0], **nothing})
            rows.append({**about, "metric": "interference", "value": three[0] - three[2], **nothing})
            nlls.append(three)
        else:
            nll, base, own = np.mean(nlls, axis=0)
            rows.append({**about, "task": "mean", "metric": "npf", "value": (base - nll) / (base - own), **nothing})
    meta = {"split": "test", "date": max(run["date"] for run in found.values()), "command": command}
    return {"experiment": f"merging_{setting.name}", "meta": meta, "rows": rows}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=["corrector", "recogniser", "translator"])
    parser.add_argument("--list", type=Path, help="recogniser: utterances, lines of audio, text, lang, seconds, split")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    args = parser.parse_args()
    if (args.setting == "recogniser") != bool(args.list):
        parser.error("give its utterances to the recogniser, and to it alone, by --list LIST")
    listed = args.list and args.list.absolute()
    os.chdir(ROOT)  # prepared data are known by paths from here
    setting = Speech(listed) if listed else {"corrector": Corrector, "translator": Translator}[args.setting]()
    experiment = f"merging_{setting.name}"
    if not args.collect:
        setting.prepare()
        valid, test = setting.nll("valid"), setting.nll("test")
    found = {}
    for seed in args.seeds:
        for arm in arms(setting, args.methods):
            name = f"{slug(arm)}-{seed}"
            if one := kept.read(experiment, name):
                found[arm, seed] = one
            elif not args.collect:
                found[arm, seed] = Bench(setting, seed, valid).scored(arm, test)
                kept.write(experiment, name, found[arm, seed])
    command = f"python -m benchmarks.merging {setting.name}{' --list LIST' if listed else ''} --seeds "
    made = table(setting, found, command + " ".join(map(str, args.seeds)))
    partfile.write_text(ROOT / "results" / experiment / "table.json", json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    launch.command()
    run()

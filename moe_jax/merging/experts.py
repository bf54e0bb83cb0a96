"""Dense models -> the experts of one mixture, with the task map as its router: nothing is lost, at the price of a
feed-forward layer for each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import checkpoint, describe, tree
from moe_jax.layers.param import Rngs
from moe_jax.merging.merge import Cosines, check_free, write_card
from moe_jax.merging.models import MergeError, Ours, check_alike

PAPER = "Sukhbaatar et al. 2024, Branch-Train-MiX, before its training"
EXPERT, MEAN, FRESH = "an expert of each model", "mean", "fresh, to be trained"  # what becomes of an array


def to_experts(
    output: str, *, models: Mapping[str, str], router: str = "ByTask", k: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint in which the feed-forward layers of each model are an expert, all else is averaged
    (Sukhbaatar et al. 2024, before their training), and a card beside it. An array at a time is in memory, of each
    model and of the mixture. Returns the metadata of the checkpoint.

    Args:
      models: family -> its dense checkpoint; their order is that of the experts.
      router: "ByTask", which sends each family to its own expert alone, so the task must be known; or "TaskMapped",
        whose gate is fresh and has to be trained: NeKo's, of `k` choices.

    Raises MergeError, and writes nothing, for models that are not dense, not alike, not tuned from one base, or of
    families that they do not know, and for an output that may not be replaced.
    """
    check_free(output, overwrite, list(models.values()))
    if router not in ("ByTask", "TaskMapped"):
        raise MergeError(f"unknown router {router!r}; known: ByTask, TaskMapped")
    if not models:
        raise MergeError("give the models that become experts, FAMILY=PATH each")
    opened = {family: Ours(path) for family, path in models.items()}
    first = next(iter(opened.values()))
    for model in opened.values():
        check_alike(first, model)
    families = first.families
    for family, model in opened.items():
        if family not in families:
            raise MergeError(f"{model.path}: knows no family {family!r}; known: {', '.join(families)}")
    described = json.loads(json.dumps(first.meta["model"]))
    dense = described["args"].get("ffn", {})
    if dense.get("class") != "DenseFfn" or described["args"].get("dense_layers"):
        raise MergeError(f"{first.path}: is no dense model; only those become experts")
    mapped = {"experts": [[], *_table(families, list(opened))]} | ({"k": k} if router == "TaskMapped" else {})
    activation = {k: v for k, v in dense["args"].items() if k == "activation"}
    described["args"]["ffn"] = {
        "class": "MoeFfn",
        "args": {
            "num_experts": len(opened),
            "hidden": dense["args"]["hidden"],
            "router": {"class": router, "args": mapped},
            "experts": {"class": "Gated", "args": activation},
        },
    }
    target = tree.flatten(describe.abstract(described))
    sources = [checkpoint.Source(path) for path in models.values()]
    moves = checkpoint.planned(target, sources, checkpoint.branch_train_mix())
    fresh = [name for name in target if name not in moves]
    # What of it is not asked for is never made.
    made = jax.jit(lambda: _some(tree.flatten(describe.configured(described)(rngs=Rngs(params=0))), fresh))()
    cosines = Cosines(first.path)

    def arrays() -> Iterator[np.ndarray]:
        for name in target:
            if name in fresh:
                yield np.asarray(made[name])
                continue
            path = moves[name].path
            parts = [_leaf(model, path) for model in opened.values()]
            for model, x in zip(opened.values(), parts, strict=True):
                if next(first.sites(path)).matrix:
                    cosines.add(model.path, x, parts[0])
            yield np.asarray(moves[name]([jnp.asarray(x) for x in parts]))
        cosines.check("take models tuned from one")

    inputs = [{"path": model.path, "sha256": model.digest()} for model in opened.values()]
    meta = {k: v for k, v in first.meta.items() if k not in ("guard", "step")} | {
        "model": described,
        "families": families,
        "merged": {"method": "experts", "models": inputs},
    }
    shapes, dtypes = ({name: getattr(x, of) for name, x in target.items()} for of in ("shape", "dtype"))
    checkpoint.stream_safetensors(Path(output), shapes, dtypes, arrays(), {"moe_jax": json.dumps(meta)})
    groups = defaultdict(list)
    for name in target:
        groups[FRESH if name in fresh else EXPERT if moves[name].rule.op == "mix" else MEAN].append(name)
    card = {"recipe": {"experts": dict(models), "router": router, "k": k}, "paper": PAPER, "models": inputs}
    card |= {"router": described["args"]["ffn"]["args"]["router"]}
    write_card(output, card | {"arrays": [{"method": how, "paths": paths} for how, paths in groups.items()]})
    return meta


def _some(table: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: table[name] for name in names}


def _leaf(model: Ours, name: str) -> np.ndarray:
    """A whole array, float32. Raises MergeError for what is not finite."""
    return np.stack([model.read(site) for site in model.sites(name)]).reshape(model.shapes[name])


def _table(families: Mapping[str, int], order: Sequence[str]) -> list[list[int]]:
    """For each task id from 1 on its expert; families without a model have the first."""
    names = {number: name for name, number in families.items()}
    last = max(families.values())
    return [[order.index(names[i])] if names.get(i) in order else [0] for i in range(1, last + 1)]

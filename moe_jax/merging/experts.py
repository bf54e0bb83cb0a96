"""Dense models -> the experts of one mixture, with the task map as its router: nothing is lost, at the price of a
feed-forward layer for each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import checkpoint, describe, tree
from moe_jax.merging.models import MergeError, Ours, check_alike


def to_experts(output: str, *, models: Mapping[str, str], router: str = "ByTask", k: int = 1) -> dict[str, Any]:
    """Writes a checkpoint in which the feed-forward layers of each model are an expert; all else is averaged
    (Sukhbaatar et al. 2024, before their training). Returns its metadata.

    Args:
      models: family -> its dense checkpoint; their order is that of the experts.
      router: "ByTask", which sends each family to its own expert alone, so the task must be known; or "TaskMapped",
        whose gate is fresh and has to be trained: NeKo's, of `k` choices.

    Raises MergeError for models that are not dense, not alike, or of families that they do not know.
    """
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
    empty = describe.abstract(described)
    sources = [checkpoint.Source(path) for path in models.values()]
    for model in opened.values():
        for name in model.shapes:
            for site in model.sites(name):
                model.read(site)  # that it is finite
    table = checkpoint.transplant(tree.flatten(empty), sources, checkpoint.branch_train_mix())
    if router == "TaskMapped":
        gates = [p for p in table if tree.is_router(p)]
        made = tree.flatten(describe.configured(described)(rngs=_rngs()))
        table |= {p: made[p] for p in gates}
    meta = {k: v for k, v in first.meta.items() if k not in ("guard", "step")} | {
        "model": described,
        "families": families,
    }
    meta["merged"] = {"method": "experts", "models": [{"path": m.path, "sha256": m.digest()} for m in opened.values()]}
    checkpoint.write_safetensors(Path(output), table, meta)
    return meta


def _table(families: Mapping[str, int], order: Sequence[str]) -> list[list[int]]:
    """For each task id from 1 on its expert; families without a model have the first."""
    names = {number: name for name, number in families.items()}
    last = max(families.values())
    return [[order.index(names[i])] if names.get(i) in order else [0] for i in range(1, last + 1)]


def _rngs():
    from moe_jax.layers.param import Rngs

    return Rngs(params=0)

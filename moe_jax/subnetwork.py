"""The part of a mixture of experts that one task needs, as a checkpoint of its own: what task-level routing is for
(Kudugunta et al. 2021). Experts that the task never reaches are left out, with no change to what is computed for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax import describe, tree
from moe_jax.checkpoint import CheckpointError
from moe_jax.moe.routers import MAX_TASKS

# Where a model's description has mixtures, and where their leaves begin.
PLACES = {
    "Corrector": {"ffn": ("blocks/ffn",)},
    "Translator": {
        "ffn": ("decoder/blocks/feed/ffn",),
        "encoder_ffn": ("encoder/blocks/feed/ffn",),
        "adapter": tuple(
            f"{side}/{kind}/feed/adapter" for side in ("encoder", "decoder") for kind in ("blocks", "dense_blocks")
        ),
    },
}


def extract(
    table: Mapping[str, Any], meta: Mapping[str, Any], task: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(table, metadata) of the model with the experts alone that routers by task (`TaskLevel`, `ByTask`, `Subset`, also
    within `Grouped`) give `task`. It knows this task alone, for which it computes what the whole does.

    Raises CheckpointError for a task that the model does not know, where no router goes by tasks, or where a weight
    depends on experts that would be left out.
    """
    if task not in meta["families"]:
        raise CheckpointError(f"unknown task {task!r}; the model knows {', '.join(meta['families'])}")
    meta = copy.deepcopy(dict(meta))
    args = meta["model"]["args"]
    if missing := tree.flatten(describe.abstract(meta["model"])).keys() - table.keys():
        raise CheckpointError(f"{min(missing)} is missing: name a whole model (a run's model.safetensors)")
    out = {path: np.asarray(x) for path, x in table.items()}
    changed = {}
    for argument, prefixes in PLACES.get(meta["model"]["class"], {}).items():
        mixture = args.get(argument)
        if mixture is None or mixture["class"] != "MoeFfn":
            continue
        there = [prefix for prefix in prefixes if f"{prefix}/experts/down" in out]
        for smaller in [_cut(out, prefix, mixture, meta["families"][task]) for prefix in there]:
            if smaller is not None:
                changed[argument] = smaller
    args |= changed
    if not changed:
        raise CheckpointError("no router of this model goes by tasks: every task may need every expert")
    meta["families"] = {task: meta["families"][task]}  # or whoever asks for another would be given this one
    described = tree.flatten(describe.abstract(meta["model"]))
    return {path: out[path] for path in described}, meta


def _cut(out: dict[str, np.ndarray], prefix: str, mixture: Mapping[str, Any], task: int) -> dict[str, Any] | None:
    """Cuts the leaves under `prefix` down; returns the description of the smaller mixture, None if all are needed."""
    router, inner = mixture["args"]["router"], f"{prefix}/router"
    if router["class"] == "Grouped":
        task = dict(map(tuple, router["args"]["groups"])).get(task, 0)
        router, inner = router["args"]["router"], f"{inner}/router"
    layers = len(out[f"{prefix}/experts/down"])
    if router["class"] == "TaskLevel":
        if router["args"].get("weights") == "full":
            raise CheckpointError(f"{prefix}: weights='full' depend on the experts that a task does not reach, too")
        gate_NxTxE = out.pop(f"{inner}/gate")
        k = router["args"]["k"]
        order_NxK = np.argsort(-gate_NxTxE[:, task], axis=-1, kind="stable")[:, :k]
        own_Nx1xK = np.take_along_axis(gate_NxTxE[:, task], order_NxK, axis=1)[:, None]
        out[f"{prefix}/router/gate"] = np.repeat(own_Nx1xK, MAX_TASKS, axis=1)
        smaller = router
    elif router["class"] == "Subset":
        if not (own := router["args"]["experts"][task]):  # chooses among all
            return None
        order_NxK = np.array([own] * layers)
        gate_NxDxE = out.pop(f"{inner}/gate")
        out[f"{prefix}/router/gate"] = gate_NxDxE[..., own]
        smaller = {"class": "Subset", "args": router["args"] | {"experts": [[]] * MAX_TASKS}}
    elif router["class"] == "ByTask":
        own = router["args"]["experts"][task]
        order_NxK = np.array([own or [0]] * layers)
        experts = list(range(len(own))) if own or router["args"].get("others") == "none" else [0]
        smaller = {"class": "ByTask", "args": router["args"] | {"experts": [[], *[experts] * (MAX_TASKS - 1)]}}
    else:
        return None
    for path in [path for path in out if path.startswith(f"{prefix}/experts/")]:
        out[path] = np.take_along_axis(
            out[path], order_NxK.reshape(*order_NxK.shape, *(1,) * (out[path].ndim - 2)), axis=1
        )
    return {**mixture, "args": {**mixture["args"], "router": smaller, "num_experts": order_NxK.shape[1]}}

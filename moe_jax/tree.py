"""A model as a flat table: path -> array. Optimisers, checkpoints, merging and sharding work on this, never on
architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from moe_jax.types import Array

Model = TypeVar("Model")


def _name(path) -> str:
    parts = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    return "/".join(p for p in parts if p != "value")


def flatten(model: Any) -> dict[str, Array]:
    """path -> array for every parameter (and balance state) of a model."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def unflatten(model: Model, table: Mapping[str, Any]) -> Model:
    """`model` with its arrays replaced by the table's. Raises ValueError naming paths that are missing or left over."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
    names = [_name(path) for path, _ in leaves]
    missing, extra = sorted(set(names) - set(table)), sorted(set(table) - set(names))
    if missing or extra:
        raise ValueError(f"parameters do not match: missing {missing[:5]}, left over {extra[:5]}")
    return jax.tree_util.tree_unflatten(treedef, [table[name] for name in names])


def axes(model: Any) -> dict[str, tuple[str | None, ...]]:
    """path -> the words that name its trailing dims."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    return {_name(path): getattr(leaf, "axes", ()) for path, leaf in leaves}


def is_router(path: str) -> bool:
    """Routers are computed and kept in float32, whatever the rest is."""
    return "router" in path.split("/")


def count(table: Mapping[str, Any]) -> int:
    return sum(int(leaf.size) for leaf in table.values())

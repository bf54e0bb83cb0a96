"""Programs of decoding: compiled once for all models of one structure, their arrays laid out for many small steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moe_jax import sharding, tree, xla
from moe_jax.layers import stack
from moe_jax.moe.dispatch import WRITTEN_OUT
from moe_jax.moe.grouped import widened
from moe_jax.types import Array


class Structure:
    """A model's structure without its arrays, and the mesh that it is on: hashable, so that compiled programs are found
    again."""

    def __init__(self, model: Any):
        self.treedef = jax.tree.structure(model)
        self.model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model)
        self.key = str(self.treedef), sharding.mesh()

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.key == other.key

    def filled(self, params: dict[str, Array]) -> Any:
        return tree.unflatten(self.model, params)


def compiled(**options: Any) -> Callable[[Callable], Callable[[], Any]]:
    """A program of (structure, ...), made when it is first asked for: importing a file must not start a backend."""

    def program(function: Callable) -> Callable[[], Any]:
        return functools.cache(lambda: jax.jit(function, static_argnums=0, compiler_options=xla.options(), **options))

    return program


def apart(model: Any) -> Any:
    """`model` with the matrices of each layer and each expert as arrays of their own, on one CPU. (Elsewhere a slice is
    no copy, and these would be; on a mesh experts lie apart.) Behind a barrier, or XLA slices in every step."""
    if jax.default_backend() != "cpu" or sharding.mesh():
        return jax.lax.optimization_barrier(model)

    def parts(x: Array, words: Sequence[str | None]) -> Any:
        of_experts = words[:1] == ("expert",) and len(x) <= WRITTEN_OUT
        if of_experts and x.ndim == len(words) == 3:
            return stack.Apart(tuple(map(widened, x)))
        if x.ndim > len(words) or of_experts:
            return stack.Apart(tuple(parts(part, words[-part.ndim :]) for part in x))
        return x

    words = tree.axes(model)
    # What is `quantise.Held` is two arrays under the name of one.
    table = {n: parts(x, words.get(n) or words[n.rpartition("/")[0]]) for n, x in tree.flatten(model).items()}
    return jax.lax.optimization_barrier(tree.unflatten(model, table))


def in_place(model: Any) -> Any:
    """`model` whose experts' matrices a loop over layers reads where they lie, on one CPU: else those of all experts
    are copied for each layer, rows or no rows. For programs without gradients."""
    if jax.default_backend() != "cpu" or sharding.mesh():
        return model
    words = tree.axes(model)
    stacked = lambda n, x: words.get(n, ())[:1] == ("expert",) and x.ndim == len(words[n]) + 1  # noqa: E731
    table = {n: stack.InPlace(x) if stacked(n, x) else x for n, x in tree.flatten(model).items()}
    return tree.unflatten(model, table)


def laid_out(model: Any) -> Any:
    """`model` for many steps: `apart` once on CPU; elsewhere as it is, of which that would be a copy for nothing."""
    return _apart()(Structure(model), tree.flatten(model)) if jax.default_backend() == "cpu" else model


@compiled()
def _apart(structure: Structure, params: dict[str, Array]) -> Any:
    return apart(structure.filled(params))


def of_rows(state: Any, row_R: Array) -> Any:
    """The state of some rows, stacked over layers; leaves without rows count slots."""
    return jax.tree.map(lambda s: s if s.ndim < 2 else s.take(row_R, axis=1), state)

"""Layers of one kind, stacked on a leading axis: built by `vmap`, run by `scan`.

One traced layer instead of N: compile time does not grow with depth, and side results (router statistics, caches)
come back stacked, by value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.layers.param import Module, Rngs
from moe_jax.types import Array, value

PRODUCT = "product"  # what `checkpoint_name` calls products with weights that "dots" would not know as such
REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
}


def build(make: Callable[[Rngs], Module], num: int, rngs: Rngs) -> Module:
    """`num` independent layers whose parameters have a leading layer axis."""
    return jax.vmap(lambda key: make(Rngs(params=key)))(jax.random.split(rngs.params(), num))


@value
class Apart:
    """An array in parts over its first dim, of which one is read without a copy of it; `[...]` is the whole again."""

    parts: tuple[Any, ...]

    def __getitem__(self, index: Any) -> Array:
        return jnp.stack([part[...] for part in self.parts])[index]


@value
class InPlace:
    """An array stacked over layers that `run` does not cut: each layer is given where it lies, as `Of`. For what is
    read in parts and without a gradient, where cutting is a copy of all of a layer's."""

    whole: Array


@value
class Of:
    """One layer's, in the whole; `[...]` cuts it out."""

    whole: Array
    layer: Array

    def __getitem__(self, index: Any) -> Array:
        return jax.lax.dynamic_index_in_dim(self.whole, self.layer, keepdims=False)[index]

    def part(self, i: Any) -> Array:
        sizes = self.whole.shape[2:]
        start = (self.layer, i, *(0 for _ in sizes))
        return jax.lax.dynamic_slice(self.whole, start, (1, 1, *sizes)).reshape(sizes)


def split(stacked: Any, num: int) -> tuple[Any, ...]:
    """What is stacked over layers (or experts), as one value a layer."""
    return tuple(part(stacked, i) for i in range(num))


def part(stacked: Any, i: Any) -> Any:
    """One of them; of what is `Apart`, its number must be known to Python."""
    one = lambda x: x.part(i) if isinstance(x, Of) else (x.parts if _apart(x) else x)[i]  # noqa: E731
    return jax.tree.map(one, stacked, is_leaf=lambda x: isinstance(x, Apart | Of))


def section(stacked: Any, start: int, end: int) -> Any:
    """Layers `start` to `end` of a stack, or of what is `split`."""
    if isinstance(stacked, tuple):
        return stacked[start:end]
    cut = lambda x: Apart(x.parts[start:end]) if _apart(x) else x if (start, end) == (0, len(x)) else x[start:end]  # noqa: E731
    return jax.tree.map(cut, stacked, is_leaf=_apart)


def is_apart(stacked: Any) -> bool:
    return any(map(_apart, jax.tree.leaves(stacked, is_leaf=_apart)))


def _apart(x: Any) -> bool:
    return isinstance(x, Apart)


def _in_place(x: Any) -> bool:
    return isinstance(x, InPlace)


def run(
    layers: Module,
    x: Array,
    call: Callable[..., tuple[Array, Any]],
    *inputs: Any,
    remat: str = "none",
    unroll: int = 1,
) -> tuple[Array, Any]:
    """`x` through every layer: `call(layer, x, *layer_inputs) -> (x, out)`; `inputs` have a leading layer axis.

    `unroll` layers are written out in each turn of the loop: XLA:CPU then copies no slices of weights and activations
    in and out of it. An input that is `split` makes a plain loop of all layers, and every out comes back split: what a
    layer updates of its own (a cache) is then updated in place, where a scan copies all of it.

    Returns the last x and the outs, stacked or split. Raises ValueError for an unknown `remat` policy.
    """
    if remat not in REMAT:
        raise ValueError(f"unknown remat policy {remat!r}; known: {', '.join(REMAT)}")
    if REMAT[remat] is not None:
        call = jax.checkpoint(call, policy=REMAT[remat], static_argnums=())

    if any(isinstance(i, tuple) for i in inputs):
        num = next(len(i) for i in inputs if isinstance(i, tuple))
        each = [i if isinstance(i, tuple) else split(i, num) for i in inputs]
        outs = []
        for layer, *rest in zip(split(layers, num), *each, strict=True):
            x, out = call(layer, x, *rest)
            outs.append(out)
        return x, tuple(outs)

    arrays, structure = jax.tree.flatten(layers, is_leaf=_in_place)
    whole = [a.whole for a in arrays if _in_place(a)]
    numbers = jnp.arange(len(whole[0])) if whole else None

    def body(x, layer_inputs):
        number, cut, rest = layer_inputs
        own = [Of(a.whole, number) if _in_place(a) else c for a, c in zip(arrays, cut, strict=True)]
        return call(structure.unflatten(own), x, *rest)

    cut = [None if _in_place(a) else a for a in arrays]
    return jax.lax.scan(body, x, (numbers, cut, inputs), unroll=unroll)


def paired(outs: Any) -> tuple[Any, Any]:
    """(states, split or stacked as `run` has them; the rest, stacked) of layers each of which gives a pair."""
    if not isinstance(outs[0], tuple):
        return outs
    states, others = zip(*outs, strict=True)
    return states, jax.tree.map(lambda *a: jnp.stack(a), *others)


def repeated(one: Any, layers: int) -> Any:
    """The state of one layer, stacked for so many that begin alike."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (layers, *a.shape)), one)


def in_turn(
    blocks: Module, dense_blocks: Module | None, dense_layers: Sequence[int], layers: int
) -> Iterator[tuple[Any, int, int]]:
    """Two stacks as one sequence of `layers`, of which those numbered `dense_layers` are the second stack's: for each
    run of layers of one kind (their part of its stack, the number of the first, that after the last)."""
    number, done = 0, {False: 0, True: 0}
    for dense, run in itertools.groupby(layer in dense_layers for layer in range(layers)):
        size = len(list(run))
        yield section(dense_blocks if dense else blocks, done[dense], done[dense] + size), number, number + size
        number, done[dense] = number + size, done[dense] + size


def joined(parts: Sequence[Any]) -> Any:
    """What came of the runs of layers, as if of one."""
    if len(parts) < 2:
        return parts[0] if parts else None
    if isinstance(parts[0], tuple):
        return tuple(itertools.chain(*parts))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

"""Products of rows sorted by expert, each row with its own expert's matrix: one way for each backend.

A way is a function (size_E, rows) -> `Grouped`; `best()` names the backend's. `jax.lax.ragged_dot` is meant to be this,
but XLA computes every expert for every row on CPU, for a gradient on TPU, and on GPU (jaxlib 0.10: 64 experts on an
H100 take 64 times the work and gigabytes of copies of the rows). So on GPU it is `tokamax`, on TPU `megablox` or
`mixed`, and on CPU `walk` goes over blocks of rows: each touches one expert and writes in place, and the garbage that
its tail leaves is overwritten by the next expert's first block. Work is (rows + half of the smallest block an expert)
instead of rows x experts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import sharding
from moe_jax.layers import stack
from moe_jax.layers.stack import PRODUCT
from moe_jax.moe import megablox as kernels
from moe_jax.types import Array, value

Matmul = Callable[[Array, Array], Array]
Body = Callable[..., Any]

SMALLEST, LARGEST, SIZES = 8, 512, 4  # rows of a block, and how many sizes there are
PAGE, APART = 1024, 16  # float32 numbers that fill it; columns of zeros


class Experts(Protocol):
    """A pytree of matrices w_ExIxO. An expert's work on its rows is `second(first(rows, matmul), matmul)`: what `first`
    gives is kept for the way back, and what `second` makes of it between its products is computed again."""

    def first(self, rows: Array, matmul: Matmul) -> tuple[Array, ...]: ...

    def second(self, kept: tuple[Array, ...], matmul: Matmul) -> Array: ...


def apply(experts: Experts, rows: Array, matmul: Matmul) -> Array:
    """Gradient checkpointing keeps these products as it does a dense layer's, whatever makes them."""
    named = lambda rows, w: checkpoint_name(matmul(rows, w), PRODUCT)  # noqa: E731
    return experts.second(experts.first(rows, named), named)


@value
class Wide:
    """A matrix with columns of zeros behind its own `columns`, which `times` cuts off; `[...]` is itself.

    XLA:CPU packs a matrix before it multiplies with it. Where the rows of one lie whole pages apart, what is packed
    together pushes itself out of the cache: products of few rows take a tenth longer, of any number on one core.
    """

    w_IxO: Array
    columns: int = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Wide:
        return self


def widened(w_IxO: Array) -> Array | Wide:
    """`Wide` where that pays: a copy, to be made once for several products."""
    I, O = w_IxO.shape
    if w_IxO.dtype != jnp.float32 or O % PAGE or I == 1:
        return w_IxO
    return Wide(jnp.pad(w_IxO, ((0, 0), (0, APART))), O)


def times(x: Array, w: Array | Wide) -> Array:
    """x @ w."""
    return (x @ w.w_IxO)[..., : w.columns] if isinstance(w, Wide) else x @ w


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Experts on R = rows + spare sorted rows, of which the first size_E[0] belong to expert 0, and so on.

    Rows beyond sum(size_E) may hold anything and give anything, and so may their gradient; others never see it.

    Attributes:
      spare: how many rows of nobody must follow the sorted ones.
      apply: (experts, x_RxD) -> y_RxD.
    """

    spare: int
    apply: Callable[[Experts, Array], Array]


Product = Callable[[Array, int], Grouped]


def ragged_dot(size_E: Array, rows: int) -> Grouped:
    """XLA's own."""
    return _ragged(jax.lax.ragged_dot, size_E, rows)


def tokamax(size_E: Array, rows: int) -> Grouped:
    """Kernels of the library of that name for GPUs (Mosaic, else Triton; elsewhere XLA's own), which is an extra:
    pip install 'moe_jax[gpu]'."""
    import tokamax as library

    return _ragged(library.ragged_dot, size_E, rows)


def _ragged(ragged: Callable[[Array, Array, Array], Array], size_E: Array, rows: int) -> Grouped:
    live = (jnp.arange(rows) < size_E.sum())[:, None]
    matmul = lambda rows, w: ragged(rows, w, size_E.astype(jnp.int32))  # noqa: E731

    def run(experts: Experts, x_RxD: Array) -> Array:
        return jnp.where(live, apply(experts, jnp.where(live, x_RxD, 0), matmul), 0)  # NaN * 0 would be a gradient

    return Grouped(0, run)


def walk(size_E: Array, rows: int) -> Grouped:
    """Over blocks of rows: all of an expert's work on a block while it is in the cache."""
    sizes = block_rows(rows, size_E.shape[0])
    return Grouped(sizes[0], lambda experts, x: _walk(experts, x, size_E, sizes))


def megablox(size_E: Array, rows: int) -> Grouped:
    """Kernels for TPU; elsewhere they are interpreted, slowly."""
    return _tiled(kernels.matmul, size_E, rows)


def mixed(size_E: Array, rows: int) -> Grouped:
    """XLA's own for rows, and for their gradient; a kernel of `megablox` for that of the matrices."""
    return _tiled(kernels.mixed, size_E, rows)


def _tiled(product: Callable[[Array, Array, Array], Array], size_E: Array, rows: int) -> Grouped:
    tile = kernels.ROWS[-1]
    matmul = lambda x, w: product(x, w, size_E.astype(jnp.int32))  # noqa: E731
    return Grouped(-rows % tile if rows else tile, lambda experts, x: apply(experts, x, matmul))


BEST: dict[str, Product] = {"cpu": walk, "gpu": tokamax, "tpu": megablox, "tpu lite": mixed}


def best() -> Product:
    """The devices' way: the fastest that was measured on CPU, on others by what their compilers say."""
    backend, device = sharding.kind()
    lite = backend == "tpu" and "lite" in device  # v5e and v6e call themselves so
    way = BEST.get(f"{backend} lite" if lite else backend, ragged_dot)
    if way is tokamax and not importlib.util.find_spec("tokamax"):
        text = "without tokamax every expert computes every row: pip install 'moe_jax[gpu]'"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return ragged_dot
    return way


def block_rows(rows: int, experts: int) -> tuple[int, ...]:
    """Sizes of blocks, each twice the one before, the last about the mean load and no more than there is.

    An expert's rows, filled up to a multiple of the smallest, are cut into whole ones of the last and at most one of
    each other: large products are the fast ones, and no more than the smallest is wasted.
    """
    mean = max(rows // experts, 1)
    largest = 2 ** (SIZES - 1)
    smallest = min(SMALLEST * max(1, round(mean / largest / SMALLEST)), LARGEST // largest)
    return tuple(size for i in range(SIZES) if (size := smallest * 2**i) <= min(1.4 * mean, rows) or i == 0)


def _loop(size_E: Array, blocks: tuple[int, ...], take: Callable, body: Body, init: Any, each: bool = False) -> Any:
    """`body(carry, take(expert), expert, first_row, end_row, block) -> carry` over all blocks, in ascending order.
    `each` expert is written out, or they are a loop.

    Which block it is is a loop of no turn or one: XLA:CPU updates the carry of a loop in place, that of a conditional
    it copies. What the body computes must depend on the turn, or XLA computes it before the loop, turn or no turn.
    """
    end_E = jnp.cumsum(size_E)

    def expert(e: Array | int, carry: Any) -> Any:
        first, end = end_E[e] - size_E[e], end_E[e]
        taken = take(e)
        units = -(-size_E[e] // blocks[0])
        *smaller, last = (block // blocks[0] for block in blocks)
        step = lambda i, c: body(c, taken, e, first + i * blocks[-1], end, blocks[-1])  # noqa: E731
        carry = jax.lax.fori_loop(0, units // last, step, carry)
        for n, block in reversed([*zip(smaller, blocks, strict=False)]):
            row = first + units // (2 * n) * 2 * block
            step = lambda i, c, row=row, block=block: body(c, taken, e, row + i * block, end, block)  # noqa: E731
            carry = jax.lax.fori_loop(0, units // n % 2, step, carry)
        return carry

    if each:
        return reduce(lambda carry, e: expert(e, carry), range(size_E.shape[0]), init)
    return jax.lax.fori_loop(0, size_E.shape[0], expert, init)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _walk(experts: Any, x_RxD: Array, size_E: Array, blocks: tuple[int, ...]) -> Array:
    def body(y: Array, one: Any, e: Array, row: Array, end: Array, block: int) -> Array:
        return _put(y, apply(one, _block(x_RxD, row, block), times), row)

    apart = stack.is_apart(experts)
    take = partial(stack.part, experts) if apart else partial(_wide, experts)
    return _loop(size_E, blocks, take, body, jnp.zeros(x_RxD.shape, x_RxD.dtype), apart)


def _walk_fwd(experts: Any, x_RxD: Array, size_E: Array, blocks: tuple[int, ...]):
    # What the last block of all reads behind the last row: a weight of 0 would not stop NaN on the way back.
    x_RxD = _put(x_RxD, jnp.zeros((blocks[0], *x_RxD.shape[1:])), size_E.sum())
    like = jax.eval_shape(lambda e, x: stack.part(e, 0).first(x, jnp.matmul), experts, x_RxD)

    def body(carry, one: Any, e: Array, row: Array, end: Array, block: int):
        kept = one.first(_block(x_RxD, row, block), times)
        parts = (one.second(kept, times), *kept)
        return tuple(_put(c, p, row) for c, p in zip(carry, parts, strict=True))

    init = tuple(jnp.zeros((x_RxD.shape[0], s.shape[1]), s.dtype) for s in (x_RxD, *like))
    y, *kept = _loop(size_E, blocks, partial(_wide, experts), body, init)
    return y, (experts, x_RxD, size_E, tuple(kept))


def _walk_bwd(blocks: tuple[int, ...], residuals, dy_RxD: Array):
    experts, x_RxD, size_E, kept = residuals

    def take(e: Array) -> Any:
        return jax.tree.map(lambda w: jax.lax.optimization_barrier(w.T), stack.part(experts, e))

    def body(carry, one: Any, e: Array, row: Array, end: Array, block: int):
        dx, dw = carry
        dy = jnp.where((row + jnp.arange(block) < end)[:, None], _block(dy_RxD, row, block), 0)
        here = tuple(_block(s, row, block) for s in kept)
        _, second = jax.vjp(lambda w, h: w.second(h, _by_transposed), one, here)
        d_second, dh = second(dy)
        _, first = jax.vjp(lambda w, x: w.first(x, _by_transposed), one, _block(x_RxD, row, block))
        d_first, part = first(dh)
        add = lambda d, a, b: _put(d, stack.part(d, e) + (a + b).T, e)  # noqa: E731
        return _put(dx, part, row), jax.tree.map(add, dw, d_first, d_second)

    init = jnp.zeros(x_RxD.shape, x_RxD.dtype), jax.tree.map(jnp.zeros_like, experts)
    dx, dw = _loop(size_E, blocks, take, body, init)
    return dw, dx, None


_walk.defvjp(_walk_fwd, _walk_bwd)


@jax.custom_vjp
def _by_transposed(x_RxI: Array, w_OxI: Array) -> Array:
    """x @ w.T, of which the way back is wanted alone: with the transposed matrix at hand it is the fast kind of product
    (of few rows with a matrix to be transposed Eigen makes a third of the rate)."""
    return x_RxI @ w_OxI.T


def _by_transposed_bwd(residuals, dy_RxO: Array):
    x_RxI, w_OxI = residuals
    return times(dy_RxO, _copied_wide(w_OxI)), times(x_RxI.T, _copied_wide(dy_RxO)).T


_by_transposed.defvjp(lambda x, w: (x @ w.T, (x, w)), _by_transposed_bwd)


def _wide(experts: Any, e: Any) -> Any:
    return jax.tree.map(_copied_wide, stack.part(experts, e))


def _copied_wide(w_IxO: Array) -> Array | Wide:
    """`widened` where a copy for one use pays: on one core, whose products it speeds by an eighth. Where several share
    them they gain nothing, and the copy takes as long as the products of some ten rows."""
    return widened(w_IxO) if sharding.cores() == 1 else w_IxO


def _block(x: Array, row: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, row, block)


def _put(x: Array, part: Array, row: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype).reshape(-1, *x.shape[1:]), row, 0)

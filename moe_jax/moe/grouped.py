"""Products of rows sorted by expert, each row with its own expert's matrix: one way for each backend.

A way is a function (size_E, rows) -> `Grouped`; `best()` names the backend's. `jax.lax.ragged_dot` is this on GPU.
XLA:CPU lowers it to computing every expert for every row, so there `walk` goes over blocks of rows: each touches one
expert and writes in place, and the garbage that its tail leaves is overwritten by the next expert's first block. Work
is (rows + half a small block an expert) instead of rows x experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.types import Array

Matmul = Callable[[Array, Array], Array]
Experts = Callable[[Array, Matmul], Array]  # a module: a pytree of weights w_Ex... that is called with (rows, matmul)
Body = Callable[[Array, Array, Array, Array, int], Array]

SHARES = (0.125, 0.25, 0.5, 1.0)  # of the mean load: the sizes of blocks (measured, benchmarks/moe_layer.py)
SMALLEST, LARGEST = 8, 512


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Products of R = rows + spare rows, of which the first size_E[0] belong to expert 0, and so on.

    Rows beyond sum(size_E) give zeros and no gradient, whatever they hold.

    Attributes:
      spare: how many rows of nobody must follow the sorted ones.
      matmul: (x_RxI, w_ExIxO) -> y_RxO with y[r] = x[r] @ w[e(r)].
      each: (experts, x_RxD) -> `experts(x, matmul)`, or what comes to the same faster.
    """

    spare: int
    matmul: Matmul
    each: Callable[[Experts, Array], Array]


Product = Callable[[Array, int], Grouped]


def ragged_dot(size_E: Array, rows: int) -> Grouped:
    """XLA's own."""

    def matmul(x_RxI: Array, w_ExIxO: Array) -> Array:
        live = (jnp.arange(x_RxI.shape[0]) < size_E.sum())[:, None]
        y = jax.lax.ragged_dot(jnp.where(live, x_RxI, 0), w_ExIxO, size_E.astype(jnp.int32))
        return jnp.where(live, y, 0)  # backends leave garbage in the tail

    return Grouped(0, matmul, lambda experts, x: experts(x, matmul))


def walk(size_E: Array, rows: int) -> Grouped:
    """Over blocks of rows; without a gradient, all of an expert's work on a block while it is in the cache."""
    sizes = block_rows(rows, size_E.shape[0])
    return Grouped(
        sizes[-1],
        lambda x, w: _walk(x, w, size_E, sizes),
        lambda experts, x: _walk_experts(experts, x, size_E, sizes),
    )


BEST: dict[str, Product] = {"cpu": walk}


def best() -> Product:
    """The fastest way that was measured on the default backend."""
    return BEST.get(jax.default_backend(), ragged_dot)


def block_rows(rows: int, experts: int) -> tuple[int, ...]:
    """Sizes of blocks, ascending. An expert's rows are cut into whole ones of the last size and the smallest that holds
    what is left: large products are the fast ones, and small leftovers waste little."""
    mean = max(rows // experts, 1)
    near = lambda share: SMALLEST * max(1, round(mean * share / SMALLEST))  # noqa: E731
    return tuple(sorted({min(near(share), LARGEST) for share in SHARES}))


def _loop(size_E: Array, blocks: tuple[int, ...], body: Body, init: Array) -> Array:
    """`body(carry, expert, first_row, end_row, block) -> carry` over all blocks in ascending order of rows.

    Which block it is is a loop of no turn or one: XLA:CPU updates the carry of a loop in place, that of a conditional
    it copies. What the body computes must depend on the turn, or XLA computes it before the loop, turn or no turn.
    """
    end_E = jnp.cumsum(size_E)

    def expert(e: Array, carry: Array) -> Array:
        first, end = end_E[e] - size_E[e], end_E[e]
        smaller = blocks[-2] if len(blocks) > 1 else 0
        whole = size_E[e] // blocks[-1] + (size_E[e] % blocks[-1] > smaller)
        step = lambda i, c: body(c, e, first + i * blocks[-1], end, blocks[-1])  # noqa: E731
        carry = jax.lax.fori_loop(0, whole, step, carry)
        left = first + whole * blocks[-1]
        for less, block in zip((0, *blocks), blocks[:-1], strict=False):
            chosen = (left + less < end) & (end <= left + block)
            step = lambda i, c, block=block: body(c, e, left + i * block, end, block)  # noqa: E731
            carry = jax.lax.fori_loop(0, chosen.astype(jnp.int32), step, carry)
        return carry

    return jax.lax.fori_loop(0, size_E.shape[0], expert, init)


def _rows_of_nobody_are_zero(y: Array, size_E: Array, block: int) -> Array:
    """The last block of all may have left garbage behind the last row."""
    return jax.lax.dynamic_update_slice_in_dim(y, jnp.zeros((block, *y.shape[1:]), y.dtype), size_E.sum(), 0)


def _product(x_RxI: Array, w_ExIxO: Array, size_E: Array, blocks: tuple[int, ...], contract: int) -> Array:
    """The walk; `contract` is the dim of the expert's matrix that is summed (0: x @ w, 1: x @ w.T)."""

    def body(y: Array, e: Array, row: Array, end: Array, block: int) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(x_RxI, row, block)
        w = jax.lax.dynamic_index_in_dim(w_ExIxO, e, keepdims=False)
        part = jax.lax.dot_general(rows, w, (((1,), (contract,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, part, row, 0)

    y = _loop(size_E, blocks, body, jnp.zeros((x_RxI.shape[0], w_ExIxO.shape[2 - contract]), x_RxI.dtype))
    return _rows_of_nobody_are_zero(y, size_E, blocks[-1])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _walk(x_RxI: Array, w_ExIxO: Array, size_E: Array, blocks: tuple[int, ...]) -> Array:
    """Of x with a largest block of rows of nobody at its end."""
    return _product(x_RxI, w_ExIxO, size_E, blocks, contract=0)


def _walk_fwd(x_RxI: Array, w_ExIxO: Array, size_E: Array, blocks: tuple[int, ...]):
    return _walk(x_RxI, w_ExIxO, size_E, blocks), (x_RxI, w_ExIxO, size_E)


def _walk_bwd(blocks: tuple[int, ...], saved, dy_RxO: Array):
    x_RxI, w_ExIxO, size_E = saved

    def body(dw: Array, e: Array, row: Array, end: Array, block: int) -> Array:
        mine = (row + jnp.arange(block) < end)[:, None]
        x, dy = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, row, block), 0) for a in (x_RxI, dy_RxO))
        old = jax.lax.dynamic_index_in_dim(dw, e, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(dw, old + (x.T @ dy)[None], e, 0)

    dw = _loop(size_E, blocks, body, jnp.zeros(w_ExIxO.shape, w_ExIxO.dtype))
    return _product(dy_RxO, w_ExIxO, size_E, blocks, contract=1), dw, None


_walk.defvjp(_walk_fwd, _walk_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _walk_experts(experts: Any, x_RxD: Array, size_E: Array, blocks: tuple[int, ...]) -> Array:
    def body(y: Array, e: Array, row: Array, end: Array, block: int) -> Array:
        one = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, e, keepdims=False), experts)
        part = one(jax.lax.dynamic_slice_in_dim(x_RxD, row, block), jnp.matmul)
        return jax.lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), row, 0)

    y = _loop(size_E, blocks, body, jnp.zeros(x_RxD.shape, x_RxD.dtype))
    return _rows_of_nobody_are_zero(y, size_E, blocks[-1])


def _walk_experts_fwd(experts: Any, x_RxD: Array, size_E: Array, blocks: tuple[int, ...]):
    """With a gradient, product by product: what is between them is saved, so nothing is computed twice."""
    return jax.vjp(lambda experts, x: experts(x, lambda rows, w: _walk(rows, w, size_E, blocks)), experts, x_RxD)


_walk_experts.defvjp(_walk_experts_fwd, lambda blocks, back, dy: (*back(dy), None))

"""Grouped matrix product: rows sorted by expert, each block of rows times its own expert's matrix.

`jax.lax.ragged_dot` is this on GPU and TPU. XLA:CPU lowers it to computing every expert for every row, so on CPU we
walk over blocks: each touches one expert, writes in place, and the garbage that its tail leaves is overwritten by the
next expert's first block. Work is (rows + half a block an expert) instead of rows x experts.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def grouped_matmul(x_RxI: Array, w_ExIxO: Array, size_E: Array) -> Array:
    """y_RxO[r] = x[r] @ w[e(r)] where the first size_E[0] rows belong to expert 0, and so on.

    Rows beyond sum(size_E) give zeros and no gradient, whatever they hold.
    """
    live = (jnp.arange(x_RxI.shape[0]) < size_E.sum())[:, None]
    x_RxI = jnp.where(live, x_RxI, 0)
    if jax.default_backend() == "cpu":
        y = _walk(x_RxI, w_ExIxO, size_E, block_rows(x_RxI.shape[0], w_ExIxO.shape[0]))
    else:
        y = jax.lax.ragged_dot(x_RxI, w_ExIxO, size_E.astype(jnp.int32))
    return jnp.where(live, y, 0)  # backends leave garbage in the tail


def block_rows(rows: int, experts: int) -> int:
    """Rows a block: a power of two near a quarter of the mean load, within what small matrix products do well."""
    mean = max(rows // experts, 1)
    return min(256, max(8, 1 << max(mean // 4 - 1, 0).bit_length()))


def _blocks(size_E: Array, block: int) -> tuple[Array, Array, Array, Array]:
    """number of blocks in all, and of each expert: its first block, its first row, its last row + 1."""
    end = jnp.cumsum(size_E)
    count = -(-size_E // block)
    last = jnp.cumsum(count)
    return last[-1], last - count, end - size_E, end


def _loop(size_E: Array, block: int, body, init: Array) -> Array:
    """`body(carry, expert, first_row, end_row) -> carry` over all blocks in ascending order of rows."""
    total, first_E, start_E, end_E = _blocks(size_E, block)
    last_E = first_E + -(-size_E // block)

    def step(i, carry):
        e = jnp.searchsorted(last_E, i, side="right")
        return body(carry, e, start_E[e] + (i - first_E[e]) * block, end_E[e])

    return jax.lax.fori_loop(0, total, step, init)


def _product(x_RxI: Array, w_ExIxO: Array, size_E: Array, block: int, contract: int) -> Array:
    """The walk; `contract` is the dim of the expert's matrix that is summed (0: x @ w, 1: x @ w.T)."""
    x = jnp.pad(x_RxI, ((0, block), (0, 0)))
    out = w_ExIxO.shape[2 - contract]

    def body(y, e, row, _):
        rows = jax.lax.dynamic_slice_in_dim(x, row, block)
        w = jax.lax.dynamic_index_in_dim(w_ExIxO, e, keepdims=False)
        part = jax.lax.dot_general(rows, w, (((1,), (contract,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, part, row, 0)

    y = _loop(size_E, block, body, jnp.zeros((x.shape[0], out), x.dtype))
    return y[: x_RxI.shape[0]]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _walk(x_RxI: Array, w_ExIxO: Array, size_E: Array, block: int) -> Array:
    return _product(x_RxI, w_ExIxO, size_E, block, contract=0)


def _walk_fwd(x_RxI: Array, w_ExIxO: Array, size_E: Array, block: int):
    return _walk(x_RxI, w_ExIxO, size_E, block), (x_RxI, w_ExIxO, size_E)


def _walk_bwd(block: int, saved, dy_RxO: Array):
    x_RxI, w_ExIxO, size_E = saved
    x, dy = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_RxI, dy_RxO))

    def body(dw, e, row, end):
        mine = (row + jnp.arange(block) < end)[:, None]
        rows = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, row, block), 0)
        part = rows.T @ jax.lax.dynamic_slice_in_dim(dy, row, block)
        old = jax.lax.dynamic_index_in_dim(dw, e, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(dw, old + part[None], e, 0)

    dw = _loop(size_E, block, body, jnp.zeros(w_ExIxO.shape, w_ExIxO.dtype))
    return _product(dy_RxO, w_ExIxO, size_E, block, contract=1), dw, None


_walk.defvjp(_walk_fwd, _walk_bwd)

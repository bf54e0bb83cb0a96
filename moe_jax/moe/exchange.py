"""Rows through their experts: on one device by sorting them, over devices by sorting and exchanging them.

Each device of an expert group holds the weights of E / n experts, in order. In a turn each device sends every other at
most C of the rows that want an expert there; they are computed and go back. Turns follow until all rows are served, so
nothing is dropped whatever the skew, and buffers have n * C rows, never the worst case. As long as no device wants more
than C of another that is one turn: an all-to-all there and one back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.layers import stack
from moe_jax.moe.grouped import Experts, Product, apply, times
from moe_jax.moe.megablox import LANES
from moe_jax.types import Array

AT_ONCE = 16  # rows of an expert that take hardly longer than one: its matrices are read once (measured on CPU)
LEAST = 8  # rows from which on an expert computes its own alone
# Rows that a product is then filled up to: with AVX2 7 of them cost half more than 6, and 13 a quarter more than 12.
# More sizes take long to compile.
FILLED = (3, 6, 9, 12, 24)


def here(
    experts: Experts, x_TxD: Array, expert_KxT: Array, weight_KxT: Array, num_experts: int, product: Product
) -> Array:
    """y_TxD: the weighted sum of each row through its experts; expert E is nobody and adds nothing."""
    rows_RxD, order_R, back_KxT = _through(experts, x_TxD, expert_KxT, num_experts, product)
    return _combine(rows_RxD, weight_KxT, order_R, back_KxT)


def at_once(experts: Experts, x_TxD: Array, expert_TxK: Array, num_experts: int) -> Array:
    """y_TxKxD of few rows: all experts side by side, each on C rows, in as many turns as the fullest one needs.

    XLA:CPU computes products that do not wait for each other on several cores, where it hardly divides one of few rows.
    So nothing is sorted into blocks and no expert is skipped, unless most are; or unless there are so many rows that
    each would compute many that are not its own, and so few that it has few of its own (a chunk of a stream).
    """
    E, (T, K) = num_experts, expert_TxK.shape
    x_TxD = jnp.where((expert_TxK < E).any(1, keepdims=True), x_TxD, 0)
    if 2 * T * K <= E or LEAST < T <= LEAST * E // K:
        return _own(experts, x_TxD, expert_TxK, E)
    C = max(AT_ONCE, -8 * (-3 * T * K // (16 * E)))  # half more than the mean load, in eights
    if C >= T:
        y_ExTxD = _side_by_side(experts, jnp.broadcast_to(x_TxD, (E, *x_TxD.shape)))
        return y_ExTxD.at[expert_TxK, jnp.arange(T)[:, None]].get(mode="fill", fill_value=0)
    order_R, size_E = _by_expert(expert_TxK, E)
    return _in_turns(partial(_slots, C), -(-size_E.max() // C), (expert_TxK, order_R, size_E), experts, x_TxD)


def _own(experts: Experts, x_TxD: Array, expert_TxK: Array, num_experts: int) -> Array:
    """y_TxKxD: each expert on the rows that chose it alone, and on some others that fill them up to one of a few
    numbers. The matrices of an expert that nobody chose are not read.

    With so few rows each operation is a good part of the whole, so that what can be is done for all experts at once.
    """
    E, T = num_experts, len(x_TxD)
    own_ExT = (expert_TxK == jnp.arange(E)[:, None, None]).any(-1)
    row_ExT = jnp.argsort(~own_ExT, axis=1, stable=True)  # its own come first
    place_ExT = jnp.cumsum(own_ExT, axis=1) - 1
    sizes = [*(n for n in FILLED if n < T), T]
    way_E = (own_ExT.sum(1)[:, None] > jnp.array([0, *sizes[:-1]])).sum(1)

    def some(e: int, size: int, x_TxD: Array, row_T: Array) -> Array:
        rows = x_TxD.at[row_T[:size]].get(mode="promise_in_bounds")
        return jnp.pad(apply(stack.part(experts, e), rows, times), ((0, T - size), (0, 0)))

    def one(e: int) -> Array:
        none = lambda x_TxD, row_T: jnp.zeros_like(x_TxD)  # noqa: E731
        return jax.lax.switch(way_E[e], [none, *(partial(some, e, size) for size in sizes)], x_TxD, row_ExT[e])

    y_RxD = jnp.concatenate([one(e) for e in range(E)])
    place_TxK = place_ExT.at[expert_TxK, jnp.arange(T)[:, None]].get(mode="clip")
    return y_RxD.at[jnp.where(expert_TxK < E, expert_TxK * T + place_TxK, E * T)].get(mode="fill", fill_value=0)


def _slots(C: int, turn: Array | int, plan: Any, experts: Experts, x_TxD: Array) -> Array:
    """y_TxKxD of the C rows of each expert that are served in this turn; zeros for others."""
    expert_TxK, order_R, size_E = plan
    expert_R, R = expert_TxK.reshape(-1), order_R.size
    place_ExC = (jnp.cumsum(size_E) - size_E)[:, None] + turn * C + jnp.arange(C)
    y_ExCxD = _side_by_side(experts, x_TxD[order_R.at[place_ExC].get(mode="clip") // expert_TxK.shape[1]])
    before_RxR = (expert_R[:, None] == expert_R) & (jnp.arange(R)[:, None] > jnp.arange(R))
    slot_R = before_RxR.sum(1) - turn * C
    expert_R = jnp.where((slot_R >= 0) & (slot_R < C), expert_R, size_E.size)
    return y_ExCxD.at[expert_R, slot_R].get(mode="fill", fill_value=0).reshape(*expert_TxK.shape, -1)


def _side_by_side(experts: Experts, rows_ExCxD: Array) -> Array:
    """y_ExCxD."""
    if stack.is_apart(experts):
        return jnp.stack([apply(stack.part(experts, e), rows, times) for e, rows in enumerate(rows_ExCxD)])
    return apply(experts, rows_ExCxD, jnp.matmul)


def over_devices(
    experts: Experts,
    x_TxD: Array,
    expert_KxT: Array,
    weight_KxT: Array,
    num_experts: int,
    product: Product,
    *,
    group: int,
    share: float,
) -> Array:
    """The same on each device of a group of n, within `sharding.on_each_device`; `experts` are its own, E / n of them.

    Args:
      share: C, as a multiple of the rows that one device has for another when loads are balanced. Room is held, copied
        and sent whether it is used or not; too little of it costs turns (`benchmarks/exchange.py`).
    """
    order_R, size_E = _by_expert(expert_KxT, num_experts)
    C = min(max(-int(-share * order_R.size // group), 1), order_R.size)
    to_nxE = size_E.reshape(group, -1)  # E / n columns: how many rows each expert of each device gets from here
    turns = sharding.largest(-(-to_nxE.sum(1).max() // C))
    plan = (order_R, to_nxE, sharding.swap(to_nxE))
    return _in_turns(partial(_turn, C, product), turns, plan, experts, (x_TxD, weight_KxT))


def _turn(
    C: int, product: Product, turn: Array | int, plan: Any, experts: Experts, positions: tuple[Array, Array]
) -> Array:
    """y_TxD of the assignments that are served in this turn."""
    order_R, to_nxE, from_nxE = plan
    x_TxD, weight_KxT = positions
    place_C = turn * C + jnp.arange(C)  # in the queue from one device to another, which is sorted by expert
    ready_n = to_nxE.sum(1)
    first_n = jnp.cumsum(ready_n) - ready_n
    sent_nxC = order_R.at[first_n[:, None] + place_C].get(mode="clip")
    sent_S = jnp.where(place_C < ready_n[:, None], sent_nxC, order_R.size).reshape(-1)
    slot_KxT = _inverse(sent_S, weight_KxT.shape)
    expert_S = (place_C[:, None] >= jnp.cumsum(from_nxE, axis=1)[:, None]).sum(-1).reshape(1, -1)
    rows_SxD = sharding.swap(_take(x_TxD, sent_S, slot_KxT))
    rows_RxD, order_R, back_1xS = _through(experts, rows_SxD, expert_S, to_nxE.shape[1], product)
    rows_SxD = sharding.swap(_take(rows_RxD, back_1xS[0], order_R[None]))
    return _combine(rows_SxD, weight_KxT, sent_S, slot_KxT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turns(one: Callable[..., Array], turns: Array, plan: Any, experts: Experts, x: Any) -> Array:
    """The sum over turns of `one(turn, plan, experts, x)`; there is one at least.

    Its gradient keeps what the first turn saves, and computes later ones again: their number is only known to data.
    """
    more = lambda i, y: y + one(i, plan, experts, x)  # noqa: E731
    return jax.lax.fori_loop(1, turns, more, one(0, plan, experts, x))


def _in_turns_fwd(one: Callable[..., Array], turns: Array, plan: Any, experts: Experts, x: Any):
    y, back = jax.vjp(partial(one, 0, plan), experts, x)
    y = jax.lax.fori_loop(1, turns, lambda i, y: y + one(i, plan, experts, x), y)
    return y, (back, turns, plan, experts, x)


def _in_turns_bwd(one: Callable[..., Array], saved: Any, dy: Array):
    back, turns, plan, experts, x = saved

    def more(i: Array, gradients: Any) -> Any:
        return jax.tree.map(jnp.add, gradients, jax.vjp(partial(one, i, plan), experts, x)[1](dy))

    return None, None, *jax.lax.fori_loop(1, turns, more, back(dy))


_in_turns.defvjp(_in_turns_fwd, _in_turns_bwd)


def _through(
    experts: Experts, x_TxD: Array, expert_KxT: Array, num_experts: int, product: Product
) -> tuple[Array, Array, Array]:
    """(rows_RxD, order_R, back_KxT): rows sorted by expert and through it, which assignment each is (K * T: none), and
    where each assignment is; beyond the end if it is to nobody, whose rows may hold anything.
    """
    order_R, size_E = _by_expert(expert_KxT, num_experts)
    grouped = product(size_E, order_R.size)
    order_R = jnp.pad(order_R, (0, grouped.spare), constant_values=order_R.size)
    back_KxT = jnp.where(expert_KxT < num_experts, _inverse(order_R, expert_KxT.shape), order_R.size)
    return grouped.apply(experts, _take(x_TxD, order_R, back_KxT)), order_R, back_KxT


def _by_expert(expert_KxT: Array, num_experts: int) -> tuple[Array, Array]:
    """(order_R, size_E): assignments sorted by expert, and how many each has; those to nobody come last."""
    expert_R = expert_KxT.reshape(-1)
    size_E = (expert_R[None] == jnp.arange(num_experts)[:, None]).sum(1)  # TPU counts faster than it scatters
    return jnp.argsort(expert_R, stable=True), size_E


def _inverse(index_S: Array, shape: tuple[int, ...]) -> Array:
    """Of `shape`: where in `index_S` each number is; S where it is not."""
    S = index_S.size
    where = jnp.full((math.prod(shape),), S, jnp.int32).at[index_S].set(jnp.arange(S), mode="drop", unique_indices=True)
    return where.reshape(shape)


def _rows(x_TxD: Array, index: Array, mode: str = "fill") -> Array:
    """x[index]; of an index beyond the end zeros, or the last row (`mode` "clip").

    In a TPU's memory a matrix lies in tiles of eight rows, and all are read for one of them; a row that is a matrix of
    its own is read alone.
    """
    T, D = x_TxD.shape
    x = x_TxD.reshape(T, -1, LANES) if D % LANES == 0 else x_TxD
    return x.at[index].get(mode=mode, fill_value=0).reshape(*index.shape, D)


def _sum(rows_RxD: Array, back_KxT: Array, weight_KxT: Array) -> Array:
    """y_TxD, weighted. A gather for each choice: XLA:TPU takes two to four times as long for one and its reduction."""
    terms = (_rows(rows_RxD, back_T) * weight_T[:, None] for back_T, weight_T in zip(back_KxT, weight_KxT, strict=True))
    return reduce(jnp.add, terms).astype(rows_RxD.dtype)


@jax.custom_vjp
def _take(x_TxD: Array, index: Array, inverse_KxT: Array) -> Array:
    """x[index % T]: assignment k * T + t is row t. `inverse_KxT` says where each copy of a row went.

    Its transpose is a gather by the inverse, where autodiff would write a slow scatter.
    """
    return _rows(x_TxD, index % len(x_TxD), "clip")


def _take_bwd(inverse_KxT: Array, dy: Array):
    return _sum(dy, inverse_KxT, jnp.ones(inverse_KxT.shape)), None, None


_take.defvjp(lambda x, index, inverse: (_take(x, index, inverse), inverse), _take_bwd)


@jax.custom_vjp
def _combine(rows_RxD: Array, weight_KxT: Array, order_R: Array, back_KxT: Array) -> Array:
    """y_TxD: the weighted sum of each position's rows.

    Its transpose multiplies where rows are sorted: dy is not copied for each choice.
    """
    return _sum(rows_RxD, back_KxT, weight_KxT)


def _combine_bwd(saved: tuple[Array, Array, Array, Array], dy_TxD: Array):
    rows_RxD, weight_KxT, order_R, back_KxT = saved
    dy_RxD = _rows(dy_TxD, order_R % len(dy_TxD), "clip")
    weight_R = weight_KxT.reshape(-1).at[order_R].get(mode="clip").astype(dy_RxD.dtype)
    dweight_R = (rows_RxD.astype(jnp.float32) * dy_RxD).sum(1)
    return dy_RxD * weight_R[:, None], dweight_R.at[back_KxT].get(mode="fill", fill_value=0), None, None


_combine.defvjp(lambda *args: (_combine(*args), args), _combine_bwd)

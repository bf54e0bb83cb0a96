"""A dispatch is a value that knows how to send positions to experts, multiply there, and bring them back.

    y = dispatch.apply(experts, x)     # the weighted sum of a position's experts

`experts` are `grouped.Experts`; in what layout of rows they compute is the dispatch's choice: they know neither
capacity nor raggedness, nor on which device they are. All dispatches that drop nothing agree to rounding. Everything is
by index: a one-hot product would leak NaN out of padding and build a [B, L, K, E, C] tensor. `Dispatcher` is (decision,
num_experts) -> Dispatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.moe import exchange
from moe_jax.moe.grouped import Experts, Product, apply, best
from moe_jax.sharding import constrain
from moe_jax.types import Array, RoutingDecision


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """apply: (experts, x_BxLxD) -> y_BxLxD; dropped: lost assignments."""

    apply: Callable[[Experts, Array], Array]
    dropped: Array


Dispatcher = Callable[[RoutingDecision, int], Dispatch]


def ragged(decision: RoutingDecision, num_experts: int, *, product: Product | None = None) -> Dispatch:
    """Dropless: assignments sorted by expert, grouped matrix products (by default the backend's best way). Padding
    sorts behind everyone and is not computed.
    """
    through = partial(exchange.here, num_experts=num_experts, product=product or best())
    return Dispatch(partial(_by_position, through, decision), jnp.zeros(()))


def exchanged(
    decision: RoutingDecision, num_experts: int, *, share: float = 1.25, product: Product | None = None
) -> Dispatch:
    """Dropless over the devices of a mesh: each sorts its own rows and exchanges them with those that hold their
    experts (`exchange.over_devices`, also for `share`); padding stays where it is. Where every device holds all experts
    nothing moves. On one device, or if rows of the batch do not divide over the mesh, it is `ragged`.
    """
    devices, group = sharding.devices("batch"), sharding.devices("expert")
    if devices == 1 or decision.expert_BxLxK.shape[0] % devices:
        return ragged(decision, num_experts, product=product)
    apart = group > 1 and num_experts % group == 0
    through = partial(exchange.over_devices, group=group, share=share) if apart else exchange.here
    through = partial(through, num_experts=num_experts, product=product or best())

    def run(experts: Experts, x_BxLxD: Array) -> Array:
        one = lambda experts, decision, x: _by_position(through, decision, experts, x)  # noqa: E731
        word = "expert" if apart else None
        return sharding.with_parameters(one, experts, word, ("batch", "batch"), "batch")(decision, x_BxLxD)

    return Dispatch(run, jnp.zeros(()))


def slots(decision: RoutingDecision, num_experts: int, *, factor: float = 1.25) -> Dispatch:
    """Capacity: each expert takes at most C = ceil(factor * L * K / E) assignments of a row of the batch; later ones
    are dropped.

    Priority is by position, then by choice. (Choice first, as GShard has it, lets a later token push out an earlier
    one: it leaks the future in a causal model.) Fixed shapes, so it shards by all-to-all: rows lie by batch before,
    by expert between.
    """
    B, L, K = decision.expert_BxLxK.shape
    E = num_experts
    C = min(max(-int(-factor * L * K // E), 1), L * K)
    expert_BxR = decision.expert_BxLxK.reshape(B, L * K)
    mine_BxRxE = jax.nn.one_hot(expert_BxR, E, dtype=jnp.int32)
    rank_BxR = (jnp.cumsum(mine_BxRxE, axis=1) * mine_BxRxE).sum(2) - 1
    kept_BxR = (expert_BxR < E) & (rank_BxR < C)
    slot_BxR = jnp.where(kept_BxR, expert_BxR * C + rank_BxR, E * C)
    # The assignment in each slot; L * K where the slot is empty. Under vmap, or XLA adds all-gathers.
    source_BxS = jax.vmap(lambda s: jnp.full((E * C + 1,), L * K, jnp.int32).at[s].set(jnp.arange(L * K)))(slot_BxR)
    source_BxS = source_BxS[:, : E * C]

    def send(x_BxLxD: Array) -> Array:
        filled = (source_BxS < L * K)[..., None]
        rows = jax.vmap(lambda x, s: x[jnp.minimum(s, L * K - 1) // K])(x_BxLxD, source_BxS)
        rows = jnp.where(filled, rows, 0).reshape(B, E, C, -1)
        return constrain(constrain(rows, "batch", None, None, None), "group", "expert", None, None)

    def recv(rows_BxExCxD: Array) -> Array:
        rows = constrain(constrain(rows_BxExCxD, "group", "expert", None, None), "batch", None, None, None)
        rows = rows.reshape(B, E * C, -1)
        y = jax.vmap(lambda r, s: r[s])(rows, jnp.minimum(slot_BxR, E * C - 1))
        y = jnp.where(kept_BxR[..., None], y, 0)
        return _combine(y.reshape(B, L, K, -1), decision)

    def matmul(rows_BxExCxI: Array, w_ExIxO: Array) -> Array:
        return jnp.einsum("beci,eio->beco", rows_BxExCxI, w_ExIxO)

    dropped = ((expert_BxR < E) & ~kept_BxR).sum().astype(jnp.float32)
    return Dispatch(lambda experts, x: recv(apply(experts, send(x), matmul)), dropped)


def gathered(decision: RoutingDecision, num_experts: int) -> Dispatch:
    """Dropless for a handful of positions (decoding): read only the chosen experts' matrices."""
    expert_BxLxK = jnp.minimum(decision.expert_BxLxK, num_experts - 1)
    real_BxLxK = decision.expert_BxLxK < num_experts

    def send(x_BxLxD: Array) -> Array:
        return jnp.where(real_BxLxK[..., None], x_BxLxD[:, :, None], 0)  # NaN in padding must not reach a gradient

    def matmul(rows_BxLxKxI: Array, w_ExIxO: Array) -> Array:
        return jnp.einsum("blki,blkio->blko", rows_BxLxKxI, w_ExIxO[expert_BxLxK])

    return Dispatch(lambda experts, x: _combine(apply(experts, send(x), matmul), decision), jnp.zeros(()))


def side_by_side(decision: RoutingDecision, num_experts: int) -> Dispatch:
    """Dropless for few positions (decoding): every expert on a few rows at once (`exchange.at_once`)."""
    B, L, K = decision.expert_BxLxK.shape

    def run(experts: Experts, x_BxLxD: Array) -> Array:
        x_TxD, expert_TxK = x_BxLxD.reshape(B * L, -1), decision.expert_BxLxK.reshape(B * L, K)
        y_TxKxD = exchange.at_once(experts, x_TxD, expert_TxK, num_experts)
        return _combine(y_TxKxD.reshape(B, L, K, -1), decision)

    return Dispatch(run, jnp.zeros(()))


FEW = 128  # positions of a decoding step (measured on CPU)
WRITTEN_OUT = 32  # experts: a program that writes out more takes long to compile
GATHER_ROWS = 8  # below this many assignments reading the chosen matrices beats sorting


def dropless(decision: RoutingDecision, num_experts: int, *, product: Product | None = None) -> Dispatch:
    """The default, chosen by shape at trace time: for few positions `side_by_side` on one CPU and `gathered` elsewhere,
    `exchanged` above.
    """
    B, L, K = decision.expert_BxLxK.shape
    on_cpu = sharding.kind()[0] == "cpu" and sharding.devices("batch") == 1
    if on_cpu and B * L <= FEW and num_experts <= WRITTEN_OUT:
        return side_by_side(decision, num_experts)
    if B * L * K <= GATHER_ROWS:
        return gathered(decision, num_experts)
    return exchanged(decision, num_experts, product=product)


def _by_position(through: Callable[..., Array], decision: RoutingDecision, experts: Experts, x_BxLxD: Array) -> Array:
    """y_BxLxD; `through(experts, x_TxD, expert_KxT, weight_KxT) -> y_TxD` knows no batch."""
    by_choice = lambda a_BxLxK: a_BxLxK.reshape(-1, a_BxLxK.shape[-1]).T  # noqa: E731
    x_TxD = x_BxLxD.reshape(-1, x_BxLxD.shape[-1])
    y_TxD = through(experts, x_TxD, by_choice(decision.expert_BxLxK), by_choice(decision.weight_BxLxK))
    return y_TxD.reshape(x_BxLxD.shape)


def _combine(y_BxLxKxD: Array, decision: RoutingDecision) -> Array:
    """The weighted sum over choices; a choice of weight nobody contributes nothing, not even NaN."""
    weight = decision.weight_BxLxK[..., None].astype(y_BxLxKxD.dtype)
    real = decision.weight_BxLxK[..., None] > 0
    return (jnp.where(real, y_BxLxKxD, 0) * weight).sum(axis=2)

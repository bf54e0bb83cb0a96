"""The MoE feed-forward layer: decide, dispatch, compute, count."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.layers.param import Module, Rngs, linear, normal, param
from moe_jax.moe import dispatch as dispatches
from moe_jax.moe.experts import Gated
from moe_jax.moe.grouped import Experts
from moe_jax.moe.routers import MAX_TASKS, TopK
from moe_jax.types import Array, RouterStats, RoutingDecision, TokenInfo


class MoeFfn(Module):
    """A feed-forward layer of `num_experts` experts of `hidden` units each.

    Args:
      d: model width.
      router, experts: configured classes, called with (d, num_experts, rngs=...).
      dispatch: a `Dispatcher`, in training.
      evaluation: that of evaluation and decoding, which should never drop.
    shared: a configured dense layer that every position goes through besides (DeepSeek's shared experts as one).
    gated_shared: its output is weighed by a sigmoid gate of its own (Qwen2-MoE).
    """

    def __init__(
        self,
        d: int,
        *,
        num_experts: int = 8,
        hidden: int,
        router: Callable[..., Module] = TopK,
        experts: Callable[..., Experts] = Gated,
        dispatch: dispatches.Dispatcher = dispatches.dropless,
        evaluation: dispatches.Dispatcher = dispatches.dropless,
        shared: Callable[..., Module] | None = None,
        gated_shared: bool = False,
        rngs: Rngs,
    ):
        self.num_experts, self.hidden = num_experts, hidden
        self.router = router(d, num_experts, rngs=rngs)
        self.experts = experts(d, num_experts, hidden=hidden, rngs=rngs)
        self.dispatch, self.evaluation = dispatch, evaluation
        self.shared, self.gated_shared = None if shared is None else shared(d, rngs=rngs), gated_shared
        self.shared_gate = param(rngs, (d, 1), ("embed", None), normal(0.02)) if gated_shared else None

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> tuple[Array, RouterStats]:
        decision = self.router(x_BxLxD, info, key)
        to = (self.evaluation if key is None else self.dispatch)(decision, self.num_experts)
        y_BxLxD = to.apply(self.experts, x_BxLxD)
        if self.shared is not None:
            h_BxLxD, _ = self.shared(x_BxLxD, info)
            if self.shared_gate is not None:
                x_BxLxD = jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)
                h_BxLxD *= jax.nn.sigmoid(linear(x_BxLxD, self.shared_gate[...]))
            y_BxLxD += h_BxLxD
        return y_BxLxD, router_stats(decision, info, to.dropped, self.num_experts)


def router_stats(decision: RoutingDecision, info: TokenInfo, dropped: Array, num_experts: int) -> RouterStats:
    """Sums over valid positions; only `prob_E` and `z` carry gradients (to the router)."""
    valid = info.valid_BxL.astype(jnp.float32)
    logits = decision.logits_BxLxE
    prob = jax.nn.softmax(logits, axis=-1) * valid[..., None]
    z = jax.nn.logsumexp(logits, axis=-1)
    surprise = jax.lax.stop_gradient(jax.nn.log_softmax(logits, axis=-1))
    # Counted by comparing and one product, which TPUs do faster than they scatter; nobody (E) is in no column.
    mine_BxLxE = jax.nn.one_hot(decision.expert_BxLxK, num_experts).sum(2)
    task_BxLxT = jax.nn.one_hot(info.task_BxL, MAX_TASKS)
    load = jnp.einsum("blt,ble->te", task_BxLxT, mine_BxLxE)
    target_nll, target_T, found_T = jnp.zeros(()), jnp.zeros(MAX_TASKS), jnp.zeros(MAX_TASKS)
    if (target := decision.target_BxLxE) is not None:
        asked = target.any(-1)
        logp = jax.nn.log_softmax(logits, axis=-1)
        # Finite where nothing is asked for: of a sum over nobody the gradient would be NaN.
        target_nll = -jnp.where(asked, jax.nn.logsumexp(jnp.where(target, logp, -1e9), axis=-1), 0).sum()
        found = (mine_BxLxE * target).any(-1)
        target_T, found_T = (jnp.einsum("blt,bl->t", task_BxLxT, of.astype(jnp.float32)) for of in (asked, found))
    return RouterStats(
        load_E=load.sum(0),
        prob_E=prob.sum((0, 1)),
        z=(z * z * valid).sum(),
        entropy=-(jax.lax.stop_gradient(prob) * surprise).sum(),
        dropped=jax.lax.stop_gradient(dropped),
        task_load_TxE=load,
        count=valid.sum(),
        target_nll=target_nll,
        target_T=target_T,
        found_T=found_T,
    )

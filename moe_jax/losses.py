"""Losses: pure functions of logits and of statistics. Layers never know them; the model adds them from one table of
weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import xlogy

from moe_jax.types import Array, RouterStats


def xent(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    """nll_BxL: the negative log-likelihood of each target, float32, in nats."""
    logits = logits_BxLxV.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets_BxL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def smoothed(nll_BxL: Array, logits_BxLxV: Array, targets_BxL: Array, vocab: int, share: float) -> Array:
    """The cross-entropy with a target of 1 - `share`, and `share` spread evenly over all (Szegedy et al. 2016), of the
    `nll_BxL` of `xent`, which already has the one sum of exponentials that is needed; columns beyond `vocab` are
    nobody's."""
    logits = logits_BxLxV.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets_BxL[..., None], axis=-1)[..., 0]
    mean = jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, 0).sum(-1) / vocab
    return nll_BxL + share * (chosen - mean)


def smoothed_xent(logits_BxLxV: Array, targets_BxL: Array, smoothing: float) -> Array:
    """kl_BxL: from the target with probability 1 - smoothing, the others sharing the rest evenly, float32, in nats
    (label smoothing, Szegedy et al. 2016, as ESPnet and WeNet have it; 0 where the model says just that)."""
    V = logits_BxLxV.shape[-1]
    logp = jax.nn.log_softmax(logits_BxLxV.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logp, targets_BxL[..., None], axis=-1)[..., 0]
    each = smoothing / (V - 1)
    entropy = xlogy(1 - smoothing, 1 - smoothing) + xlogy(smoothing, each)
    return entropy - (1 - smoothing) * chosen - each * (logp.sum(-1) - chosen)


def ctc(logits_BxLxV: Array, valid_BxL: Array, tokens_BxU: Array, wanted_BxU: Array) -> Array:
    """nll_B of the tokens under all their alignments (Graves et al. 2006); id 0 is the blank. Valid frames and wanted
    tokens lie at the beginning of their rows. A row whose tokens do not fit into its frames counts 0, and so does its
    gradient."""
    logits = jnp.where(valid_BxL[..., None], logits_BxLxV.astype(jnp.float32), 0)
    nll_B = optax.ctc_loss(logits, ~valid_BxL * 1.0, tokens_BxU, ~wanted_BxU * 1.0)
    again_B = (wanted_BxU[:, 1:] & (tokens_BxU[:, 1:] == tokens_BxU[:, :-1])).sum(1)
    return jnp.where(valid_BxL.sum(1) >= wanted_BxU.sum(1) + again_B, nll_B, 0)


def load_balance(stats: RouterStats) -> Array:
    """Switch balance loss E * sum_e f_e P_e (Fedus et al. 2022), the mean over layers; 1 when perfectly balanced.

    f is the share of assignments (no gradient), P the mean probability (gradient to the gate), both over valid
    positions.
    """
    share = stats.load_E / jnp.maximum(stats.load_E.sum(-1, keepdims=True), 1)
    prob = stats.prob_E / jnp.maximum(stats.count[..., None], 1)
    return (share * prob).sum(-1).mean() * stats.load_E.shape[-1]


def router_z(stats: RouterStats) -> Array:
    """Mean squared logsumexp of the router's logits (ST-MoE, Zoph et al. 2022), the mean over layers."""
    return (stats.z / jnp.maximum(stats.count, 1)).mean()


def task_balance(stats: RouterStats) -> Array:
    """The balance loss with each task weighing the same: a task with few tokens cannot be crowded out of its expert.

    E * mean over present tasks of sum_e f_{t,e} P_e, with the batch's mean probability P (gradient to the gate).
    """
    load = stats.task_load_TxE
    total = load.sum(-1, keepdims=True)
    prob = stats.prob_E / jnp.maximum(stats.count[..., None], 1)
    per_task = (load / jnp.maximum(total, 1) * prob[..., None, :]).sum(-1) * load.shape[-1]
    present = total[..., 0] > 0
    return (jnp.where(present, per_task, 0).sum(-1) / jnp.maximum(present.sum(-1), 1)).mean()


def task_map(stats: RouterStats) -> Array:
    """Mean -log probability of the experts that the task map asks for (`task_routers.TaskMapped`), the mean over
    layers; 0 for routers without a map. Our addition to NeKo: in a short fine-tuning the gradient through the mixing
    weights alone is too weak for free routing to find the mapped experts."""
    return (stats.target_nll / jnp.maximum(jnp.sum(stats.target_T, axis=-1), 1)).mean()


AUXILIARY = {
    "load_balance": load_balance,
    "router_z": router_z,
    "task_balance": task_balance,
    "task_map": task_map,
}


def auxiliary(stats: RouterStats | None, weights: Mapping[str, float]) -> tuple[Array | float, dict[str, Array]]:
    """The weighted sum of the auxiliary losses, and each one's plain value for the log.

    Raises ValueError for a name that is not in `AUXILIARY`.
    """
    unknown = set(weights) - set(AUXILIARY)
    if unknown:
        raise ValueError(f"unknown auxiliary loss {sorted(unknown)}; known: {', '.join(AUXILIARY)}")
    if stats is None:
        return 0.0, {}
    values = {name: AUXILIARY[name](stats) for name in AUXILIARY}
    return sum((w * values[name] for name, w in weights.items() if w), jnp.zeros(())), values

"""Optimisers: optax chains over the flat table path -> array of what trains (`adapters.Adapters` says what does)."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon


def warmup_linear(peak: float, *, steps: int, warmup: int = 100, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up to `peak`, then linear decay to `final * peak` at `steps`."""
    warmup = min(warmup, max(steps // 2, 1))
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, final * peak, max(steps - warmup, 1))],
        [warmup],
    )


def warmup_cosine(peak: float, *, steps: int, warmup: int = 100, final: float = 0.1) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine decay to `final * peak` at `steps`."""
    warmup = min(warmup, max(steps // 2, 1))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final * peak)


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.05,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; matrices decay, vectors do not."""
    decay = lambda table: {p: not re.search(r"(scale|taps|bias)$", p) for p in table}  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=decay)
    )


def muon_adam(
    schedule: optax.Schedule,
    *,
    adam_scale: float = 0.3,
    weight_decay: float = 0.05,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, each layer and each expert on its own; Adam for
    embeddings, norms, convolutions, router gates, task adapters and LoRA's factors, at `adam_scale` times the learning
    rate."""

    def matrices(table):
        # Not the adapters: a Muon step has the same size however small the momentum is, and so the adapter of a task
        # that a batch has nothing of would move by a whole one, along what is left of other batches' gradients.
        is_matrix = re.compile(r"(^|/)(dense_)?blocks/.*/(q|k|v|p|o|gate|up|down)$")
        return {
            p: MuonDimensionNumbers((x.ndim - 2,), (x.ndim - 1,))
            if is_matrix.search(p) and "router" not in p and "/adapter/" not in p and x.ndim >= 2
            else None
            for p, x in table.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(clip),
        muon(
            schedule,
            weight_decay=weight_decay,
            adam_learning_rate=lambda step: adam_scale * schedule(step),
            adam_b2=0.95,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        ),
    )


class Guarded(NamedTuple):
    """State of `guarded`: that of what it guards, the running mean of the norms of the gradients that were followed,
    how many these are, and how many updates in a row were left out."""

    inner: Any
    norm: jax.Array
    followed: jax.Array
    in_row: jax.Array


def guarded(
    inner: optax.GradientTransformation, *, spike: float = 0.0, settle: int = 50
) -> optax.GradientTransformationExtraArgs:
    """Leaves an update out, the state of `inner` as it was, where the gradient is not finite, or the `loss` that is
    given to `update` beside it; with `spike` also where the gradient's norm is more than so many times the running mean
    (over about `settle` of them, and not before so many).

    The state is in checkpoints like any other, so a resumed run leaves out the same updates.
    """

    def init(params: Any) -> Guarded:
        return Guarded(inner.init(params), jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, loss: Any = 0.0, **_: Any) -> tuple[Any, Guarded]:
        norm = optax.tree.norm(updates).astype(jnp.float32)
        ok = jnp.isfinite(norm) & jnp.isfinite(loss)
        if spike:
            ok &= (state.followed < settle) | (norm <= spike * state.norm)
        either = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)  # noqa: E731
        followed = either(updates, jax.tree.map(jnp.zeros_like, updates))
        made, moved = inner.update(followed, state.inner, params)
        rate = 1 / jnp.minimum(state.followed + 1, settle)
        new = Guarded(moved, state.norm + rate * (norm - state.norm), state.followed + 1, jnp.zeros((), jnp.int32))
        old = state._replace(in_row=state.in_row + 1)
        return either(made, jax.tree.map(jnp.zeros_like, made)), either(new, old)

    return optax.GradientTransformationExtraArgs(init, update)

"""Optimisers: schedules by hand, what stands still, and that stacked matrices are stepped one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import optim

RATE = 0.1


def constant(step):
    return RATE


def step(transform: Any, params: dict[str, Any], times: int = 2) -> dict[str, Any]:
    """Parameters after steps along gradients that depend on the path and the parameters alone."""

    def one(carry, _):
        params, state = carry
        grads = {path: jnp.sin(9 * x + len(path)) for path, x in params.items()}
        updates, state = transform.update(grads, state, params)
        return ({path: x + updates[path] for path, x in params.items()}, state), None

    return jax.jit(lambda params: jax.lax.scan(one, (params, transform.init(params)), None, times)[0][0])(params)


@pytest.mark.parametrize("make", [optim.adamw, optim.muon_adam])
def test_every_matrix_of_a_stack_is_stepped_as_it_would_be_alone(make):
    """Layers and experts do not know of each other: [2 layers, 3 experts, 4, 6] is six matrices."""
    stacked = {"blocks/ffn/experts/up": jax.random.normal(jax.random.key(0), (2, 3, 4, 6))}
    together = step(make(constant, clip=1e9), stacked)["blocks/ffn/experts/up"]
    for layer in range(2):
        for expert in range(3):
            alone = {path: x[layer, expert] for path, x in stacked.items()}
            one = step(make(constant, clip=1e9), alone)["blocks/ffn/experts/up"]
            np.testing.assert_allclose(together[layer, expert], one, atol=1e-5)


def test_the_adapter_of_a_task_that_batches_lack_comes_to_rest():
    path = "decoder/blocks/feed/adapter/experts/up"
    params = {path: jnp.ones((1, 2, 4, 6)), "blocks/ffn/experts/up": jnp.ones((1, 2, 4, 6))}
    transform = optim.muon_adam(constant, weight_decay=0.0, clip=1e9)
    state, moves = transform.init(params), []
    for number in range(20):  # one batch, then 19 without the task
        grads = {p: jax.random.normal(jax.random.key(1), x.shape) * (number == 0) for p, x in params.items()}
        updates, state = transform.update(grads, state, params)
        moves.append({p: float(jnp.abs(x).mean()) for p, x in updates.items()})
    assert moves[-1][path] < 0.3 * moves[0][path]
    assert moves[-1]["blocks/ffn/experts/up"] > 0.9 * moves[0]["blocks/ffn/experts/up"]


def test_muon_makes_the_update_of_a_matrix_orthogonal_and_leaves_the_rest_to_adam():
    params = {
        "blocks/attention/q": jnp.eye(8),
        "blocks/ffn/router/gate": jnp.ones((8, 4)),
        "embedding": jnp.ones((9, 8)),
    }
    plain: dict[str, Any] = {"weight_decay": 0.0, "clip": 1e9}
    adam = optax.nadamw(0.3 * RATE, b2=0.95, weight_decay=0.0)  # Muon's Adam is Nesterov's too
    after, by_adam = step(optim.muon_adam(constant, **plain), params), step(adam, params)
    for path in ("blocks/ffn/router/gate", "embedding"):
        np.testing.assert_allclose(after[path], by_adam[path], atol=1e-5)
    after = step(optim.muon_adam(constant, **plain), params, 1)
    singular = np.linalg.svd(after["blocks/attention/q"] - params["blocks/attention/q"], compute_uv=False)
    assert singular.max() / singular.min() < 2.5
    size = np.sqrt((singular**2).sum() / 64)
    np.testing.assert_allclose(size, 0.2 * RATE, rtol=0.3)  # the root mean square that Adam's updates have


def test_matrices_decay_and_scales_do_not():
    params = {
        "blocks/ffn/up": jnp.full((2, 4, 4), 5.0),
        "norm/scale": jnp.full(4, 5.0),
        "blocks/conv/taps": jnp.full((4, 4), 5.0),
        "blocks/attention/q_bias": jnp.full((2, 4), 5.0),
    }
    zero = {path: jnp.zeros_like(x) for path, x in params.items()}
    transform: Any = optim.adamw(constant, weight_decay=0.05)
    updates, _ = transform.update(zero, transform.init(params), params)
    np.testing.assert_allclose(updates["blocks/ffn/up"], -RATE * 0.05 * 5, rtol=1e-5)
    assert not any(x.any() for path, x in updates.items() if path != "blocks/ffn/up")


def test_schedules_by_hand():
    linear = optim.warmup_linear(1.0, steps=100, warmup=10, final=0.2)
    np.testing.assert_allclose([linear(s) for s in (0, 5, 10, 55, 100, 200)], [0, 0.5, 1, 0.6, 0.2, 0.2], atol=1e-6)
    cosine = optim.warmup_cosine(1.0, steps=110, warmup=10, final=0.2)
    np.testing.assert_allclose([cosine(s) for s in (0, 5, 10, 60, 110, 200)], [0, 0.5, 1, 0.6, 0.2, 0.2], atol=1e-6)


@pytest.mark.parametrize("schedule", [optim.warmup_linear, optim.warmup_cosine])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_short_runs_warm_up_for_half_of_their_steps_at_most(schedule, steps):
    rates = [float(schedule(1.0, steps=steps, warmup=100)(s)) for s in range(steps + 1)]
    assert np.isfinite(rates).all() and max(rates) == pytest.approx(1.0)

"""Weights in fewer bytes: what is held how, how far off it may be, and that every way of decoding reads it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import decode, lanes, quantise, tree
from moe_jax.models.corrector import Corrector
from moe_jax.moe.layer import MoeFfn
from moe_jax.quantise import Held
from tests import tiny

PROMPTS = [[5, 9, 4, 8], [7, 3, 3, 12, 20, 6, 11], [2, 2]]
MODEL = tiny.model(partial(MoeFfn, num_experts=3, hidden=8))


def exact(model: Corrector, held: Corrector) -> Corrector:
    """`model` with the float32 matrices that `held` is read as."""
    whole = jax.tree.map(lambda h: h[...] if isinstance(h, Held) else h, held, is_leaf=lambda h: isinstance(h, Held))
    return tree.unflatten(model, tree.flatten(whole))


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5), (2, 3, 6, 5)])
def test_int8_is_off_by_half_a_step_of_its_channel_at_most(shape):
    w = jax.random.normal(jax.random.key(0), shape) * jnp.arange(shape[-1])  # the first channel is all zeros
    held = quantise.int8(w)
    assert held.values.dtype == jnp.int8
    assert held.scale.shape == (*shape[:-2], 1, shape[-1])
    assert (jnp.abs(held[...] - w) <= held.scale * 0.5001).all()
    peak = jnp.abs(w).max(-2)
    np.testing.assert_allclose(jnp.abs(held[...]).max(-2), peak, rtol=1e-6)  # which is symmetric and full
    assert not held[...][..., 0].any()


@pytest.mark.parametrize("weights", quantise.HOLD)
def test_matrices_are_held_small_and_what_decides_is_not(weights):
    held = tree.flatten(quantise.hold(MODEL, weights))
    before = tree.flatten(MODEL)
    small = {name for name in before if name not in held or held[name].dtype != jnp.float32}
    ends = {name.rsplit("/", 1)[-1] for name in small}
    assert ends == {"q", "k", "v", "o", "gate", "up", "down"} | ({"embedding"} if weights == "bfloat16" else set())
    assert not any("router" in name or "norm" in name or "taps" in name for name in small)
    assert quantise.size(held) < quantise.size(before)


@pytest.mark.parametrize("weights", quantise.HOLD)
def test_held_weights_decode_as_the_float32_matrices_that_they_stand_for(weights):
    """Prompts, search, lanes and scores: stacked over layers, and apart."""
    held = quantise.hold(MODEL, weights)
    whole = exact(MODEL, held)
    reads = [decode.prefill(m, PROMPTS) for m in (held, whole)]
    np.testing.assert_allclose(reads[0].logp_BxV, reads[1].logp_BxV, atol=1e-5)
    found, expected = (decode.search(m, r, max_new=9) for m, r in zip((held, whole), reads, strict=True))
    assert [d.tokens for d in found] == [d.tokens for d in expected]
    texts = [[4, 5, 1], [6, 1], [7, 1]]
    for a, b in zip(
        *(decode.score(m, r, [0, 1, 2], texts) for m, r in zip((held, whole), reads, strict=True)), strict=True
    ):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    ((_, drawn),) = lanes.run(held, [lanes.Waiting(reads[0], [9] * 3, [0] * 3)], lanes=2, room=48)
    assert [d.tokens for d in drawn] == [d.tokens for d in expected]


def test_float32_is_the_model_itself_and_others_are_refused():
    assert quantise.hold(MODEL, "float32") is MODEL
    with pytest.raises(ValueError, match="unknown weights 'int4'; known: float32, bfloat16, int8"):
        quantise.hold(MODEL, "int4")

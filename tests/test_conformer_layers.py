"""Layers of the Conformer: the contract, the mask of chunks, and WeNet's formulas written out."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import B, Case, D, L, close, part, verify_contract, verify_padding
from test_layers import with_state, without_state

from moe_jax import tree
from moe_jax.layers import subsample
from moe_jax.layers.conv import ConformerConv
from moe_jax.layers.ffn import PlainFfn
from moe_jax.layers.param import LayerNorm, Rngs
from moe_jax.layers.relative import Chunks, RelativeAttention, sinusoids
from moe_jax.moe import dispatch, grouped
from moe_jax.moe.experts import Plain
from moe_jax.moe.layer import MoeFfn


def attention(size: int, left: int = -1) -> Case:
    def call(layer, x, info, state, key):
        return layer(x, info, state, chunks=Chunks(size, left))

    held = L if left < 0 else size * left
    return Case(partial(RelativeAttention, D, heads=4), call, lambda a, slots: a.cache(B, held))


CASES = {
    "attention in chunks of one": attention(1),
    "convolution": Case(partial(ConformerConv, D, width=5), with_state, lambda c, slots: c.state(B, D)),
    "convolution of one tap": Case(partial(ConformerConv, D, width=1), with_state, lambda c, slots: c.state(B, D)),
    "plain ffn": Case(partial(PlainFfn, D, hidden=24, activation="relu"), without_state),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    verify_contract(CASES[name])


@pytest.mark.parametrize(("size", "left"), [(3, -1), (4, 0), (5, 2)])
def test_chunk_after_chunk_is_the_whole_under_the_mask(size, left):
    case = attention(size, left)
    y, _ = case.run(case.x, case.info)
    again, _ = case.run(case.garbage(~case.valid), case.info)
    np.testing.assert_array_equal(y, again)
    call = jax.jit(case.call)
    for together in (1, 2):  # chunks in one call
        state, pieces = case.empty(case.layer, L), []
        for start in range(0, L, size * together):
            places = slice(start, start + size * together)
            piece, state = call(case.layer, case.x[:, places], part(case.info, slice(None), places), state, None)
            pieces.append(piece)
        y_chunks = np.where(case.valid, np.concatenate(pieces, 1), 0)
        close(y, y_chunks, f"chunks of {size}, {left} to the left")


@pytest.mark.parametrize(("size", "left"), [(4, 1), (3, -1), (2, 0)])
def test_the_mask_is_wenets(size, left):
    """A frame's output moves with the inputs of its chunk and of those before it that it may see, and no others."""
    case = attention(size, left)
    info = dataclasses.replace(
        case.info, valid_BxL=jnp.ones((B, L), bool), segment_BxL=jnp.ones((B, L), int), position_BxL=jnp.arange(L)[None]
    )
    run = jax.jit(lambda layer, x: case.call(layer, x, info, None, None)[0])
    y = run(case.layer, case.x)
    for j in range(L):
        moved = run(case.layer, jnp.asarray(case.x).at[:, j].add(1.0))
        changed = {int(i) for i in np.flatnonzero(np.abs(moved - y).max((0, 2)) > 1e-6)}
        first = lambda i: 0 if left < 0 else max((i // size - left) * size, 0)  # noqa: E731
        assert changed == {i for i in range(L) if first(i) <= j < (i // size + 1) * size}


def test_one_program_for_all_chunks():
    case = attention(1)
    run = jax.jit(lambda layer, x, info, chunks: layer(x, info, chunks=chunks)[0])
    whole = case.layer(case.x, case.info)[0]
    sizes = ((1, -1), (4, 1), (L, -1))
    y = {size: np.asarray(run(case.layer, case.x, case.info, Chunks(size, left))) for size, left in sizes}
    np.testing.assert_allclose(np.where(case.valid, y[1], 0), case.run(case.x, case.info)[0], atol=2e-5)
    np.testing.assert_allclose(y[L], whole, atol=2e-5)
    assert np.abs(y[4] - y[1]).max() > 0.01 < np.abs(y[4] - y[L]).max()
    assert run._cache_size() == 1


def test_attention_is_wenets_formula():
    """With q, k, p as they are there: (q + u) k + (q + v) p over the square root of a head, without a shift."""
    case = CASES["attention in chunks of one"]
    a, N = case.layer, 4
    info = jax.tree.map(lambda x: x[1:2, 3:], case.info)  # nine positions of one segment
    x = jnp.asarray(case.x[1:2, 3:])
    y, _ = a(x, info)
    heads = lambda m, w: np.asarray(m @ w[...]).reshape(-1, N, D // N).swapaxes(0, 1)  # noqa: E731
    q, k, v, p = heads(x[0], a.q), heads(x[0], a.k), heads(x[0], a.v), heads(sinusoids(jnp.arange(9), D), a.p)
    u, w = (np.asarray(b[...])[:, None] for b in (a.u_bias, a.v_bias))
    score = ((q + u) @ k.swapaxes(1, 2) + (q + w) @ p.swapaxes(1, 2)) / (D // N) ** 0.5
    expected = jax.nn.softmax(score) @ v
    expected = expected.swapaxes(0, 1).reshape(9, D) @ a.o[...] + a.o_bias[...]
    np.testing.assert_allclose(y[0], expected, atol=1e-4)


def test_sinusoids_by_turns():
    s = np.asarray(sinusoids(jnp.array([0, 3]), 4))
    np.testing.assert_allclose(s[0], [0, 1, 0, 1])
    np.testing.assert_allclose(s[1], [np.sin(3), np.cos(3), np.sin(0.03), np.cos(0.03)], rtol=1e-6)


def test_convolution_is_wenets_formula():
    """Zeros stand in front of the first pointwise product, so that its bias reaches the taps."""
    c = CASES["convolution"].layer
    info = jax.tree.map(lambda x: x[1:2, 3:], CASES["convolution"].info)
    x = np.asarray(CASES["convolution"].x[1:2, 3:])
    y, _ = c(jnp.asarray(x), info)
    padded = np.concatenate([np.zeros((4, D)), x[0]])
    a, b = np.split(padded @ c.gate[...] + c.gate_bias[...], 2, axis=-1)
    h = a * np.asarray(jax.nn.sigmoid(b))
    taps = np.asarray(c.taps[...])
    deep = np.stack([sum(taps[back] * h[i + 4 - back] for back in range(5)) for i in range(9)]) + c.taps_bias[...]
    mean, std = deep.mean(-1, keepdims=True), np.sqrt(deep.var(-1, keepdims=True) + 1e-5)
    normed = (deep - mean) / std * c.norm.scale[...] + c.norm.bias[...]
    np.testing.assert_allclose(y[0], jax.nn.silu(normed) @ c.o[...] + c.o_bias[...], atol=1e-4)


def test_layer_norm():
    rng = np.random.default_rng(0)
    norm = LayerNorm(6, rngs=Rngs(params=0))
    norm = tree.unflatten(norm, {p: jnp.asarray(rng.normal(size=6), jnp.float32) for p in tree.flatten(norm)})
    x = rng.normal(2, 3, size=(2, 3, 6)).astype(np.float32)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(x), expected * norm.scale[...] + norm.bias[...], atol=1e-5)


# --- subsampling --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def front():
    return subsample.Subsample(8, mels=20, rngs=Rngs(params=0))


def test_subsampling_is_two_convolutions(front):
    x = np.random.default_rng(0).normal(size=(2, 30, 20)).astype(np.float32)
    y, valid = front(x, jnp.ones((2, 30), bool))

    def convolved(x, w, b):
        dims = ("NHWC", "HWIO", "NHWC")
        w = w[...].reshape(3, 3, x.shape[-1], -1)
        return jax.nn.relu(jax.lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=dims) + b[...])

    h = convolved(convolved(x[..., None], front.first, front.first_bias), front.second, front.second_bias)
    np.testing.assert_allclose(y, h.reshape(2, h.shape[1], -1) @ front.o[...] + front.o_bias[...], atol=1e-4)
    assert y.shape[1] == valid.shape[1] == subsample.length(30)


@pytest.mark.parametrize("frames", range(0, 16))
def test_an_output_is_valid_if_all_that_it_is_made_of_is(front, frames):
    """As WeNet's mask[2::2][2::2]; what lies in padding moves nothing."""
    x = np.random.default_rng(0).normal(size=(1, 23, 20)).astype(np.float32)
    valid = np.arange(23)[None] < frames
    y, out = front(x, valid)
    np.testing.assert_array_equal(out, valid[:, 2::2][:, 2::2])
    assert out.sum() == subsample.length(frames)
    garbage, _ = front(np.where(valid[..., None], x, np.nan), valid)
    np.testing.assert_array_equal(np.asarray(y)[out], np.asarray(garbage)[out])


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_windows_that_overlap_give_the_whole(front, chunk):
    x = np.random.default_rng(0).normal(size=(1, 39, 20)).astype(np.float32)
    y, _ = front(x, jnp.ones((1, 39), bool))
    step, window = subsample.RATE * chunk, subsample.RATE * (chunk - 1) + subsample.WINDOW
    parts = [front(x[:, i : i + window], jnp.ones((1, window), bool))[0] for i in range(0, 39 - window + 1, step)]
    together = np.concatenate(parts, 1)
    np.testing.assert_allclose(together, y[:, : together.shape[1]], atol=1e-5)
    assert together.shape[1] == y.shape[1] // chunk * chunk


# --- plain experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["walk", "ragged_dot", "slots", "gathered", "side_by_side"])
def test_plain_experts_are_plain_layers(way):
    """Biases and their gradients too, whatever computes the products."""
    ways = {"slots": partial(dispatch.slots, factor=8.0), "gathered": dispatch.gathered}
    ways |= {"side_by_side": dispatch.side_by_side}
    to = ways.get(way) or partial(dispatch.ragged, product=getattr(grouped, way))
    make = partial(MoeFfn, D, num_experts=4, hidden=8, experts=partial(Plain, activation="relu"), evaluation=to)
    case = Case(make, lambda layer, x, info, state, key: (layer(x, info, key)[0], None))
    moe, valid = case.layer, case.info.valid_BxL

    def oracle(params, x):
        moe_now = tree.unflatten(moe, params)
        d = moe_now.router(x, case.info)
        y = 0
        for e in range(4):
            one = PlainFfn(D, hidden=8, activation="relu", rngs=Rngs(params=0))
            table = {p: params[f"experts/{p}"][e].reshape(x.shape) for p, x in tree.flatten(one).items()}
            weight = jnp.where(d.expert_BxLxK == e, d.weight_BxLxK, 0).sum(-1)
            y += weight[..., None] * tree.unflatten(one, table)(x, case.info)[0]
        y = jnp.where(valid[..., None], y, 0)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    (_, y), grads = jax.value_and_grad(oracle, has_aux=True)(tree.flatten(moe), case.x)
    close((np.asarray(y), jax.device_get(grads)), case.run(case.x, case.info), way)
    assert np.abs(grads["experts/down_bias"]).max() > 0.1
    verify_padding(case)

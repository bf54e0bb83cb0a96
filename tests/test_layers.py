"""Layers: the contract, and what each says of itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import B, Case, D, L, make_info, verify_contract

from moe_jax import tree
from moe_jax.layers import stack
from moe_jax.layers.attention import Attention, attend, frequencies, rotary, rotate
from moe_jax.layers.conv import CausalConv
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import RMSNorm, Rngs, fan_in, param


def with_state(layer, x, info, state, key):
    return layer(x, info, state)


def without_state(layer, x, info, state, key):
    return layer(x, info, key)


CASES = {
    "attention": Case(partial(Attention, D, heads=4, kv_heads=2), with_state, lambda a, slots: a.cache(B, slots)),
    "attention in blocks": Case(
        partial(Attention, D, heads=4, kv_heads=2, block=3), with_state, lambda a, slots: a.cache(B, slots)
    ),
    "attention of wide heads with biases": Case(
        partial(
            Attention,
            D,
            heads=2,
            kv_heads=1,
            head=12,
            bias=True,
            window=64,
            rope_scaling={"rope_type": "linear", "factor": 2.0},
        ),
        with_state,
        lambda a, slots: a.cache(B, slots),
    ),
    "conv": Case(partial(CausalConv, D), with_state, lambda c, slots: c.state(B, D)),
    "conv of one tap": Case(partial(CausalConv, D, width=1), with_state, lambda c, slots: c.state(B, D)),
    "dense ffn": Case(partial(DenseFfn, D, hidden=24), without_state),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    verify_contract(CASES[name])


@pytest.mark.parametrize("name", ["attention", "attention in blocks"])
def test_attention_equals_a_loop(name):
    case = CASES[name]
    a, info = case.layer, jax.device_get(case.info)
    y, _ = case.run(case.x, case.info)
    q, k, v = (np.asarray(case.x @ w[...]).reshape(B, L, -1, 4) for w in (a.q, a.k, a.v))
    angles = rotary(case.info.position_BxL, frequencies(2, a.rope_base))
    q, k = (np.asarray(rotate(x.swapaxes(1, 2), angles).swapaxes(1, 2)) for x in (q, k))
    for b in range(B):
        for l in np.flatnonzero(info.valid_BxL[b]):
            seen = [s for s in range(l + 1) if info.segment_BxL[b, s] == info.segment_BxL[b, l]]
            heads = []
            for n in range(4):  # two query heads share a key head
                score = np.array([q[b, l, n] @ k[b, s, n // 2] / 2 for s in seen])  # sqrt of a head's 4
                weight = np.exp(score) / np.exp(score).sum()
                heads.append(sum(w * v[b, s, n // 2] for w, s in zip(weight, seen, strict=True)))
            np.testing.assert_allclose(y[b, l], np.concatenate(heads) @ a.o[...], atol=1e-4)


def test_the_way_back_of_attention_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 5, 4)), jnp.float32) for n in (4, 2, 2))
    bias = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), 0.0, -1e30)[None].repeat(2, 0)

    def formula(q, k, v):
        k, v = (x.repeat(2, axis=1) for x in (k, v))  # two query heads share a key head
        return jax.nn.softmax(q @ k.swapaxes(2, 3) / 2 + bias[:, None]) @ v

    y, back = jax.vjp(lambda *qkv: attend(*qkv, bias), q, k, v)
    expected, formula_back = jax.vjp(formula, q, k, v)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    for found, wanted in zip((y, *back(dy)), (expected, *formula_back(dy)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_rotary_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in "qk")
    at = lambda x, position: rotate(x, rotary(jnp.array([[position]]), frequencies(4, 10_000.0)))[0, 0, 0]  # noqa: E731
    np.testing.assert_allclose(at(q, 9) @ at(k, 4), at(q, 105) @ at(k, 100), rtol=1e-4)
    np.testing.assert_allclose(at(q, 0), q[0, 0, 0])
    # Position 1, half = 4: the first pair turns by 1 radian, (1, 0) -> (cos 1, sin 1).
    one = jnp.zeros((1, 1, 1, 8)).at[..., 0].set(1)
    np.testing.assert_allclose(at(one, 1)[jnp.array([0, 4])], [np.cos(1), np.sin(1)], rtol=1e-6)


def test_frequencies_of_longer_contexts():
    """Llama 3.1's: fast turns stay, slow ones go by the factor, between them a ramp."""
    plain = np.asarray(frequencies(32, 500_000.0))
    args = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    ratio = np.asarray(frequencies(32, 500_000.0, {"rope_type": "llama3", **args})) / plain
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns >= 4], 1)
    np.testing.assert_allclose(ratio[turns <= 1], 1 / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all() and (np.diff(ratio) <= 0).all()
    np.testing.assert_allclose(frequencies(4, 100.0, {"rope_type": "linear", "factor": 4.0}), frequencies(4, 100.0) / 4)
    with pytest.raises(ValueError, match="unknown type 'yarn'; known: linear, llama3"):
        frequencies(4, 100.0, {"rope_type": "yarn", "factor": 4.0})


def test_a_model_that_looks_back_so_far_refuses_more():
    a = Attention(D, heads=2, window=L - 1, rngs=Rngs(params=0))
    with pytest.raises(ValueError, match=f"{L} positions, but this model looks back {L - 1}"):
        a(jnp.zeros((B, L, D)), make_info())


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="d=16 must be a multiple of 2 x heads=3"):
        Attention(16, heads=3, rngs=Rngs(params=0))
    with pytest.raises(ValueError, match="kv_heads=3"):
        Attention(16, heads=4, kv_heads=3, rngs=Rngs(params=0))


def test_convolution_by_hand():
    conv = CausalConv(1, width=3, rngs=Rngs(params=0))
    conv.taps[...] = jnp.array([[0.5], [10.0], [100.0]])
    info = jax.tree.map(lambda a: a[:1, :7], make_info())  # segments 1 1 1 1 1 2 2
    y, _ = conv(jnp.arange(1.0, 8).reshape(1, 7, 1), info)
    # x + 0.5 x + 10 x(-1) + 100 x(-2) within the segment: 3 -> 3 + 1.5 + 20 + 100; 6 begins anew -> 9
    np.testing.assert_allclose(y[0, :, 0], [1.5, 3 + 10, 4.5 + 20 + 100, 6 + 30 + 200, 7.5 + 40 + 300, 9, 10.5 + 60])


def test_convolution_begins_as_the_identity():
    conv = CausalConv(D, rngs=Rngs(params=0))
    x = jnp.asarray(CASES["conv"].x)
    np.testing.assert_array_equal(conv(x, make_info())[0], x)


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0, rngs=Rngs(params=0))
    # mean square of (3, 4) is 12.5
    np.testing.assert_allclose(norm(jnp.array([[3.0, 4.0]])), np.array([[3, 4]]) / 12.5**0.5, rtol=1e-6)
    assert norm(jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_layers_keep_bfloat16(name):
    case = CASES[name]
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), case.layer)
    y, _ = jax.eval_shape(
        lambda x: case.call(half, x, case.info, case.empty(half, L), None), case.x.astype(jnp.bfloat16)
    )
    assert y.dtype == jnp.bfloat16


def test_initial_matrices_keep_the_variance():
    w = fan_in(1)(jax.random.key(0), (3, 64, 256), jnp.float32)  # three stacked matrices of 64 inputs
    np.testing.assert_allclose(w.std((1, 2)), 64**-0.5, rtol=0.03)


def test_a_parameter_names_each_of_its_dims():
    with pytest.raises(ValueError, match="2 dims but 1 names"):
        param(Rngs(params=0), (2, 3), ("embed",), fan_in())


# --- the stack ----------------------------------------------------------------------------------------------


def call_dense(layer, x, info, scale):
    y, _ = layer(x, info)
    return x + y * scale, y.sum()


@pytest.mark.parametrize(("remat", "unroll"), [*((name, 1) for name in stack.REMAT), ("none", 3)])
def test_a_stack_is_its_layers_one_after_the_other(remat, unroll):
    layers = stack.build(lambda rngs: DenseFfn(D, hidden=8, rngs=rngs), 3, Rngs(params=0))
    x, info, scale = jnp.asarray(CASES["dense ffn"].x), make_info(), jnp.array([1.0, 2.0, 3.0])

    def stacked(layers):
        call = lambda layer, x, s: call_dense(layer, x, info, s)  # noqa: E731
        return stack.run(layers, x, call, scale, remat=remat, unroll=unroll)

    def unrolled(layers):
        h, sums = x, []
        for i in range(3):
            h, total = call_dense(jax.tree.map(lambda a, i=i: a[i], layers), h, info, scale[i])
            sums.append(total)
        return h, jnp.stack(sums)

    def run(f):
        return jax.jit(
            jax.value_and_grad(lambda layers: (lambda out: ((out[0] ** 2).sum(), out[1]))(f(layers)), has_aux=True)
        )(layers)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), run(stacked), run(unrolled))


def test_split_inputs_give_the_same_split():
    layers = stack.build(lambda rngs: DenseFfn(D, hidden=8, rngs=rngs), 3, Rngs(params=0))
    x, info, scale = jnp.asarray(CASES["dense ffn"].x), make_info(), jnp.array([1.0, 2.0, 3.0])
    call = lambda layer, x, s, t: call_dense(layer, x, info, s + t)  # noqa: E731
    whole, sums = stack.run(layers, x, call, scale, scale)
    parts, each = stack.run(layers, x, call, scale, stack.split(scale, 3))  # one of them split is enough
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jnp.stack(each), sums, rtol=1e-5)


def test_layers_of_a_stack_differ():
    layers = stack.build(lambda rngs: DenseFfn(D, hidden=8, rngs=rngs), 2, Rngs(params=0))
    assert all(not np.allclose(x[0], x[1]) for x in tree.flatten(layers).values())


def test_an_unknown_remat_policy_is_refused():
    layers = stack.build(lambda rngs: DenseFfn(D, hidden=8, rngs=rngs), 2, Rngs(params=0))
    with pytest.raises(ValueError, match="unknown remat policy 'some'; known: none, full, dots"):
        stack.run(layers, jnp.ones((1, 2, D)), lambda layer, x: (x, None), remat="some")

"""The recogniser: streams as it hears whole, learns through every part, and says what it is."""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import describe, losses, optim, programs, sharding, train, tree
from moe_jax.layers import subsample
from moe_jax.layers.ffn import PlainFfn
from moe_jax.layers.param import Rngs
from moe_jax.layers.relative import Chunks
from moe_jax.layers.spec_augment import spec_augment
from moe_jax.models import conformer
from moe_jax.models.conformer import Conformer, drawn_chunks
from moe_jax.moe import routers
from moe_jax.moe.experts import Plain
from moe_jax.moe.layer import MoeFfn
from moe_jax.types import Utterances

VOCAB, MELS = 12, 20
FRONTEND = {"rate": 8000, "mels": MELS, "mean": [0.5] * MELS, "scale": [2.0] * MELS}
DENSE = partial(PlainFfn, hidden=24)


def moe(router=routers.TopK):
    return partial(MoeFfn, num_experts=4, hidden=8, router=router, experts=partial(Plain, activation="silu"))


FFNS = {"dense": DENSE, "moe": moe()}


def configured(ffn, **args):
    own = {"d": 16, "layers": 2, "decoder_layers": 1, "heads": 2, "width": 4, "frontend": FRONTEND, "dropout": 0.1}
    return partial(Conformer, ffn=ffn, **own | args)


def model(ffn="moe", **args) -> Conformer:
    """With every parameter moved at random."""
    made = configured(FFNS.get(ffn, ffn), **args)(vocab=VOCAB, rngs=Rngs(params=0))
    rng = np.random.default_rng(1)
    table = {p: x + 0.05 * rng.normal(size=x.shape).astype(x.dtype) for p, x in tree.flatten(made).items()}
    return tree.unflatten(made, table)


def utterances(rows: int = 8, seed: int = 0) -> Utterances:
    rng = np.random.default_rng(seed)
    frames = np.r_[70, 39, 71, rng.integers(40, 72, rows)][:rows]
    size = np.r_[5, 1, 0, rng.integers(1, 6, rows)][:rows]
    tokens = np.where(np.arange(5) < size[:, None], rng.integers(2, VOCAB, (rows, 5)), 0)
    features = rng.normal(size=(rows, 71, MELS)).astype(np.float32)
    features[np.arange(71) >= frames[:, None]] = 0
    task = 1 + np.arange(rows) % 2
    return jax.tree.map(jnp.asarray, Utterances(features, *(a.astype(np.int32) for a in (frames, tokens, task))))


loss_of = jax.jit(Conformer.loss)


def encoded(m, batch, **args):
    x, info, _, _ = jax.jit(lambda m, b: m.encode(b.features_BxTxC, b.valid_BxT, **args))(m, batch)
    return np.where(np.asarray(info.valid_BxL)[..., None], x, 0)


# --- whole and streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ffn", "size", "left"), [("moe", 4, 2), ("dense", 3, -1), ("moe", 1, 5)])
def test_a_stream_of_chunks_is_the_whole_under_the_mask(ffn, size, left):
    m, batch = model(ffn), utterances()
    whole = encoded(m, batch, chunks=Chunks(size, left))
    L = whole.shape[1]
    chunks = Chunks(size, left)
    step, window = subsample.RATE * size, subsample.RATE * (size - 1) + subsample.WINDOW
    call = jax.jit(lambda m, x, valid, state: m.encode(x, valid, state, chunks=chunks)[::2])
    state, pieces = m.state(8, L + size if left < 0 else size * left), []
    features = np.pad(batch.features_BxTxC, ((0, 0), (0, window), (0, 0)), constant_values=np.nan)
    for start in range(0, L * subsample.RATE, step):
        valid = start + np.arange(window) < np.asarray(batch.frames_B)[:, None]
        piece, state = call(m, features[:, start : start + window], valid, state)
        pieces.append(piece)
    streamed = np.where((np.abs(whole).max(-1) > 0)[..., None], np.concatenate(pieces, 1)[:, :L], 0)
    np.testing.assert_allclose(streamed, whole, atol=1e-4)


def test_padding_reaches_nothing_and_never_routes():
    m, batch = model(), utterances()
    grad = jax.jit(jax.value_and_grad(lambda t, b: tree.unflatten(m, t).loss(b), has_aux=True))
    (loss, metrics), grads = grad(tree.flatten(m), batch)
    features = jnp.where(batch.valid_BxT[..., None], batch.features_BxTxC, jnp.nan)
    wide = dataclasses.replace(batch, features_BxTxC=features)
    (again, metrics_again), grads_again = grad(tree.flatten(m), wide)
    np.testing.assert_array_equal(loss, again)
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(same, (metrics, grads), (metrics_again, grads_again))
    frames = sum(subsample.length(int(n)) for n in batch.frames_B)
    texts = int((batch.tokens_BxU > 0).sum()) + len(batch.frames_B)
    np.testing.assert_array_equal(metrics["stats"].load_E.sum(-1), [2 * frames] * 4 + [2 * texts] * 2)
    assert metrics["tokens"] == frames


def test_every_parameter_learns():
    m, batch = model(), utterances()
    grads = jax.jit(jax.grad(lambda t: tree.unflatten(m, t).loss(batch, jax.random.key(0))[0]))(tree.flatten(m))
    still = [p for p, g in grads.items() if not np.abs(g).max() > 0]
    assert not still
    assert all(np.isfinite(g).all() for g in grads.values())


def test_dense_and_mixture_need_not_be_the_same_in_the_decoders():
    m = model("moe", decoder_ffn=partial(PlainFfn, hidden=24, activation="relu"))
    _, metrics = loss_of(m, utterances())
    assert metrics["stats"].load_E.shape == (4, 4)
    _, metrics = loss_of(model("dense", decoder_ffn=moe()), utterances())
    assert metrics["stats"].load_E.shape == (2, 4)
    with pytest.raises(ValueError, match="as many experts, or none"):
        model("moe", decoder_ffn=partial(MoeFfn, num_experts=2, hidden=8))
    with pytest.raises(ValueError, match="neither a stream nor a decoder"):
        model(moe(routers.SentenceLevel))


# --- losses -------------------------------------------------------------------------------------------------


def test_the_loss_is_wenets_sum():
    m, batch = model("dense", dropout=0.0), utterances()
    loss, metrics = loss_of(m, batch)
    x, info, _, _ = m.encode(batch.features_BxTxC, batch.valid_BxT)
    logp = jax.nn.log_softmax(m.ctc_logits(x))
    total = ctc_total = 0.0
    for b, tokens in enumerate(np.asarray(batch.tokens_BxU)):
        text, frames = [int(t) for t in tokens if t], int(info.valid_BxL[b].sum())
        ctc = ctc_by_hand(np.asarray(logp[b, :frames]), text)
        ctc_total += ctc
        sides = []
        for decoder, order in ((m.left, text), (m.right, text[::-1])):
            read = jnp.asarray([[1, *order]])
            one = conformer._info(read > 0, None, jnp.arange(read.shape[1])[None])
            memory = conformer._info(info.valid_BxL[b : b + 1], None, jnp.arange(x.shape[1]))
            said = decoder.logits(decoder.decode(read, one, (x[b : b + 1], memory))[0])[0]
            p = np.asarray(jax.nn.log_softmax(said))
            q = np.full_like(p, 0.1 / (VOCAB - 1))
            q[np.arange(len(p)), [*order, 1]] = 0.9
            sides.append((q * (np.log(q) - p)).sum())
        total += 0.3 * ctc + 0.7 * (0.7 * sides[0] + 0.3 * sides[1])
    np.testing.assert_allclose(loss, total / 8, rtol=1e-4)
    np.testing.assert_allclose(metrics["nll_ctc"], ctc_total, rtol=1e-4)
    np.testing.assert_allclose(metrics["nll_T"].sum() / metrics["weight_T"].sum(), loss, rtol=1e-5)
    assert float(metrics["nll_T"][1]) > 0 < float(metrics["nll_T"][2])


def test_what_fills_a_batch_counts_in_training_alone():
    m, batch = model("dense", dropout=0.0), utterances(4)
    filled = jax.tree.map(lambda x: jnp.concatenate([x, x[:2]]), batch)
    weighted = dataclasses.replace(filled, weight_B=jnp.array([1.0] * 4 + [0.0] * 2))
    (loss, metrics), (again, same) = loss_of(m, batch), loss_of(m, weighted)
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    for name in ("nll_T", "weight_T", "nll_ctc", "nll_attention"):
        np.testing.assert_allclose(metrics[name], same[name], rtol=1e-5)
    key = jax.random.key(0)
    np.testing.assert_array_equal(loss_of(m, weighted, key)[0], loss_of(m, filled, key)[0])


def ctc_by_hand(logp, tokens) -> float:
    """-log of the sum over alignments, by the forward recursion."""
    path = [0]
    for t in tokens:
        path += [t, 0]
    alpha = np.full(len(path), -np.inf)
    alpha[:2] = logp[0, path[:2]]
    for frame in logp[1:]:
        new = np.full_like(alpha, -np.inf)
        for s, label in enumerate(path):
            ways = [alpha[s]] + ([alpha[s - 1]] if s else [])
            if s > 1 and label and label != path[s - 2]:
                ways.append(alpha[s - 2])
            new[s] = np.logaddexp.reduce(ways) + frame[label]
        alpha = new
    return -np.logaddexp.reduce(alpha[-2:])


def test_ctc_of_texts_that_do_not_fit_is_nothing():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 5)), jnp.float32)
    tokens = jnp.array([[2, 2, 0], [2, 3, 2], [2, 2, 3]])
    valid = jnp.array([[True, True, False], [True] * 3, [True] * 3])
    run = lambda x: losses.ctc(x, valid, tokens, tokens > 0)  # noqa: E731
    nll = run(logits)
    assert nll[0] == 0 and nll[2] == 0 and nll[1] > 0
    np.testing.assert_allclose(nll[1], ctc_by_hand(np.asarray(jax.nn.log_softmax(logits))[1], [2, 3, 2]), rtol=1e-4)
    grads = jax.grad(lambda x: run(x).sum())(logits)
    assert np.abs(grads[1]).max() > 0 == np.abs(grads[0]).max() == np.abs(grads[2]).max()


def test_smoothing_is_a_distance():
    logits = jnp.log(jnp.array([[[0.05, 0.9, 0.05]], [[0.2, 0.3, 0.5]]]))
    kl = losses.smoothed_xent(logits, jnp.array([[1], [2]]), 0.1)
    np.testing.assert_allclose(kl[0], 0, atol=1e-6)
    np.testing.assert_allclose(losses.smoothed_xent(logits, jnp.array([[1], [2]]), 0.0)[1], -np.log(0.5), rtol=1e-6)


# --- training -----------------------------------------------------------------------------------------------


def test_chunks_are_drawn_by_wenets_rule():
    sizes = np.asarray(jax.vmap(lambda key: drawn_chunks(key, 60, 25).size)(jax.random.split(jax.random.key(0), 4000)))
    assert set(sizes) == {*range(1, 26), 60}
    assert abs((sizes == 60).mean() - 29 / 59) < 0.03  # of 1 to 59, those of more than 30
    assert abs((sizes == 3).mean() - 2 / 59) < 0.01  # drawn as 2 and as 27: 29 is too large for the modulus of 4 only


def test_chunks_before_are_drawn_by_wenets_rule_where_it_is_asked_for():
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: drawn_chunks(key, 60, 25, True))(keys)
    sizes, lefts = np.asarray(drawn.size), np.asarray(drawn.left)
    np.testing.assert_array_equal(sizes, jax.vmap(lambda key: drawn_chunks(key, 60, 25).size)(keys))
    assert (lefts[sizes == 60] == -1).all()
    for size in (1, 4, 10, 25):  # up to one fewer than the whole chunks before the last frame
        assert set(lefts[sizes == size]) <= set(range(max(59 // size, 1)))
    assert set(lefts[sizes == 10]) == set(range(5)) and len(set(lefts[sizes == 1])) > 20
    seen = []
    for dynamic_left in (False, True):
        m = model("dense", dropout=0.0, max_chunk=1, dynamic_left=dynamic_left)
        seen.append([float(loss_of(m, utterances(), key)[0]) for key in keys[:4]])
    assert not np.allclose(*seen)


def test_a_step_depends_on_its_key_alone_and_evaluation_on_none():
    m, batch = model(augment=spec_augment), utterances()
    one, same, other = (float(loss_of(m, batch, jax.random.key(k))[0]) for k in (0, 0, 1))
    assert one == same != other
    assert float(loss_of(m, batch)[0]) == float(loss_of(m, batch)[0])


def test_it_learns_in_the_trainers_step():
    """Also in slices, and with routers that balance without a loss."""
    ffn = moe(routers.BiasBalanced)
    m, optimizer = model(ffn, dropout=0.0, max_chunk=None), optax.adam(1e-2)
    batch = utterances(4)
    step = train.make_step(m, optimizer, seed=0, micro=2, dtype="float32", max_targets=5)
    params = tree.flatten(m)
    biases = {p: np.asarray(x) for p, x in params.items() if p.endswith("router/bias")}
    assert len(biases) == 4
    opt, losses_seen = optimizer.init(train.trained(params)), []
    for i in range(12):
        params, opt, metrics = step(params, opt, np.int32(i), batch, {})
        losses_seen.append(float(metrics["loss"]))
    assert losses_seen[-1] < 0.6 * losses_seen[0]
    assert all(np.abs(params[p] - was).max() > 0 for p, was in biases.items())


def test_a_step_in_two_programs_is_the_same_step():
    """As the trainer takes it of batches of several lengths; randomness by the seed and the step, as ever."""
    m, optimizer = model(moe(routers.BiasBalanced)), optim.guarded(optax.adam(1e-2))
    options = dict(seed=3, micro=1, dtype="float32", max_targets=5)
    found = []
    for apart in (False, True):
        step = train.make_step(m, optimizer, **options, apart=apart)
        params = {path: jnp.copy(x) for path, x in tree.flatten(m).items()}
        opt = optimizer.init(train.trained(params))
        for i in range(3):
            params, opt, metrics = step(params, opt, np.int32(i), utterances(4), {})
        found.append((params, metrics))
    (params, metrics), (params_apart, metrics_apart) = found
    assert metrics.keys() == metrics_apart.keys() and float(metrics["loss"]) == pytest.approx(
        float(metrics_apart["loss"]), rel=1e-5
    )
    for path, x in params.items():
        np.testing.assert_allclose(params_apart[path], x, atol=1e-4, err_msg=path)


def test_after_a_step_each_router_moves_by_its_own_load():
    m = model(moe(routers.BiasBalanced))
    before = {p: np.asarray(x) for p, x in tree.flatten(m).items() if p.endswith("router/bias")}
    _, metrics = loss_of(m, utterances())
    load = np.asarray(metrics["stats"].load_E)
    moved = tree.flatten(m.after_step(metrics["stats"]))
    rows = {"blocks/ffn_first": [0, 2], "blocks/ffn_second": [1, 3], "left/blocks/ffn": [4], "right/blocks/ffn": [5]}
    for path, own in rows.items():
        path += "/router/bias"
        expected = 1e-3 * np.sign(load[own].mean(-1, keepdims=True) - load[own])
        np.testing.assert_allclose(np.asarray(moved[path]) - before[path], expected, atol=1e-6)


def test_sharded_is_one_device():
    m, batch = model(), utterances()
    run = lambda m, b: m.loss(b)[0]  # noqa: E731
    alone = jax.jit(run)(m, batch)
    mesh = sharding.make_mesh(data=2, expert=4)
    layout = sharding.shardings(tree.axes(m), tree.flatten(m), mesh)
    spread = tree.unflatten(m, {p: jax.device_put(x, layout[p]) for p, x in tree.flatten(m).items()})
    with sharding.use(mesh):
        np.testing.assert_allclose(jax.jit(run)(spread, sharding.put_batch(batch, mesh)), alone, rtol=1e-5)


def test_what_is_active():
    dense, mixture = model("dense"), model()
    count = lambda m: sum(x.size * m.active(p) for p, x in tree.flatten(m).items())  # noqa: E731
    unread = 2 * VOCAB * 16
    assert count(dense) == tree.count(tree.flatten(dense)) - unread
    experts = sum(x.size for p, x in tree.flatten(mixture).items() if "/experts/" in p)
    assert count(mixture) == tree.count(tree.flatten(mixture)) - unread - experts / 2


def test_it_describes_itself():
    m = model(augment=partial(spec_augment, max_time=20), auxiliary={"router_z": 1e-3})
    said = json.loads(json.dumps(describe.describe(m)))
    again = describe.abstract(said)
    shapes = lambda m: {p: x.shape for p, x in tree.flatten(m).items()}  # noqa: E731
    assert shapes(again) == shapes(m) and describe.describe(again) == describe.describe(m)
    np.testing.assert_allclose(
        loss_of(tree.unflatten(again, tree.flatten(m)), utterances())[0], loss_of(m, utterances())[0], rtol=1e-6
    )


def test_the_convolutions_may_be_narrower_than_the_model():
    m = model("dense", channels=4)
    table = tree.flatten(m)
    shapes = {name: table[f"subsample/{name}"].shape for name in ("first", "second", "second_bias", "o", "o_bias")}
    assert shapes == {"first": (9, 4), "second": (36, 4), "second_bias": (4,), "o": (4 * 4, 16), "o_bias": (16,)}
    assert np.isfinite(loss_of(m, utterances())[0])
    said = json.loads(json.dumps(describe.describe(m)))
    assert tree.flatten(describe.abstract(said))["subsample/second"].shape == (36, 4)
    said = json.loads(json.dumps(describe.describe(model("dense"))))
    assert said["args"].pop("channels") is None  # as checkpoints were that do not know it
    assert tree.flatten(describe.abstract(said))["subsample/second"].shape == (9 * 16, 16)


# --- augmentation -------------------------------------------------------------------------------------------


def test_spec_augment_hides_stretches_of_what_is_there():
    x = jnp.ones((50, 60, 20))
    frames = jnp.full(50, 40)
    y = np.asarray(spec_augment(x, frames, jax.random.key(0), times=1, bands=1, max_time=10, max_band=4))
    assert set(np.unique(y)) == {0.0, 1.0}
    for row in y:
        times, bands = np.flatnonzero(~row.any(1)), np.flatnonzero(~row.any(0))
        assert 1 <= len(times) <= 10 and times.max() - times.min() == len(times) - 1 and times.min() < 40
        assert 1 <= len(bands) <= 4 and bands.max() - bands.min() == len(bands) - 1
        assert row.sum() == (60 - len(times)) * (20 - len(bands))


def test_substitutions_are_earlier_frames():
    x = jnp.broadcast_to(jnp.arange(60.0)[:, None], (50, 60, 2))
    none = {"times": 0, "bands": 0}
    y = spec_augment(x, jnp.full(50, 60), jax.random.key(0), **none, substitutions=2, max_substitution=8)
    back = np.asarray(x - y)[..., 0]
    assert (back >= 0).all() and back.max() > 3 and 1 <= (back > 0).sum(1).max() <= 16


@pytest.mark.parametrize("seconds", [1, 20])
def test_experts_read_in_place_are_the_same_and_no_layer_of_them_is_copied(seconds):
    """Where frames are sorted; all of a layer's at once, side by side, want all."""
    m = model()
    x = np.random.default_rng(0).normal(size=(1, 100 * seconds, MELS)).astype(np.float32)
    valid = np.arange(100 * seconds)[None] < 100 * seconds - 30

    def whole(place, m, x, valid):
        return place(m).encode(x, valid)[0]

    found = []
    for place in (lambda m: m, programs.in_place):
        compiled = jax.jit(partial(whole, place)).lower(m, x, valid).compile()
        copied = re.search(r"= f32\[1,4,16,8\]\S* dynamic-slice", compiled.as_text())  # layer, experts, in, out
        found.append((compiled(m, x, valid), copied is not None))
    (plain, cut), (read, copies) = found
    np.testing.assert_allclose(read, plain, atol=1e-5)
    assert cut and copies == (seconds == 1)

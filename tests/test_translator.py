"""The encoder-decoder: what it reads and writes, that nothing leaks, task routers and adapters, new tasks."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from moe_jax import checkpoint, cli, data, decode, describe, optim, subnetwork, train, tree
from moe_jax.adapters import Adapters
from moe_jax.layers.attention import Attention, CrossAttention
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.models.translator import Translator
from moe_jax.moe import experts, task_routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.packing import COLUMNS, Packable, pack, to_batch, to_pairs
from moe_jax.types import TokenInfo

VOCAB, D, LENGTH = 40, 16, 24
KEY = jax.random.key(0)
GROUPED = partial(task_routers.Grouped, router=task_routers.TaskLevel, groups={1: 1, 2: 1, 3: 2, 4: 2})
PARTS = partial(task_routers.Subset, experts={1: [0, 1], 2: [1, 3], 3: [0, 2, 3]})
DENSE = partial(DenseFfn, hidden=24)
STATIC = partial(MoeFfn, num_experts=4, hidden=4, router=task_routers.ByTask, experts=experts.Bottleneck)
ALONE = {"experts": {1: [0], 2: [1]}, "others": "none"}
DYNAMIC = partial(
    MoeFfn, num_experts=3, hidden=4, router=partial(task_routers.TaskLevel, k=2), experts=experts.Bottleneck
)


def moe(router) -> partial:
    return partial(MoeFfn, num_experts=4, hidden=8, router=router)


MODELS = {
    "dense": {"ffn": DENSE},
    "top-k": {"ffn": moe(task_routers.Router)},
    "every second": {"ffn": moe(task_routers.TaskBiased), "every": 2, "dense": DENSE},
    "adapters in mixtures": {
        "ffn": moe(task_routers.Router),
        "every": 2,
        "dense": DENSE,
        "adapter": STATIC,
        "adapt_dense": False,
    },
    "subsets": {"ffn": moe(PARTS)},
    "subsets by target": {"ffn": moe(partial(task_routers.Grouped, router=PARTS, groups={1: 1, 2: 1, 3: 2, 4: 2}))},
    "task-level by target": {"ffn": moe(GROUPED)},
    "token encoder, task decoder": {"ffn": moe(task_routers.TaskLevel), "encoder_ffn": moe(task_routers.Router)},
    "static adapters": {"ffn": DENSE, "adapter": STATIC},
    "dynamic adapters": {"ffn": moe(task_routers.Router), "adapter": DYNAMIC},
}


def model(name: str = "dense", **more) -> Translator:
    parts = {"attention": partial(Attention, heads=2), "cross": partial(CrossAttention, heads=2)}
    args = {"d": D, "vocab": VOCAB, "encoder_layers": 3, "decoder_layers": 2, **parts, **MODELS[name], **more}
    return Translator(**args, rngs=Rngs(params=0))


def examples(number: int = 40, seed: int = 0) -> list[Packable]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(number):
        size = int(rng.integers(3, 9))
        read = int(rng.integers(2, size))
        tokens = rng.integers(2, VOCAB, size).tolist()
        out.append(Packable(tokens, [1] * read + [2] * (size - read), int(rng.integers(1, 5))))
    return out


def columns(rows: int = 6, **given) -> dict[str, np.ndarray]:
    packed = list(pack(examples(**given), LENGTH))[:rows]
    return {name: np.stack([row[name] for row in packed]) for name in COLUMNS}


def batch(**given):
    return jax.tree.map(jnp.asarray, to_pairs(columns(**given), LENGTH, 16))


def test_what_utilisation_counts_is_what_a_step_multiplies():
    """No token goes through both sides: their places together, each at half of the parameters."""
    sizes = {"d": 64, "vocab": 512, "encoder_layers": 1, "decoder_layers": 1, "ffn": partial(DenseFfn, hidden=256)}
    made, given = model(**sizes), batch()
    step = jax.jit(jax.grad(lambda made: made.loss(given)[0])).lower(made).compile()
    places = given.tokens_BxL.size + given.source.tokens_BxS.size
    counted = places * train.training_flops(made, list(tree.flatten(made)))
    assert 0.8 < counted / step.cost_analysis()["flops"] < 1.1  # attention's scores and softmaxes are not counted


# --- data -------------------------------------------------------------------------------------------------------------


def test_pairs_hold_every_token_once():
    rows = columns()
    whole, pairs = to_batch(rows), to_pairs(rows, LENGTH, 16)
    with pytest.raises(ValueError, match="more than 3"):
        to_pairs(rows, 3, 16)
    for b in range(len(rows["tokens"])):
        for segment in range(1, rows["segments"][b].max() + 1):
            mine = rows["segments"][b] == segment
            tokens, roles = rows["tokens"][b][mine], rows["roles"][b][mine]
            read = pairs.source.info.segment_BxL[b] == segment
            written = pairs.info.segment_BxL[b] == segment
            np.testing.assert_array_equal(pairs.source.tokens_BxS[b][read], tokens[roles == 1])
            np.testing.assert_array_equal(pairs.targets_BxL[b][written], tokens[roles == 2])
            np.testing.assert_array_equal(pairs.tokens_BxL[b][written][1:], tokens[roles == 2][:-1])
            assert pairs.tokens_BxL[b][written][0] == tokens[roles == 1][-1]
            for info, here in ((pairs.source.info, read), (pairs.info, written)):
                np.testing.assert_array_equal(info.position_BxL[b][here], np.arange(here.sum()))
                assert set(info.task_BxL[b][here]) == {rows["tasks"][b][mine][0]}
    assert pairs.weights_BxL.sum() == whole.weights_BxL.sum()


def test_the_folder_is_opened_as_pairs(tmp_path):
    from moe_jax import main
    from moe_jax.text.tokeniser import Tokeniser

    tokeniser = Tokeniser.load(main.shipped("tokeniser.model"))
    families = {"a": 1, "b": 2, "c": 3, "d": 4}
    data.write_prepared(tmp_path / "x", examples(), length=LENGTH, tokeniser=tokeniser, families=families)
    opened = data.Pairs.open(tmp_path / "x")
    found = opened.batch(0, seed=0, batch_size=2)
    assert found.tokens_BxL.shape == (2, opened.meta["max_targets"])
    assert found.source.tokens_BxS.shape[1] == (opened.columns["roles"] == 1).sum(1).max()


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_describes_itself(name):
    network, b = model(name), batch()
    grads = jax.jit(jax.grad(lambda t: tree.unflatten(network, t).loss(b, KEY)[0]))(tree.flatten(network))
    still = {p for p, g in grads.items() if not np.abs(g).max()}
    assert not {p for p in still if "adapter" not in p}, "of adapters that begin as nothing only `up` has a gradient"
    again = describe.abstract(json.loads(json.dumps(describe.describe(network))))
    assert {p: x.shape for p, x in tree.flatten(again).items()} == {
        p: x.shape for p, x in tree.flatten(network).items()
    }
    assert jax.tree.structure(again) == jax.tree.structure(network)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_later_and_by_others_changes_nothing(name):
    network, b = model(name), batch()
    nll = jax.jit(lambda tokens, source: per_token(network, dataclasses.replace(b, tokens_BxL=tokens, source=source)))
    before = nll(b.tokens_BxL, b.source)
    segment = np.asarray(b.info.segment_BxL)
    first = segment == 1
    later = b.tokens_BxL.at[:, 3:].add(1) % VOCAB
    np.testing.assert_allclose(nll(later, b.source)[:, :3], before[:, :3], atol=1e-5)
    other = jnp.where(b.source.info.segment_BxL == 2, (b.source.tokens_BxS + 1) % VOCAB, b.source.tokens_BxS)
    after = nll(b.tokens_BxL, dataclasses.replace(b.source, tokens_BxS=other))
    np.testing.assert_allclose(np.where(first, after, 0), np.where(first, before, 0), atol=1e-5)
    assert np.abs(np.where(segment == 2, after - before, 0)).max() > 1e-3


loss_of = jax.jit(Translator.loss)


@jax.jit
def per_token(network, b):
    encoded, *_ = network.encode(b.source)
    x, *_ = network.decode(b.tokens_BxL, b.info, (encoded, b.source.info))
    logp = jax.nn.log_softmax(network.logits(x))
    return -jnp.take_along_axis(logp, b.targets_BxL[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("name", ["dense", "dynamic adapters"])
def test_garbage_in_padding_changes_no_loss_and_no_gradient(name):
    network, b = model(name), batch()
    run = jax.jit(jax.value_and_grad(lambda t, b: tree.unflatten(network, t).loss(b)[0]))
    source = jnp.where(b.source.info.valid_BxL, b.source.tokens_BxS, 7)
    tokens = jnp.where(b.info.valid_BxL, b.tokens_BxL, 9)
    other = dataclasses.replace(b, tokens_BxL=tokens, source=dataclasses.replace(b.source, tokens_BxS=source))
    table = tree.flatten(network)
    jax.tree.map(lambda g, h: np.testing.assert_allclose(g, h, atol=1e-5), run(table, b), run(table, other))


def test_nan_in_padding_reaches_nothing():
    cross = CrossAttention(D, heads=2, rngs=Rngs(params=0))
    b = batch()
    x, memory = (jax.random.normal(KEY, (*i.valid_BxL.shape, D)) for i in (b.info, b.source.info))

    def run(x, read):
        y = cross(x, b.info, cross.memory(read, b.source.info))
        return jnp.where(b.info.valid_BxL[..., None], y, 0).sum()

    bad = [jnp.where(i.valid_BxL[..., None], a, jnp.nan) for a, i in ((x, b.info), (memory, b.source.info))]
    for found, clean in zip(jax.grad(run, (0, 1))(*bad), jax.grad(run, (0, 1))(x, memory), strict=True):
        np.testing.assert_allclose(found, clean, atol=1e-6)
    np.testing.assert_allclose(run(*bad), run(x, memory), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_step_by_step_is_what_training_computes(name):
    network = model(name)
    some = examples(4)
    prompts = [[t for t, r in zip(e.tokens, e.roles, strict=True) if r == 1] for e in some]
    texts = [[t for t, r in zip(e.tokens, e.roles, strict=True) if r == 2] for e in some]
    tasks = [e.task for e in some]
    read = decode.prefill(network, prompts, tasks=tasks)
    found = decode.score(network, read, range(4), texts)
    for example, one in zip(some, found, strict=True):
        row = next(iter(pack([example], LENGTH)))
        b = jax.tree.map(jnp.asarray, to_pairs({k: v[None] for k, v in row.items()}, 10, 10))
        expected = -per_token(network, b)[0, : len(one.tokens)]
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)
    beams = decode.search(network, read, beams=3, max_new=5)
    again = decode.score(network, read, range(4), [d.tokens for d in beams])
    for a, c in zip(beams, again, strict=True):
        np.testing.assert_allclose(a.logprobs, c.logprobs, atol=1e-4)


def test_label_smoothing_is_for_training_alone():
    plain, smooth = model(label_smoothing=0.0), model(label_smoothing=0.3)
    b = batch()
    assert loss_of(plain, b)[0] == loss_of(smooth, b)[0]
    nll = per_token(plain, b)
    encoded, *_ = plain.encode(b.source)
    logp = jax.nn.log_softmax(plain.logits(plain.decode(b.tokens_BxL, b.info, (encoded, b.source.info))[0]))
    expected = ((0.7 * nll - 0.3 * logp.mean(-1)) * b.weights_BxL).sum() / b.weights_BxL.sum()
    np.testing.assert_allclose(loss_of(smooth, b, KEY)[0], expected, rtol=1e-5)


def test_two_kinds_of_layers_lie_where_they_are_asked_for():
    network = model("every second")
    assert network.encoder.dense_layers == (1,) and network.decoder.dense_layers == (0,)
    with pytest.raises(ValueError, match="every=2"):
        model("dense", every=2)
    with pytest.raises(ValueError, match="as many experts"):
        model("dense", encoder_ffn=moe(task_routers.Router)).loss(batch())


# --- tasks ------------------------------------------------------------------------------------------------------------


def info_of(tasks) -> TokenInfo:
    task = jnp.asarray(tasks)[None]
    ones = jnp.ones_like(task)
    return TokenInfo(task, ones > 0, ones, jnp.arange(task.shape[1])[None])


def test_grouped_tasks_route_alike():
    router = GROUPED(D, 4, rngs=Rngs(params=0))
    router.router.gate = router.router.gate * 50
    x = jax.random.normal(KEY, (1, 5, D))
    chosen = router(x, info_of([1, 2, 3, 4, 9])).expert_BxLxK[0]
    assert (chosen[0] == chosen[1]).all() and (chosen[2] == chosen[3]).all()
    unknown = router.router(x, info_of([0] * 5)).expert_BxLxK[0]
    assert (chosen[4] == unknown[4]).all(), "a task of no group is unknown"
    with pytest.raises(ValueError, match="must be in 1"):
        GROUPED(D, 4, groups={1: 0}, rngs=Rngs(params=0))


def test_a_subset_is_never_left():
    router = task_routers.Subset(D, 4, k=2, experts={1: [0, 1], 2: [1, 3]}, rngs=Rngs(params=0))
    x = jax.random.normal(KEY, (1, 60, D))
    info = info_of([1] * 20 + [2] * 20 + [0] * 20)
    for key in (None, KEY):
        decision = router(x, info, key)
        chosen = np.asarray(decision.expert_BxLxK[0])
        assert set(chosen[:20].ravel()) == {0, 1} and set(chosen[20:40].ravel()) == {1, 3}
        assert set(chosen[40:].ravel()) == {0, 1, 2, 3}
        np.testing.assert_allclose(decision.weight_BxLxK.sum(-1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="k=2 are to be chosen"):
        task_routers.Subset(D, 4, k=2, experts={1: [0]}, rngs=Rngs(params=0))


@pytest.mark.parametrize("name", ["static adapters", "dynamic adapters"])
def test_adapters_begin_as_nothing(name):
    b, plain = batch(), {k: v for k, v in MODELS[name].items() if k != "adapter"}
    network = model(name)
    table = {p: x for p, x in tree.flatten(network).items() if "adapter" not in p}
    without = tree.unflatten(model("dense", **plain), table)
    np.testing.assert_allclose(loss_of(network, b)[0], loss_of(without, b)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("router", "said"),
    [(tiny.routers.SentenceLevel, "a decoder would see its future"), (tiny.routers.BiasBalanced, "another router")],
)
def test_adapters_whose_router_does_not_fit_are_refused(router, said):
    with pytest.raises(ValueError, match=said):
        model("static adapters", adapter=partial(STATIC, router=router))


def test_a_task_without_an_adapter_of_its_own_has_none():
    network = model("static adapters", adapter=partial(STATIC, router=partial(task_routers.ByTask, **ALONE)))
    table = tree.flatten(network)
    changed = table | {p: x + 1.0 for p, x in table.items() if "/adapter/experts/" in p}
    for task, same in ((1, False), (0, True), (3, True)):
        mine = dataclasses.replace(
            b := batch(),
            info=of_task(b.info, task),
            source=dataclasses.replace(b.source, info=of_task(b.source.info, task)),
        )
        told = [per_token(tree.unflatten(network, t), mine) for t in (table, changed)]
        assert np.array_equal(*told) == same
    meta = {"model": json.loads(json.dumps(describe.describe(network))), "families": {"translate/3": 3}}
    part, about = subnetwork.extract(changed, meta, "translate/3")  # it has none in its part either
    np.testing.assert_allclose(
        per_token(tree.unflatten(describe.abstract(about["model"]), part), mine), told[0], atol=1e-5
    )


def test_adapters_that_nobody_reserved_begin_as_those_that_they_are_like():
    source = tree.flatten(model("static adapters"))
    target = tree.flatten(model("static adapters", adapter=partial(STATIC, num_experts=6)))
    grown = checkpoint.transplant(target, [source], checkpoint.grow((2, 0)))
    for name in ("encoder/blocks/feed/adapter/experts/down", "decoder/blocks/feed/adapter/experts/up"):
        old = source[name]
        np.testing.assert_array_equal(grown[name], jnp.concatenate([old, old[:, 2:3], old[:, :1]], axis=1))
    assert all((grown[path] == x).all() for path, x in source.items() if "/adapter/experts/" not in path)
    with pytest.raises(checkpoint.CheckpointError, match=r"has experts 0..3, not all of \[4\]"):
        checkpoint.transplant(target, [source], checkpoint.grow((4,)))


def test_the_balance_of_a_layer_that_stands_still_stands_still():
    network = model("static adapters", ffn=moe(partial(tiny.routers.BiasBalanced, rate=0.1)))
    split = lambda *full: Adapters(targets=(), full=full).split(tree.flatten(network), tree.axes(network), KEY)  # noqa: E731
    assert not any("bias" in path for path in split("/adapter/experts/")[0])
    moving = split("decoder/.*/ffn/experts/")[0]
    assert {path for path in moving if "bias" in path} == {"decoder/blocks/feed/ffn/router/bias"}


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optim.muon_adam(lambda step: 0.02, weight_decay=0.0)])
@pytest.mark.parametrize(
    ("name", "full"), [("static adapters", r"/adapter/experts/"), ("dynamic adapters", r"/adapter/router/gate$")]
)
def test_a_new_task_leaves_the_old_ones_to_the_bit(name, full, optimizer):
    """Task 4 is trained alone, with only its adapter, or only its row of the gate: tasks 1 to 3 answer as before."""
    network = model(name)
    if name == "dynamic adapters":  # adapters that have learnt something
        table = tree.flatten(network)
        table |= {p: x + 0.1 for p, x in table.items() if p.endswith("adapter/experts/up")}
        network = tree.unflatten(network, table)
    adapters = Adapters(targets=(), full=(full,))
    moving, frozen = adapters.split(tree.flatten(network), tree.axes(network), KEY)
    new = dataclasses.replace(
        b := batch(), info=of_task(b.info, 4), source=dataclasses.replace(b.source, info=of_task(b.source.info, 4))
    )
    step = train.make_step(network, optimizer, seed=0, micro=1, dtype="float32", max_targets=14, adapters=adapters)
    own = {p: jnp.array(x) for p, x in moving.items()}
    opt = optimizer.init(own)
    losses = []
    for i in range(8):
        own, opt, metrics = step(own, opt, np.int32(i), new, frozen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    tuned = tree.unflatten(network, adapters.merge(own, frozen))
    for task in (1, 2, 3):
        old = dataclasses.replace(
            b, info=of_task(b.info, task), source=dataclasses.replace(b.source, info=of_task(b.source.info, task))
        )
        np.testing.assert_array_equal(per_token(tuned, old), per_token(network, old))
    assert np.abs(per_token(tuned, new) - per_token(network, new)).max() > 1e-4


def of_task(info: TokenInfo, task: int) -> TokenInfo:
    return dataclasses.replace(info, task_BxL=jnp.where(info.valid_BxL, task, 0))


def test_balance_moves_the_routers_of_both_sides():
    network = model("top-k", **{"ffn": moe(partial(tiny.routers.BiasBalanced, rate=0.1))})
    _, metrics = loss_of(network, batch(), KEY)
    assert metrics["stats"].load_E.shape == (5, 4)
    moved = network.after_step(metrics["stats"])
    for side in (moved.encoder, moved.decoder):
        assert np.abs(side.ffn.router.bias[...]).max() > 0


@pytest.mark.parametrize(
    "name",
    [
        "task-level by target",
        "static adapters",
        "dynamic adapters",
        "adapters in mixtures",
        "subsets",
        "subsets by target",
    ],
)
def test_the_part_that_a_task_needs_computes_what_the_whole_does(name):
    network, b = model(name), batch()
    table = {p: x + 0.3 * jax.random.normal(KEY, x.shape) for p, x in tree.flatten(network).items()}
    whole = tree.unflatten(network, table)
    meta = {
        "model": json.loads(json.dumps(describe.describe(network))),
        "families": {f"translate/{i}": i for i in range(1, 5)},
    }
    for task in (1, 3):
        small, about = subnetwork.extract(table, meta, f"translate/{task}")
        assert about["families"] == {f"translate/{task}": task}
        part = tree.unflatten(describe.abstract(about["model"]), {p: jnp.asarray(x) for p, x in small.items()})
        assert tree.count(small) < tree.count(table)
        mine = dataclasses.replace(
            b, info=of_task(b.info, task), source=dataclasses.replace(b.source, info=of_task(b.source.info, task))
        )
        np.testing.assert_allclose(per_token(part, mine), per_token(whole, mine), atol=1e-4)
    with pytest.raises(ValueError, match="unknown task"):
        subnetwork.extract(table, meta, "translate/9")
    with pytest.raises(ValueError, match="decoder/blocks/attention/k is missing: name a whole model"):
        subnetwork.extract({p: x for p, x in table.items() if "experts" in p}, meta, "translate/1")


def test_a_task_that_chooses_among_all_experts_has_no_part():
    network = model("subsets")
    meta = {"model": describe.describe(network), "families": {"translate/4": 4}}
    with pytest.raises(ValueError, match="no router of this model goes by tasks"):
        subnetwork.extract(tree.flatten(network), json.loads(json.dumps(meta)), "translate/4")


def test_adapters_are_where_they_are_asked_for():
    paths = tree.flatten(model("adapters in mixtures"))
    assert {p.partition("/feed/")[0] for p in paths if "/adapter/" in p} == {"encoder/blocks", "decoder/blocks"}
    with_dense = tree.flatten(model("adapters in mixtures", adapt_dense=True))
    assert {p for p in with_dense if "/dense_blocks/" in p and "/adapter/" in p}


def test_a_part_whose_weights_depend_on_the_rest_is_refused():
    network = model("top-k", ffn=moe(partial(task_routers.TaskLevel, k=2, weights="full")))
    meta = {"model": describe.describe(network), "families": {"translate/1": 1}}
    with pytest.raises(ValueError, match="depend on the experts that a task does not reach"):
        subnetwork.extract(tree.flatten(network), meta, "translate/1")


def test_a_part_replaces_no_file(tmp_path, capsys):
    network = model("task-level by target")
    meta = {"model": describe.describe(network), "families": {"translate/1": 1}}
    path = tmp_path / "m.safetensors"
    checkpoint.write_safetensors(path, tree.flatten(network), json.loads(json.dumps(meta)))
    whole = path.read_bytes()
    command = ["subnetwork", "--checkpoint", str(path), "--task", "translate/1", "--output", str(path)]
    assert cli.entry(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_a_subset_of_a_task_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="task id 999 is outside"):
        task_routers.Subset(8, 4, experts={999: [0, 1]}, rngs=Rngs(params=0))


def test_where_no_router_goes_by_tasks_there_is_no_part():
    network = model("top-k")
    meta = {"model": describe.describe(network), "families": {"translate/1": 1}}
    with pytest.raises(ValueError, match="no router of this model goes by tasks"):
        subnetwork.extract(tree.flatten(network), meta, "translate/1")

"""Checkpoints: bit for bit, from mesh to mesh, refused in one line, and one model from another."""

import errno
import json
import os
import pickle
import resource
import shutil
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from moe_jax import adapters, checkpoint, optim, sharding, train, tree
from moe_jax.checkpoint import CheckpointError, Rule, read_safetensors, transplant, write_safetensors
from moe_jax.moe import routers
from moe_jax.moe.layer import MoeFfn

META = {"model": {"class": "Corrector"}, "families": {"asr": 1}, "step": 3, "text": "naïve “quotes”"}


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 400, text
    return text


# --- steps of a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.moe(routers.BiasBalanced))


@pytest.fixture(scope="module")
def transform():
    return optim.muon_adam(lambda step: 0.01)


def state_on(mesh, model, transform) -> train.State:
    """After one step, so that no leaf of the optimiser is what it began as."""
    with sharding.use(mesh):
        state = train.start(model, transform, mesh)

        @partial(jax.jit, out_shardings=jax.tree.map(lambda x: x.sharding, (state.params, state.opt)))
        def step(params, opt):
            own = adapters.trained(params)
            updates, opt = transform.update({path: jnp.sin(7 * x + 1) for path, x in own.items()}, opt, own)
            return params | jax.tree.map(jnp.add, own, updates), opt

        return train.State(*step(state.params, state.opt), 3)


def abstract(t):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), t)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, transform):
    """(folder, state) of a step that was saved from a 2 x 4 mesh; the folder is not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    state = state_on(sharding.make_mesh(data=2, expert=4), model, transform)
    store = checkpoint.Run(folder)
    store.save(3, state.params, state.opt, META, 0.5)
    store.close()
    return folder, state


@pytest.fixture
def store(saved, tmp_path):
    """A copy, opened."""
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    store = checkpoint.Run(tmp_path)
    yield store
    store.close()


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"data": 4, "expert": 2}, {"data": 2, "model": 4}])
def test_a_step_comes_back_bit_for_bit_on_any_mesh(store, saved, model, transform, sizes, monkeypatch):
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)  # nothing is ever unpickled
    _, state = saved
    like = train.start(model, transform, sharding.make_mesh(**sizes))
    assert store.latest() == store.best() == 3 and store.meta(3) == META
    back = store.params(3, abstract(like.params)), store.opt(3, abstract(like.opt))
    jax.tree.map(np.testing.assert_array_equal, back, (state.params, state.opt))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves((like.params, like.opt)), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    if sizes["data"] != 4:
        axis = "expert" if "expert" in sizes else "model"
        assert axis in str(back[0]["blocks/ffn/experts/up"].sharding.spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"embedding": jnp.ones((41, 16))}, r"embedding is \(40, 16\) there, \(41, 16\) in this model"),
        (lambda t: t | {"output": jnp.ones((16, 40))}, r"output is missing there, \(16, 40\) in this model"),
        (lambda t: {p: x for p, x in t.items() if p != "norm/scale"}, r"norm/scale is \(16,\) there, missing in this"),
    ],
)
def test_parameters_of_another_model_are_refused(store, saved, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        store.params(3, change(saved[1].params))
    assert str(store.folder / "3") in one_line(error)


def test_the_state_of_another_optimiser_is_refused(store, saved):
    _, state = saved
    with pytest.raises(CheckpointError, match="opt does not fit") as error:
        store.opt(3, optim.adamw(lambda step: 0.01).init(state.params))
    one_line(error)


def empty_files(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def halve_files(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [shutil.rmtree, empty_files, halve_files])
@pytest.mark.parametrize("item", ["params", "opt", "meta"])
def test_a_damaged_step_is_refused(store, saved, item, damage):
    _, state = saved
    damage(store.folder / "3" / item)
    read = {
        "params": lambda: store.params(3, state.params),
        "opt": lambda: store.opt(3, state.opt),
        "meta": lambda: store.meta(3),
    }
    with pytest.raises(CheckpointError, match=item) as error:
        read[item]()
    one_line(error)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EIO, "Input/output error"), errno.EIO),
        (
            ValueError("FAILED_PRECONDITION: Error reading [source locations='x', os_error_code='116']\nmore"),
            errno.ESTALE,
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), errno.ENOMEM),
        (ValueError("UNAVAILABLE: the bucket is busy"), errno.EAGAIN),
        (PermissionError(errno.EACCES, "Permission denied"), errno.EACCES),
        (MemoryError(), errno.ENOMEM),
    ],
)
@pytest.mark.parametrize("item", ["params", "opt", "meta"])
def test_a_step_that_cannot_be_read_just_now_is_not_called_damaged(store, saved, item, error, number, monkeypatch):
    if item == "meta" and isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
        return  # of arrays

    def restore(*_, **__):
        raise error

    monkeypatch.setattr(store.manager, "restore", restore)
    _, state = saved
    with pytest.raises(OSError, match="the checkpoint is as it was") as found:
        {"params": store.params, "opt": store.opt}.get(item, lambda step, _: store.meta(step))(
            3, state.opt if item == "opt" else state.params
        )
    assert found.value.errno == number and "\n" not in str(found.value)


def test_what_other_hosts_did_is_no_damage(store, saved, monkeypatch):
    def restore(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: a peer is gone")

    monkeypatch.setattr(store.manager, "restore", restore)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a peer is gone"):
        store.params(3, saved[1].params)


def test_a_disk_that_does_not_answer_is_not_for_a_user_to_mend(tmp_path):
    with pytest.raises(OSError, match="older checkpoints are whole") as error, checkpoint._writing(tmp_path):
        raise ValueError("UNKNOWN: writing [os_error_code='5']")
    assert error.value.errno == errno.EIO


def test_a_step_is_never_overwritten(store, saved):
    _, state = saved
    with pytest.raises(CheckpointError, match="3 exists already: choose another run folder"):
        store.save(3, state.params, state.opt, META, 0.1)


def test_training_goes_on_while_a_step_is_written(tmp_path, monkeypatch):
    """The step appears when the disk is done, with the values of the time of `save`: their arrays may be gone then."""
    done, rename = threading.Event(), os.rename

    def slow(*args, **options):
        assert threading.current_thread() is not threading.main_thread(), "training waits for the disk"
        assert done.wait(60)
        rename(*args, **options)

    store = checkpoint.Run(tmp_path)
    w = jnp.arange(4.0)
    monkeypatch.setattr(os, "rename", slow)
    store.save(1, {"w": w}, {}, {"step": 1}, 1.0)
    w.delete()
    assert store.writing() and not (store.folder / "1").exists()
    done.set()
    store.manager.wait_until_finished()
    assert not store.writing() and (store.folder / "1").exists()
    np.testing.assert_array_equal(store.params(1, {"w": jnp.zeros(4)})["w"], np.arange(4.0))
    store.close()


def test_the_latest_and_the_best_are_kept(tmp_path):
    store = checkpoint.Run(tmp_path)
    assert store.latest() is None and store.best() is None
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
        store.save(step, {"w": jnp.full(2, float(step))}, {}, {"step": step}, loss)
    store.close()
    store = checkpoint.Run(tmp_path)
    assert (store.best(), store.latest()) == (2, 5)
    assert sorted(p.name for p in store.folder.iterdir() if p.name.isdigit()) == ["2", "4", "5"]
    np.testing.assert_array_equal(store.params(2, {"w": jnp.zeros(2)})["w"], [2, 2])
    store.close()


def test_a_full_disk_is_one_line_and_older_steps_stay(tmp_path, capfd):
    """A limit on the size of files stands for the full disk."""
    store = checkpoint.Run(tmp_path)
    store.save(1, {"w": jnp.arange(4.0)}, {}, {"step": 1}, 1.0)
    store.manager.wait_until_finished()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=f"{tmp_path}/checkpoints: File too large; older") as error:
            store.save(2, {"w": jax.random.normal(jax.random.key(0), (300, 300))}, {}, {"step": 2}, 0.5)
            store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error)
    assert "Traceback" not in "".join(capfd.readouterr())
    again = checkpoint.Run(tmp_path)
    assert again.latest() == 1
    np.testing.assert_array_equal(again.params(1, {"w": jnp.zeros(4)})["w"], np.arange(4.0))
    again.close()


def test_what_a_crash_left_half_written_is_no_step(tmp_path, store, saved):
    store.close()
    half = store.folder / "4.orbax-checkpoint-tmp"
    shutil.copytree(store.folder / "3", half)
    (half / "commit_success.txt").unlink(missing_ok=True)
    again = checkpoint.Run(tmp_path)
    assert again.latest() == 3
    again.save(4, saved[1].params, saved[1].opt, META, 0.7)
    again.close()
    assert sorted(p.name for p in store.folder.iterdir()) == ["3", "4"]


# --- one file to ship ---------------------------------------------------------------------------------------

TABLE = {
    "embedding": jnp.arange(6.0).reshape(2, 3),
    "blocks/ffn/up": jnp.full((1, 2, 2), 1 / 3),
    "scalar": jnp.array(2.0),
}


def test_safetensors_round_trip(tmp_path, monkeypatch):
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    write_safetensors(tmp_path / "m.safetensors", TABLE, META)
    table, meta = read_safetensors(tmp_path / "m.safetensors")
    assert meta == META
    jax.tree.map(np.testing.assert_array_equal, table, TABLE)
    assert {p: x.shape for p, x in table.items()} == {p: x.shape for p, x in TABLE.items()}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]  # nothing left aside


def test_safetensors_in_bfloat16(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", TABLE, META, jnp.bfloat16)
    table, _ = read_safetensors(tmp_path / "m.safetensors")
    for path, x in TABLE.items():
        np.testing.assert_array_equal(table[path], x.astype(jnp.bfloat16).astype(jnp.float32))
        assert table[path].dtype == jnp.float32


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_torn_file_is_refused(tmp_path, kept):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, TABLE, META)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors") as error:
        read_safetensors(path)
    assert str(path) in one_line(error)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "pickled").write_bytes(pickle.dumps({"w": 1}))
    for name in ("missing", "pickled", "."):
        with pytest.raises(CheckpointError, match="cannot be read as safetensors") as error:
            read_safetensors(tmp_path / name)
        one_line(error)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"moe_jax": "[1]"}, {"moe_jax": "{torn"}, {"moe_jax": "[" * 100_000}]
)
def test_a_file_without_our_metadata_is_refused(tmp_path, metadata):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError) as error:
        read_safetensors(tmp_path / "m.safetensors")
    one_line(error)


# --- one model from another ---------------------------------------------------------------------------------


def outputs(model, key=None):
    batch = tiny.batch()
    return jax.jit(lambda model: model.logits(model(batch.tokens_BxL, batch.info, key=key)[0]))(model)


def start_from(source, ffn, rules):
    target = tiny.model(ffn)
    return tree.unflatten(target, transplant(tree.flatten(target), [tree.flatten(source)], rules))


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["evaluation", "training"])
@pytest.mark.parametrize("k", [1, 2])
def test_an_upcycled_model_begins_as_the_dense_one(k, key):
    dense = tiny.model()
    ffn = tiny.moe(partial(routers.TopK, k=k), hidden=24)
    upcycled = start_from(dense, ffn, checkpoint.upcycle(tiny.E))
    np.testing.assert_allclose(outputs(upcycled, key), outputs(dense), atol=1e-5)
    gate = tree.flatten(upcycled)["blocks/ffn/router/gate"]
    assert float(jnp.abs(gate).max()) > 0  # the router is fresh, not zero


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_shared_expert_gives_its_share_of_the_dense_layer(share):
    dense = tiny.model()
    ffn = partial(tiny.moe(partial(routers.TopK, k=2), hidden=24), shared=partial(tiny.dense, hidden=24))
    upcycled = start_from(dense, ffn, checkpoint.upcycle(tiny.E, shared=share))
    np.testing.assert_allclose(outputs(upcycled), outputs(dense), atol=1e-5)
    np.testing.assert_allclose(upcycled.ffn.shared.down[...], share * dense.ffn.down[...], rtol=1e-6)
    with pytest.raises(ValueError, match="a share of 0 to 1"):
        checkpoint.upcycle(tiny.E, shared=2.0)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_widened_model_begins_as_the_narrow_one(times):
    dense = tiny.model()
    wide = start_from(dense, partial(tiny.dense, hidden=24 * times), checkpoint.widen(times))
    assert wide.ffn.gate.shape == (2, tiny.D, 24 * times)
    np.testing.assert_allclose(outputs(wide), outputs(dense), atol=1e-5)


def noise(seed, size=0.1):
    rules = checkpoint.upcycle(3, noise=size, seed=seed)
    return transplant({"b/ffn/experts/up": jnp.zeros((2, 3, 64, 32))}, [{"b/ffn/up": DENSE}], rules)["b/ffn/experts/up"]


DENSE = jax.random.normal(jax.random.key(0), (2, 64, 32)) * jnp.array([1.0, 9.0])[:, None, None]


def test_noise_is_of_its_size_in_every_matrix_and_of_its_seed():
    apart = noise(0) - DENSE[:, None]
    np.testing.assert_allclose(apart.std((-2, -1)) / DENSE.std((-2, -1))[:, None], 0.1, rtol=0.05)
    assert all((noise(0)[:, i] != noise(0)[:, j]).mean() > 0.99 for i, j in ((0, 1), (0, 2), (1, 2)))
    np.testing.assert_array_equal(noise(0), noise(0))
    assert (noise(0) != noise(1)).mean() > 0.99
    np.testing.assert_array_equal(noise(0, 0.0), jnp.stack([DENSE] * 3, axis=1))


def test_a_little_noise_changes_the_outputs_a_little():
    dense = tiny.model()
    ffn, plain = tiny.moe(hidden=24), outputs(dense)
    apart = [
        float(jnp.std(outputs(start_from(dense, ffn, checkpoint.upcycle(tiny.E, noise=size))) - plain) / plain.std())
        for size in (0.001, 0.01, 0.1)
    ]
    assert all(0.1 * size < found < 10 * size for size, found in zip((0.001, 0.01, 0.1), apart, strict=True)), apart


@pytest.mark.parametrize("num", [2, 3, 5])
def test_models_that_are_equal_mix_as_one_is_upcycled_and_average_to_themselves(num):
    source = tree.flatten(tiny.model())
    target = tree.flatten(tiny.model(partial(tiny.moe(hidden=24), num_experts=num)))
    mixed = transplant(target, [source] * num, checkpoint.branch_train_mix())
    jax.tree.map(np.testing.assert_array_equal, mixed, transplant(target, [source], checkpoint.upcycle(num)))
    jax.tree.map(np.testing.assert_array_equal, transplant(source, [source] * num, checkpoint.average()), source)


@pytest.mark.parametrize(
    "rules",
    [checkpoint.upcycle(4, noise=0.1, dense_layers=(1,), shared=0.5), checkpoint.branch_train_mix(), ()],
    ids=["upcycled", "mixed", "copied"],
)
def test_a_run_begins_with_arrays_that_no_device_held_whole(tmp_path, rules, monkeypatch):
    shared = {"shared": tiny.dense} if rules and rules[0].layers else {}
    ffn = partial(MoeFfn, num_experts=4, hidden=24, router=routers.TopK, **shared) if rules else tiny.dense
    make = partial(tiny.model, ffn, **({"dense_layers": (1,), "dense": tiny.dense} if shared else {}))
    base = tree.flatten(tiny.model())
    sources = [base] * (4 if rules == checkpoint.branch_train_mix() else 1)
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(sources))]
    for path, source in zip(paths, sources, strict=True):
        write_safetensors(path, source, {"tokeniser": "t", "families": {}})
    whole = transplant(tree.flatten(make()), sources, rules)
    monkeypatch.setattr(checkpoint.Source, "__getitem__", None)
    mesh = sharding.make_mesh(data=1, fsdp=2, expert=2, model=2)
    made = train.initial(make, list(map(str, paths)), rules, "t", mesh)
    lies = sharding.shardings(tree.axes(made), whole, mesh)
    for name, x in tree.flatten(made).items():
        assert x.sharding.is_equivalent_to(lies[name], x.ndim), name
        if "/router/" not in name:
            np.testing.assert_allclose(x, whole[name], rtol=1e-5, atol=1e-7)
    assert any(x.addressable_shards[0].data.size * (8 if rules else 4) == x.size for x in tree.flatten(made).values())


def test_models_average_leaf_by_leaf():
    sources = [{"a": jnp.full((2, 3), value)} for value in (1.0, 5.0, 12.0)]
    np.testing.assert_allclose(transplant(sources[0], sources, checkpoint.average())["a"], 6.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("other", "rules", "message"),
    [
        ({"a": (2, 3)}, checkpoint.average(), "source 2 and source 1 do not share b"),
        ({"a": (2, 4), "b": (4,)}, checkpoint.average(), r"a is \(2, 3\) or \(2, 4\) in the sources"),
        ({"a": (2, 3), "b": (4,)}, (), "a: the rule 'copy' takes one source, not 2; mix or average"),
        ({"a": (2, 3), "b": (4,)}, checkpoint.widen(2), "a: the rule 'copy' takes one source, not 2"),
    ],
)
def test_sources_that_differ_are_refused(other, rules, message):
    with pytest.raises(CheckpointError, match=message) as error:
        transplant(SOURCE, [SOURCE, {path: jnp.zeros(shape) for path, shape in other.items()}], rules)
    one_line(error)


def test_arrays_of_a_source_are_read_when_they_are_asked_for(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", TABLE, META)
    source = checkpoint.Source(tmp_path)  # a run folder stands for its model
    assert (set(source), len(source), source.meta) == (set(TABLE), 3, META) and "other" not in source
    jax.tree.map(np.testing.assert_array_equal, dict(source), TABLE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_device_reads_its_own_part(tmp_path, dtype):
    table = {"w": jnp.arange(64.0).reshape(8, 8), "scalar": jnp.array(2.0)}
    write_safetensors(tmp_path / "m.safetensors", table, META, dtype)
    source, mesh = checkpoint.Source(tmp_path / "m.safetensors"), sharding.make_mesh(data=1, fsdp=4, model=2)
    where = sharding.shardings({"w": ("embed", "mlp"), "scalar": ()}, table, mesh)
    for name, x in table.items():
        placed = source.placed(name, where[name])
        np.testing.assert_array_equal(placed, x)
        assert placed.dtype == jnp.float32 and placed.sharding == where[name]
    assert {shard.data.shape for shard in source.placed("w", where["w"]).addressable_shards} == {(2, 4)}


@pytest.mark.parametrize("about", [{}, {"guard": {"several": 1.0}, "more": "é" * 1000}])
def test_a_file_is_described_again_and_its_arrays_stay(tmp_path, about, monkeypatch):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, TABLE, META, "bfloat16")
    before = dict(checkpoint.Source(path))
    checkpoint.describe_again(path, about)
    source = checkpoint.Source(path)
    assert source.meta == about and set(source.dtypes.values()) == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, dict(source), before)
    whole = path.read_bytes()
    monkeypatch.setattr(checkpoint.shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(CheckpointError, match="no space; nothing was written"):
        checkpoint.describe_again(path, META)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == [path.name]


SOURCE = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}


@pytest.mark.parametrize(
    ("target", "rules", "message"),
    [
        ({"a": (2, 3)}, (), "b of the source becomes b, which this model does not have"),
        ({"a": (2, 3), "b": (5,)}, (), r"b: the source gives \(4,\), this model needs \(5,\)"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, (), r"nothing fills \['c'\]: add a rule, or name them in `fresh`"),
        ({"a": (2, 3), "b": (4,)}, (Rule("a", "b"),), r"b: the source gives \(2, 3\), this model needs \(4,\)"),
        (
            {"a": (2, 3), "b": (4,)},
            (Rule("a", "a", "halve"),),
            "unknown rule 'halve'; known: copy, upcycle, widen, mix, average, grow",
        ),
    ],
)
def test_every_array_is_accounted_for(target, rules, message):
    with pytest.raises(CheckpointError, match=message):
        transplant({p: jnp.zeros(shape) for p, shape in target.items()}, [SOURCE], rules)


def test_two_arrays_for_one_place_are_refused():
    source = {"a": jnp.zeros(4), "b": jnp.ones(4)}
    with pytest.raises(CheckpointError, match="a and b of the source both become b"):
        transplant({"b": jnp.zeros(4)}, [source], (Rule("a", "b"),))


def test_fresh_arrays_keep_their_own_values_and_the_dtype_is_the_target_s():
    target = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(4), "ffn/router/gate": jnp.full(2, 7.0)}
    out = transplant(target, [SOURCE], ())
    assert list(out) == list(target) and out["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(out["ffn/router/gate"], [7, 7])
    np.testing.assert_array_equal(out["b"], 1)


def test_metadata_is_json_that_others_can_read(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", TABLE, META)
    raw = (tmp_path / "m.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["moe_jax"]) == META

"""Training: it learns; a resumed run is the unbroken one bit for bit; what does not fit is refused in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax import checkpoint, cli, describe, logs, optim, sharding, train, tree
from moe_jax.adapters import EVERYTHING, Adapters
from moe_jax.checkpoint import CheckpointError
from moe_jax.moe import task_routers
from moe_jax.moe.dispatch import gathered
from moe_jax.partfile import Signals, Stopped

FAMILIES = {"asr": 1, "ocr": 2}


@pytest.fixture(scope="module")
def tokeniser():
    return child.tokeniser()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return child.copying(tmp_path_factory.mktemp("data") / "copy")


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# --- it learns ----------------------------------------------------------------------------------------------


def test_a_copy_task_is_learnt(data, tmp_path):
    """Guessing among six letters costs log 6 = 1.79 nats; below that it copies."""
    schedule = optim.warmup_cosine(0.02, steps=60, warmup=10)
    done = child.run(
        tmp_path,
        data,
        model=child.configured(d=32),
        optimizer=partial(optim.adamw, schedule),
        steps=60,
        batch_size=32,
        log_every=10,
        eval_every=60,
        save_every=60,
    )
    assert done.step == 60
    first, *_, last = (line for line in read_log(tmp_path) if "nll" in line)
    assert last["nll"] < 1.0 < first["nll"]
    valid = read_log(tmp_path)[-1]
    assert valid["valid/loss"] < 1.0 and valid["valid/loss/asr"] < 1.0 and valid["valid/loss/ocr"] < 1.0
    loads = [valid[f"valid/load/asr/{e}"] for e in range(tiny.E)]
    np.testing.assert_allclose(sum(loads), 1, rtol=1e-5)


# --- one step -----------------------------------------------------------------------------------------------


def one_step(batch, *, mesh=None, micro=1, model=None, dtype="float32", at=0):
    """(parameters before, after, metrics) of one step on a mesh, all on the host."""
    mesh = mesh or child.one_device()
    model = model or child.configured(tiny.routers.TopK, auxiliary={})  # no noise, no mean over mini batches
    network = train.build(model, vocab=tiny.VOCAB, seed=0)
    transform = optim.adamw(lambda step: 0.01)
    with sharding.use(mesh):
        state = train.start(network, transform, mesh)
        before = jax.device_get(state.params)
        step = train.make_step(network, transform, seed=0, micro=micro, dtype=dtype, max_targets=12)
        params, _, metrics = step(state.params, state.opt, np.int32(at), sharding.put_batch(batch, mesh))
    return before, jax.device_get(params), jax.device_get(metrics)


@pytest.fixture(scope="module")
def single():
    return one_step(tiny.batch())


def test_accumulated_gradients_are_those_of_the_whole_batch(single):
    _, whole, metrics = single
    _, summed, metrics_summed = one_step(tiny.batch(), micro=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, summed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), metrics, metrics_summed)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "expert": 4}, {"data": 4, "expert": 2}, {"data": 8}, {"slices": 2, "fsdp": 2, "expert": 2}]
)
def test_a_step_on_a_mesh_is_that_of_one_device(single, sizes):
    _, params, metrics = single
    _, params_mesh, metrics_mesh = one_step(tiny.batch(), mesh=sharding.make_mesh(**sizes))
    np.testing.assert_allclose(metrics_mesh["loss"], metrics["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), metrics, metrics_mesh)
    close = [np.isclose(params[p], params_mesh[p], atol=1e-4).mean() for p in params]
    assert min(close) > 0.99, close  # Adam's first step is a sign: where a gradient is zero to rounding, it may differ


def test_a_step_in_bfloat16_is_near_and_the_parameters_stay_float32(single):
    before, _, metrics = single
    _, half, metrics_half = one_step(tiny.batch(), dtype="bfloat16")
    np.testing.assert_allclose(metrics_half["loss"], metrics["loss"], rtol=0.02)
    assert all(x.dtype == np.float32 for x in half.values())
    assert all((half[path] != before[path]).any() for path in half)


def test_noise_depends_on_the_step():
    (_, first, _), (_, again, _), (_, other, _) = (
        one_step(tiny.batch(), model=child.configured(), at=at) for at in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any((first[path] != other[path]).any() for path in first)


def test_the_step_moves_a_balance_state_by_the_load():
    before, after, metrics = one_step(tiny.batch(), model=child.configured())
    load = metrics["stats"].load_E
    moved = after["blocks/ffn/router/bias"] - before["blocks/ffn/router/bias"]
    np.testing.assert_allclose(moved, 1e-3 * np.sign(load.mean(-1, keepdims=True) - load), atol=1e-7)


# --- a run and its end --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    child.run(folder, data)
    return child.everything(folder)


def test_how_even_each_layer_loads_its_experts_is_logged():
    _, metrics = tiny.model(ffn=tiny.moe()).loss(tiny.batch(), jax.random.key(0))
    found = train.readable(metrics, {"asr": 1})
    for n, load_E in enumerate(np.asarray(metrics["stats"].load_E)):
        assert found[f"router/busiest/{n}"] == pytest.approx(load_E.max() * len(load_E) / load_E.sum())
    assert f"router/busiest/{n + 1}" not in found


def test_a_run_killed_in_the_middle_goes_on_to_the_same_bits(data, tmp_path, unbroken):
    command = [sys.executable, child.__file__, str(tmp_path), str(data), "9"]
    path = os.pathsep.join([str(Path(train.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert read_log(tmp_path)[-1]["step"] == 9  # it logged more than it saved
    assert not (tmp_path / "model.safetensors").exists()
    done = child.run(tmp_path, data)
    assert done.step == child.STEPS
    assert child.everything(tmp_path) == unbroken
    assert all(p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir())  # nothing half written is left


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(data, tmp_path, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "Logs", child.signal_at(5, signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped at step 5 of 12; the same command goes on from there"):
            child.run(tmp_path, data)
    store = checkpoint.Run(tmp_path)
    assert store.latest() == 5
    store.close()
    child.run(tmp_path, data)
    assert child.everything(tmp_path) == unbroken


def failing(*_) -> dict[str, float]:
    raise FloatingPointError("validation loss is nan")


@pytest.mark.parametrize("at", [5, 6, 8, 12])
def test_a_run_that_is_asked_to_stop_saves_at_once_and_validates_when_it_goes_on(
    data, tmp_path, unbroken, monkeypatch, at
):
    """Who takes a machine away leaves seconds. Steps 6 and 12 are validated, 4, 8 and 12 saved with a loss."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "Logs", child.signal_at(at, signal.SIGTERM))
        whole = train._validate
        patch.setattr(train, "_validate", lambda *args: (failing if args[-1].step == at else whole)(*args))
        with pytest.raises(Stopped, match=f"stopped at step {at} of 12"):
            child.run(tmp_path, data)
    store = checkpoint.Run(tmp_path)
    assert store.latest() == at and not store.validated(at) and store.best() != at
    store.close()
    child.run(tmp_path, data)
    assert child.everything(tmp_path) == unbroken
    store = checkpoint.Run(tmp_path)
    assert store.steps() == ([12, 8] if at in (8, 12) else store.steps())
    store.close()


def test_a_run_compiles_one_step_and_one_evaluation(data, tmp_path):
    """However steps, validation and saving take turns, and so does the run that goes on."""
    compiled = Counter()

    def count(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for runs, steps in enumerate((7, child.STEPS), 1):
            child.run(tmp_path, data, steps=steps, optimizer=partial(optim.adamw, lambda step: 0.01))
            assert [compiled[f"jit({name})"] for name in ("step_fn", "evaluation")] == [runs, runs], compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_the_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals() as stop:
        assert not stop.caught
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a scheduler may repeat itself
        assert stop.caught == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A finished run of one step; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    child.run(folder, data, steps=1)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "was made with another seed: use its configuration, or another run folder"),
        ({"model": child.configured(layers=1)}, "was made with another model"),
        ({"model": child.configured(partial(tiny.routers.TopK, k=1))}, "was made with another model"),
        ({"batch_size": 16}, "was made with another batch_size"),
        ({"optimizer": partial(optim.muon_adam, lambda step: 0.1)}, "opt does not fit this model"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(data, tmp_path, stopped, changes, message):
    shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(CheckpointError, match=message) as error:
        child.run(tmp_path / "run", data, **changes)
    assert "\n" not in str(error.value)


def test_a_run_goes_on_that_was_made_before_its_model_had_an_argument(data, tmp_path, stopped, monkeypatch):
    shutil.copytree(stopped, tmp_path / "run")
    meta = checkpoint.Run.meta

    def older(store, step):
        found = meta(store, step)
        del found["model"]["args"]["remat"]
        return found

    monkeypatch.setattr(checkpoint.Run, "meta", older)
    assert child.run(tmp_path / "run", data, steps=2).step == 2
    shutil.copytree(stopped, tmp_path / "other")
    with pytest.raises(CheckpointError, match="was made with another model"):
        child.run(tmp_path / "other", data, steps=2, model=child.configured(remat="full"))


def test_a_finished_run_stays_as_it_is(data, tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "run")
    before = child.everything(tmp_path / "run")
    assert child.run(tmp_path / "run", data, steps=1).step == 1
    assert child.everything(tmp_path / "run") == before


@pytest.mark.parametrize("often", [{"log_every": 1, "save_every": 4}, {"log_every": 12, "save_every": 1}])
def test_a_run_that_explodes_ends_and_what_exploded_is_not_saved(data, tmp_path, often):
    explode = partial(optim.adamw, lambda step: jnp.where(step < 5, 0.01, 1e30), clip=1e9)
    with pytest.raises(FloatingPointError, match=r"3 gradients in a row, up to step \d+, could not be followed"):
        child.run(tmp_path, data, model=tiny.configured(), optimizer=explode, patience=3, **often)
    store = checkpoint.Run(tmp_path)
    assert store.latest() in (4, 5, 6)
    model = train.build(tiny.configured(), vocab=282, seed=0)
    params = store.params(store.latest() or 0, tree.flatten(model))
    assert all(np.isfinite(x).all() for x in params.values())
    store.close()


# --- from another model -------------------------------------------------------------------------------------


def test_a_run_starts_from_an_exported_dense_model(data, tmp_path, tokeniser):
    child.run(tmp_path / "dense", data, model=tiny.configured(), steps=2)
    source = tmp_path / "dense" / "model.safetensors"
    moe = tiny.configured(tiny.moe(hidden=24, to=gathered))
    still = lambda: optim.adamw(lambda step: 0.0)  # noqa: E731
    rules = checkpoint.upcycle(tiny.E)
    child.run(tmp_path / "moe", data, model=moe, steps=1, optimizer=still, init_from=str(source), init_rules=rules)
    (valid,) = (line["valid/loss"] for line in read_log(tmp_path / "moe") if "valid/loss" in line)
    np.testing.assert_allclose(valid, read_log(tmp_path / "dense")[-1]["valid/loss"], rtol=1e-5)

    # No step at all: what the run starts from, validated and exported.
    table, meta = checkpoint.read_safetensors(source)
    checkpoint.write_safetensors(source, table, meta | {"positions": 77})  # as of a pretrained model
    child.run(tmp_path / "none", data, model=moe, steps=0, init_from=str(source), init_rules=rules)
    started, about = checkpoint.read_safetensors(tmp_path / "none" / "model.safetensors")
    assert about["positions"] == 77
    again, _ = checkpoint.read_safetensors(tmp_path / "moe" / "model.safetensors")
    assert all(np.array_equal(started[path], again[path]) for path in again)
    (line,) = read_log(tmp_path / "none")
    assert (line["step"], line["valid/loss"]) == (0, pytest.approx(valid, rel=1e-5))

    checkpoint.write_safetensors(source, table, meta | {"tokeniser": "another"})
    with pytest.raises(ValueError, match="trained with another tokeniser than"):
        child.run(tmp_path / "other", data, model=moe, init_from=str(source), init_rules=rules)


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    """Two short runs of a dense model, apart by their seeds."""
    folders = [tmp_path_factory.mktemp("dense") for _ in range(2)]
    for seed, folder in enumerate(folders):
        child.run(folder, data, model=tiny.configured(), steps=1, seed=seed)
    return folders


def adapted(folder, data, base, **changes):
    settings = {
        "model": tiny.configured(tiny.moe(child.NOISY, hidden=24)),
        "init_from": str(base),
        "init_rules": checkpoint.upcycle(tiny.E, noise=0.1),
        "adapters": Adapters(targets=("/attention/[qkvo]$", "/experts/"), full=("/router/",), rank=2),
        "micro_batches": 2,
    }
    return child.run(folder, data, **(settings | changes))


@pytest.fixture(scope="module")
def run_of_adapters(data, dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    adapted(folder, data, dense[0])
    return folder


def test_a_run_of_adapters_goes_on_to_the_same_bits_from_what_moves_alone(
    data, dense, tmp_path, run_of_adapters, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(train, "Logs", child.signal_at(5, signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped at step"):
            adapted(tmp_path, data, dense[0])
    for changes, message in (
        ({"base": dense[1]}, "was made with another base"),
        ({"adapters": Adapters(rank=3)}, "was made with another adapters"),
    ):
        with pytest.raises(CheckpointError, match=message):
            adapted(tmp_path, data, **({"base": dense[0]} | changes))
    adapted(tmp_path, data, dense[0])
    assert child.everything(tmp_path) == child.everything(run_of_adapters)
    factors = "adapters.safetensors"
    assert (tmp_path / factors).read_bytes() == (run_of_adapters / factors).read_bytes()
    saved = child.everything(tmp_path)[1][0]
    assert saved and all(re.search("lora_[ab]$|router", path) for path in saved)


def test_a_run_of_adapters_exports_what_it_trained(data, dense, tmp_path, run_of_adapters, capsys):
    adapted(tmp_path / "start", data, dense[0], steps=0, adapters=EVERYTHING)
    start, _ = checkpoint.read_safetensors(tmp_path / "start")
    table, meta = checkpoint.read_safetensors(run_of_adapters)
    for path, x in table.items():
        still = "router" not in path and not re.search("/attention/|/experts/", path)
        assert (x == start[path]).all() == still, path
    assert "adapters" not in meta
    out = str(tmp_path / "merged.safetensors")
    export = ["export", "--adapters", str(run_of_adapters / "adapters.safetensors"), "--output", out, "--checkpoint"]
    assert cli.entry([*export, str(tmp_path / "start")]) == 0
    assert Path(out).read_bytes() == (run_of_adapters / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert cli.entry([*export, str(dense[0])]) == 2
    error = capsys.readouterr().err
    assert "is not the base of" in error and error.count("\n") == 1


def test_adapters_of_nothing_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="name a base in init_from"):
        child.run(tmp_path, data, adapters=Adapters())


def test_a_model_remembers_what_it_and_its_base_were_trained_on(data, tmp_path):
    child.run(tmp_path / "base", data, steps=0)
    table, meta = checkpoint.read_safetensors(tmp_path / "base")
    assert (meta["trained"], meta["longest_read"]) == (["asr", "ocr"], 5)
    older = tmp_path / "older.safetensors"
    checkpoint.write_safetensors(older, table, {**meta, "trained": ["gec"], "longest_read": 9})
    child.run(tmp_path / "new", data, steps=0, init_from=str(older))
    meta = checkpoint.read_safetensors(tmp_path / "new")[1]
    assert (meta["trained"], meta["longest_read"]) == (["asr", "ocr", "gec"], 9)
    del meta["trained"]
    checkpoint.write_safetensors(older, table, meta)  # one that does not remember
    child.run(tmp_path / "newest", data, steps=0, init_from=str(older))
    assert "trained" not in checkpoint.read_safetensors(tmp_path / "newest")[1]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"asr": 1, "mt": 2}, "ocr is task 2 in the data, but mt has it in"),
        ({"asr": 1, "ocr": 3}, "ocr is task 2 in the data, but it has 3 in"),
    ],
)
def test_a_base_that_numbers_tasks_otherwise_is_refused(data, tmp_path, there, said):
    child.run(tmp_path / "base", data, steps=0)
    table, meta = checkpoint.read_safetensors(tmp_path / "base")
    checkpoint.write_safetensors(tmp_path / "other.safetensors", table, {**meta, "families": there})
    with pytest.raises(ValueError, match=said) as error:
        child.run(tmp_path / "new", data, steps=0, init_from=str(tmp_path / "other.safetensors"))
    assert "\n" not in str(error.value)
    child.run(tmp_path / "again", data, steps=0, init_from=str(tmp_path / "base"))


def test_a_base_that_groups_tasks_otherwise_is_refused(tmp_path):
    def gate(by: dict[int, int]) -> Any:
        router = partial(task_routers.Grouped, router=task_routers.TaskLevel, groups=by)
        return tiny.model(tiny.moe(router))

    def of(base: Any, families: dict[str, int]) -> str:
        meta = {"model": describe.describe(base), "families": families, "tokeniser": "t"}
        checkpoint.write_safetensors(tmp_path / "base.safetensors", jax.device_get(tree.flatten(base)), meta)
        return str(tmp_path / "base.safetensors")

    base, mesh = gate({1: 1, 2: 1}), child.one_device()
    more = train.initial(lambda: gate({1: 1, 2: 1, 3: 2}), of(base, {"asr": 1, "ocr": 2}), (), "t", mesh)
    assert tree.flatten(more).keys() == tree.flatten(base).keys()
    with pytest.raises(ValueError, match=r"ocr has 1 in ffn.router of .* and 2 in this model: configure") as error:
        train.initial(lambda: gate({1: 1, 2: 2}), of(base, {"asr": 1, "ocr": 2}), (), "t", mesh)
    assert "\n" not in str(error.value)


def test_a_run_starts_from_several_models(data, dense, tmp_path):
    mixed = tiny.configured(partial(tiny.moe(hidden=24), num_experts=2))
    several = {"init_from": [str(folder) for folder in dense], "init_rules": checkpoint.branch_train_mix()}
    child.run(tmp_path, data, model=mixed, steps=0, **several)
    tables = [checkpoint.read_safetensors(folder)[0] for folder in (*dense, tmp_path)]
    up, q = ([table.get(path) for table in tables] for path in ("blocks/ffn/up", "blocks/attention/q"))
    np.testing.assert_array_equal(tables[2]["blocks/ffn/experts/up"], jnp.stack(up[:2], axis=1))
    np.testing.assert_allclose(q[2], (q[0] + q[1]) / 2, atol=1e-6)


# --- settings that do not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": 3}, "batch_size=8 does not divide into micro_batches=3"),
        ({"batch_size": 4, "mesh": sharding.make_mesh}, "4 rows do not divide over 8 devices"),
        (
            {"mesh": partial(sharding.make_mesh, data=3)},
            "mesh data=3 needs 3 devices, this host sees 8: change the mesh file, or use -1",
        ),
        ({"mesh": partial(sharding.make_mesh, fsdp=-1)}, "only one of DATA_AXIS and FSDP_AXIS may be -1"),
        ({"mesh": partial(sharding.make_mesh, expert=16)}, "expert=16 does not divide 8 devices: --gin.EXPERT_AXIS=1"),
        (
            {"mesh": lambda: sharding.make_mesh(1, 8, fsdp=-1, devices=jax.devices()[:1])},
            "expert=8 does not divide 1 device: --gin.EXPERT_AXIS=1",
        ),
        (
            {"mesh": partial(sharding.make_mesh, expert=2, model=3)},
            "expert=2 x model=3 does not divide 8 devices: --gin.EXPERT_AXIS=1 --gin.MODEL_AXIS=1",
        ),
        ({"mesh": partial(sharding.make_mesh, expert=0)}, "mesh expert=0: give a number of devices; only data or fsdp"),
        ({"model": child.configured(d=15)}, "d=15 must be a multiple of 2 x heads=4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        child.run(tmp_path, data, **changes)
    assert "\n" not in str(error.value)


# --- logs ---------------------------------------------------------------------------------------------------


def test_logs_are_cut_at_the_step_and_where_a_crash_tore_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in (1, 2, 2, 3)]
    path.write_text("".join(lines) + '{"step": 2, "lo')
    logs.truncate(path, 2)
    assert path.read_text() == "".join(lines[:3])
    logs.truncate(tmp_path / "missing.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_logs_of_other_processes_are_not_written(tmp_path):
    log = logs.Logs(tmp_path, 0, enabled=False)
    log.metrics(1, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())

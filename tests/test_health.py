"""Runs that meet bad gradients, bad disks and hanging steps: what is left out is said, what was right stays right."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import child
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import checkpoint, main, optim, sharding, train
from moe_jax.goodput import Goodput
from moe_jax.health import Watchdog


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return child.copying(tmp_path_factory.mktemp("data") / "copy")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    child.run(folder, data)
    return child.everything(folder)


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """That run, stopped after step 9."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Logs", child.signal_at(9, signal.SIGTERM))
        with pytest.raises(train.Stopped):
            child.run(folder, data)
    assert newest(folder).name == "9"
    return folder


def follow(transform, gradients, params=None):
    params = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))} if params is None else params
    state = transform.init(params)
    for g in gradients:
        updates, state = transform.update(jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 3e38])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    inner = optim.adamw(optim.warmup_linear(0.1, steps=20, warmup=2))
    clean, clean_state = follow(optim.guarded(inner), [0.5, -0.2, 0.3])
    params, state = follow(optim.guarded(inner), [0.5, bad, bad, -0.2, 0.3])
    jax.tree.map(np.testing.assert_array_equal, (params, state.inner), (clean, clean_state.inner))
    assert int(follow(optim.guarded(inner), [0.5, bad, bad])[1].in_row) == 2 and int(state.in_row) == 0
    plain, _ = follow(inner, [0.5, -0.2, 0.3])
    jax.tree.map(np.testing.assert_array_equal, clean, plain)


@pytest.mark.parametrize("loss", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_changes_nothing_however_its_gradient_is(loss):
    transform = optim.guarded(optim.adamw(lambda step: 0.1))
    params = {"a": jnp.ones(3)}
    state = transform.init(params)
    updates, after = transform.update(params, state, params, loss=jnp.float32(loss))
    assert not updates["a"].any() and int(after.in_row) == 1
    updates, after = transform.update(params, state, params, loss=jnp.float32(3))
    assert updates["a"].all() and int(after.in_row) == 0


def changed(made, at, change):
    """Steps of which one sees another gradient and loss."""

    def make(network, transform, **options):
        def update(grads, state, params=None, *, loss, **_):
            now = state.followed + state.in_row == at
            seen = jax.tree.map(lambda new, old: jnp.where(now, new, old), change(grads, loss), (grads, loss))
            return transform.update(seen[0], state, params, loss=seen[1])

        return made(network, optax.GradientTransformationExtraArgs(transform.init, update), **options)

    return make


def skipped(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_a_run_leaves_out_a_batch_whose_loss_alone_is_not_finite(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_step", changed(train.make_step, 4, lambda grads, loss: (grads, loss * jnp.nan)))
    child.run(tmp_path, data)
    assert skipped(tmp_path) == [{"step": 5, "rows": train.Prepared.open(data).rows_of(4, seed=0, batch_size=8)}]


def test_a_run_with_a_limit_leaves_out_the_batch_that_is_beyond_it(data, tmp_path, monkeypatch):
    """From the 50th gradient on: before, it does not know what is usual."""
    more = lambda grads, loss: (jax.tree.map(lambda g: 100 * g, grads), loss)  # noqa: E731
    monkeypatch.setattr(train, "make_step", changed(train.make_step, 53, more))
    rare = {"steps": 56, "save_every": 56, "eval_every": 56, "log_every": 56, "valid_batches": 1}
    child.run(tmp_path / "limit", data, **rare, spike=20.0)
    assert skipped(tmp_path / "limit") == [
        {"step": 54, "rows": train.Prepared.open(data).rows_of(53, seed=0, batch_size=8)}
    ]
    child.run(tmp_path / "none", data, **rare)
    assert not (tmp_path / "none" / "skipped.jsonl").exists()


def test_a_spike_is_left_out_once_the_mean_has_settled():
    inner = optim.adamw(optax.constant_schedule(0.1), clip=1e9)
    calm = [0.1] * 10
    guarded = optim.guarded(inner, spike=5.0, settle=8)
    assert int(follow(guarded, [*calm, 1.0])[1].in_row) == 1
    assert int(follow(guarded, [*calm, 0.4])[1].in_row) == 0
    assert int(follow(guarded, [0.1, 1.0])[1].in_row) == 0, "before it has settled it knows no spike"
    with_spike, without = (follow(guarded, [*calm, *more, 0.1]) for more in ([9.0], []))
    jax.tree.map(np.testing.assert_array_equal, with_spike, without)


def poisoned(monkeypatch, steps) -> None:
    """The batches of these steps have no finite loss."""
    rows = train._rows

    def some(dataset, step, *args):
        batch = rows(dataset, step, *args)
        return jax.tree.map(lambda x: x * np.nan if x.dtype == np.float32 and step in steps else x, batch)

    monkeypatch.setattr(train, "_rows", some)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_poisoned_batch_is_left_out_named_and_resumed_past(data, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {4})
    changes = {"eval_every": 12, "save_every": 3, "valid_batches": 1}
    with monkeypatch.context() as patch:
        patch.setattr(train, "Logs", child.signal_at(7, signal.SIGTERM))
        with pytest.raises(train.Stopped):
            child.run(tmp_path / "two", data, **changes)
    child.run(tmp_path / "two", data, **changes)
    child.run(tmp_path / "one", data, **changes)
    assert child.everything(tmp_path / "one") == child.everything(tmp_path / "two")
    left_out = [line for line in lines(tmp_path / "one") if "skipped" in line]
    assert left_out == [{"step": 5, "skipped": 1}]
    rows = train.Prepared.open(data).rows_of(4, seed=0, batch_size=8)
    assert skipped(tmp_path / "two") == [{"step": 5, "rows": rows}]
    said = capsys.readouterr().err
    assert f"step 5: the gradient is left out (not finite); rows of the data: {', '.join(map(str, rows))}\n" in said
    assert all(np.isfinite(v) for line in lines(tmp_path / "one") for v in line.values())


def test_logs_are_on_the_disk_when_a_checkpoint_is(data, tmp_path, monkeypatch):
    synced: list[str] = []
    known = os.fsync
    monkeypatch.setattr(
        "moe_jax.logs.os.fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or known(file)
    )
    poisoned(monkeypatch, {2})
    child.run(tmp_path, data)
    for name in ("metrics", "speed", "skipped"):
        assert synced.count(str(tmp_path / f"{name}.jsonl")) >= 3, name


def test_too_many_in_a_row_end_the_run_and_leave_the_last_checkpoint(data, tmp_path, monkeypatch):
    poisoned(monkeypatch, {5, 6, 7})
    with pytest.raises(FloatingPointError, match="3 gradients in a row, up to step 8, could not be followed") as error:
        child.run(tmp_path, data, patience=3, valid_data=data, save_every=4, log_every=20, eval_every=20)
    assert "\n" not in str(error.value)
    store = checkpoint.Run(tmp_path)
    assert store.latest() == 4
    store.close()


def newest(folder: Path) -> Path:
    return max((p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [torn, flipped, Path.unlink])
@pytest.mark.parametrize("item", ["params", "opt", "meta"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    data,
    tmp_path,
    stopped,
    unbroken,
    capsys,
    item,
    damage,
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    files = [p for p in (newest(tmp_path) / item).rglob("*") if p.is_file()]
    damage(max(files, key=lambda p: p.stat().st_size))
    child.run(tmp_path, data)
    said = capsys.readouterr().err
    assert "checkpoints/9: " in said and "checkpoints.damaged/9 now, and the run goes on from the step before" in said
    assert child.everything(tmp_path) == unbroken
    assert (tmp_path / "checkpoints.damaged" / "9").is_dir()


def test_of_several_hosts_one_that_finds_damage_has_all_begin_again(data, tmp_path, monkeypatch, stopped, unbroken):
    """Others may have read their own parts of it, and wait."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    flipped(next((tmp_path / "checkpoints" / "9" / "meta").glob("*")))
    with monkeypatch.context() as patch:
        patch.setattr(train.hosts, "several", lambda: True)
        with pytest.raises(OSError, match="goes on from the step before") as error:
            child.run(tmp_path, data)
    assert main.report(error.value) == 75
    assert (tmp_path / "checkpoints.damaged" / "9").is_dir()
    child.run(tmp_path, data)
    assert child.everything(tmp_path) == unbroken


def test_where_all_are_damaged_nothing_is_begun_anew(data, tmp_path):
    child.run(tmp_path, data, steps=1)
    for path in (tmp_path / "checkpoints").rglob("meta/*"):
        path.write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="meta is missing or damaged"):
        child.run(tmp_path, data)


def test_digests_are_of_the_numbers_and_their_places_on_any_mesh():
    x = jnp.arange(32.0).reshape(8, 4)
    base = checkpoint.digests({"a": [x, x.astype(jnp.bfloat16), x > 3]})["a"]
    mesh = sharding.make_mesh(data=4, expert=2)
    spread = [
        jax.device_put(y, NamedSharding(mesh, PartitionSpec("data", "expert"))) for y in (x, x.astype("bfloat16"))
    ]
    assert checkpoint.digests({"a": [*spread, x > 3]})["a"] == base
    swapped = x.at[0].set(x[1]).at[1].set(x[0])
    nudged = x.at[7, 3].set(jnp.nextafter(x[7, 3], 99.0))
    for other in (swapped, nudged, x.T.reshape(8, 4)):
        assert checkpoint.digests({"a": [other]})["a"][0] != base[0]


def test_a_step_that_hangs_prints_the_stacks(capfd):
    with Watchdog(0.05) as dog:
        time.sleep(0.1)
        assert "Timeout" not in capfd.readouterr().err, "what comes before the first step may take longer"
        dog.alive()
        time.sleep(0.3)
    time.sleep(0.2)
    said = capfd.readouterr().err
    assert said.count("Timeout (0:00:00.050000)!") >= 2 and "test_a_step_that_hangs_prints_the_stacks" in said
    time.sleep(0.2)
    assert not capfd.readouterr().err


def test_a_start_that_hangs_prints_the_stacks(capfd):
    with Watchdog(0.05):
        time.sleep(0.4)
    assert "Timeout (0:00:00.200000)!" in capfd.readouterr().err


@pytest.mark.parametrize("steps", [0, 1])
def test_a_process_that_hangs_ends_where_it_is_asked_to(steps):
    program = f"""
import time
from moe_jax.health import Watchdog
with Watchdog(0, abort_after=0.1) as dog:
    for _ in range({steps} * 8):
        time.sleep(0.05)
        dog.alive()
    print("steps were made", flush=True)
    time.sleep(60)
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == -signal.SIGABRT and "steps were made" in done.stdout, done.stderr
    assert "no step for 0.1 s" in done.stderr and "time.sleep" not in done.stderr and "in <module>" in done.stderr
    assert time.monotonic() - began < 40


def test_a_run_is_watched_from_its_start_to_its_end(data, tmp_path, monkeypatch):
    seen: list[Any] = []

    class Watching(Watchdog):
        def __enter__(self):
            seen.append("start")
            return super().__enter__()

        def alive(self):
            seen.append("step")
            super().alive()

        def __exit__(self, *error):
            seen.append("end")
            super().__exit__(*error)

    monkeypatch.setattr(train, "Watchdog", lambda *given: seen.append(given) or Watching(*given))
    built, exported = train.initial, train._export_best
    monkeypatch.setattr(train, "initial", lambda *given: seen.append("initial") or built(*given))
    monkeypatch.setattr(train, "_export_best", lambda *given: seen.append("export") or exported(*given))
    child.run(tmp_path, data, steps=1, hang_after=50.0, abort_after=70.0)
    assert seen[:3] == [(50.0, 70.0), "start", "initial"] and seen[-2:] == ["export", "end"] and "step" in seen


def test_the_time_of_a_run_is_accounted_for(tmp_path, monkeypatch):
    moment = [0.0]
    monkeypatch.setattr("moe_jax.goodput.time.monotonic", lambda: moment[0])
    monkeypatch.setattr("moe_jax.goodput.time.time", lambda: 1e9 + moment[0])

    def later(seconds: float) -> None:
        moment[0] += seconds

    one = Goodput(tmp_path)
    for seconds, kind in ((10, "compile"), (30, "input"), (1, "compute"), (20, "save")):
        later(seconds)
        one.now(kind)
    later(5)
    one.saving()
    one.now("compute")
    expected = dict.fromkeys(one.seconds, 0) | {"start": 10, "compile": 30, "input": 1, "compute": 20, "save": 5}
    assert one.seconds == expected
    later(3)
    one.write()
    assert json.loads((tmp_path / "goodput.json").read_text())["unsaved"] == 23, "it is not on the disk yet"
    later(2)
    one.saved()
    assert json.loads((tmp_path / "goodput.json").read_text())["unsaved"] == 5 and not one.pending
    later(2)
    one.write()  # and then it is killed: 7 s of steps that no checkpoint holds
    later(100)
    other = Goodput(tmp_path)
    later(4)
    other.write(ended=True)
    assert other.processes == 2 and other.seconds == expected | {"lost": 7, "start": 14, "down": 100}
    assert json.loads((tmp_path / "goodput.json").read_text())["goodput"] == pytest.approx(20 / 177)
    later(1000)
    assert Goodput(tmp_path).seconds["down"] == 100, "it had ended"


def test_a_run_says_where_its_time_went(data, tmp_path):
    began = time.monotonic()
    child.run(tmp_path, data, optimizer=partial(optim.adamw, lambda step: 0.01))
    said = json.loads((tmp_path / "goodput.json").read_text())
    assert said["processes"] == 1 and said["unsaved"] == 0
    spent = said["seconds"]
    assert all((seconds > 0) == (kind not in ("lost", "down")) for kind, seconds in spent.items())
    speed = json.loads((tmp_path / "speed.jsonl").read_text().splitlines()[-1])
    assert {f"goodput/{kind}" for kind in spent} < speed.keys() and speed["goodput/compile"] == spent["compile"]
    assert 0.5 < sum(spent.values()) / (time.monotonic() - began) <= 1.0

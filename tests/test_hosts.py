"""Several hosts as one run: real processes on this machine, each with four virtual devices."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import child
import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from moe_jax import checkpoint, evaluate, hosts, main, sharding

ROOT = Path(__file__).parents[1]
SUPERVISE = ROOT / "tpu_scripts" / "supervise.sh"
HEARTBEAT = 10  # seconds; that of host.py


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return child.copying(tmp_path_factory.mktemp("data") / "copy")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def started(folder: Path, data: Path, killed_at: int | None = None, processes: int = 2) -> list[subprocess.Popen]:
    """Hosts, each under its supervisor; the last is killed, once, at a step."""
    folder.mkdir(exist_ok=True)
    paths = [str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_NUM_CPU_DEVICES": str(8 // processes)}
    port = str(free_port())
    out = []
    for i in range(processes):
        command = [str(SUPERVISE), "--wait", "1", "--tries", "4", "--", sys.executable, str(ROOT / "tests" / "host.py")]
        command += [str(folder), str(data), port, str(processes), str(i)]
        command += [str(killed_at)] if killed_at is not None and i == processes - 1 else []
        log = open(folder / f"host{i}.log", "w")  # noqa: SIM115
        out.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
    return out


def ended(folder: Path, hosts: list[subprocess.Popen], seconds: float = 400) -> list[int]:
    try:
        return [host.wait(seconds) for host in hosts]
    finally:
        for host in hosts:
            if host.poll() is None:
                os.killpg(host.pid, signal.SIGKILL)
                print((folder / f"host{hosts.index(host)}.log").read_text()[-3000:])


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    hosts = started(folder, data)
    assert ended(folder, hosts) == [0, 0], (folder / "host0.log").read_text()[-3000:]
    return folder


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same_model(folder: Path, other: Path) -> None:
    """To the bit."""
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_two_hosts_train_as_one_does(data, unbroken, tmp_path):
    """To rounding: sums over devices come in another order."""
    child.run(tmp_path, data)
    one, two = losses(tmp_path), losses(unbroken)
    assert one.keys() == two.keys() == set(range(1, child.STEPS + 1))
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=2e-3)


def test_two_hosts_that_hold_the_same_rows_read_the_same_rows(data, tmp_path, monkeypatch):
    """A matrix split over all devices of both: each needs the whole batch."""
    monkeypatch.setenv("MESH", json.dumps({"data": 1, "model": 8}))
    folder = tmp_path / "two"
    assert ended(folder, started(folder, data)) == [0, 0], (folder / "host0.log").read_text()[-3000:]
    child.run(tmp_path / "one", data)
    one, two = losses(tmp_path / "one"), losses(folder)
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=2e-3)


TURNS = """
import sys, time
from pathlib import Path
from moe_jax import hosts
hosts.join(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]), 10)

def prepare():
    if hosts.first() and not (slow := Path(sys.argv[1]) / "slow").exists():
        time.sleep(3)
        slow.touch()
    return time.monotonic()

said = [hosts.in_turn(prepare)() for _ in range(2)]
assert hosts.alone(lambda: "written")() == ("written" if hosts.first() else None)
print(*said)
"""


def test_hosts_wait_for_the_one_that_prepares_without_a_sum_over_devices(tmp_path):
    """Which on GPUs would give up on it; the same name may be waited for again."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command, port = [sys.executable, "-c", TURNS, str(tmp_path)], str(free_port())
    env = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "2"}
    both = [
        subprocess.Popen([*command, port, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [host.communicate(timeout=200) for host in both]
    assert [host.returncode for host in both] == [0, 0], said
    (first, again), (second, _) = ([float(n) for n in out.split()] for out, _ in said)
    assert first < second < again


def test_two_hosts_train_the_adapters_of_a_base_and_score_as_one_does(data, unbroken, tmp_path, monkeypatch):
    """A base whose experts lie on both: each reads its part."""
    texts = ["the cat sat on the mat", "a bird looked at the cat", "the mat", "looked at a bird and a cat"]
    rows = [{"task": "asr", "hypotheses": [text[1:], text[:-1]], "reference": text} for text in texts]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = one, two = tmp_path / "one", tmp_path / "two"
    more = {"BASE": str(unbroken), "EVALUATE": str(corpus), "MESH": json.dumps({"data": 1, "fsdp": 2, "expert": 4})}
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    assert ended(two, started(two, data)) == [0, 0], (two / "host0.log").read_text()[-3000:]
    child.run(one, data, init_from=str(unbroken), adapters=child.FACTORS)
    assert losses(one).keys() == losses(two).keys()
    np.testing.assert_allclose(list(losses(one).values()), list(losses(two).values()), rtol=2e-3)
    metas = [checkpoint.Source(folder / "adapters.safetensors").meta for folder in folders]
    assert metas[0]["base"] == metas[1]["base"] and len(metas[0]["base"]) == 64

    shutil.copy(two / "model.safetensors", one)
    before = dict(checkpoint.Source(two))
    how: dict[str, Any] = {"valid": [str(corpus)], "test": [str(corpus)], "valid_data": str(data), "beams": 2}
    evaluate.evaluate(str(one), **how, progress=False)
    scores = [json.loads((folder / "scores.json").read_text())["rows"] for folder in folders]
    assert scores[0] == scores[1]
    for name in ("examples.jsonl", "routing.json"):
        said = [(folder / name).read_text() for folder in folders]
        numbers = [np.array([float(n) for n in re.findall(r"\d+\.\d+", text)]) for text in said]
        np.testing.assert_allclose(*numbers, rtol=1e-3, atol=1e-4)
        assert re.sub(r"\d+\.\d+", "", said[0]) == re.sub(r"\d+\.\d+", "", said[1])
    assert checkpoint.Source(two).meta == checkpoint.Source(one).meta  # the guard too
    jax.tree.map(np.testing.assert_array_equal, dict(checkpoint.Source(two)), before)


def on_hosts(shape: tuple[int, ...], hosts: list[int]) -> Any:
    """What `part_of_batch` looks at of a mesh: which device of it is of which host."""
    devices = np.array([SimpleNamespace(process_index=host) for host in hosts]).reshape(shape)
    return SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, shape, strict=True)))


@pytest.mark.parametrize(
    ("shape", "hosts", "parts"),
    [
        ((1, 4, 1, 1, 1), [0, 0, 1, 1], [(0, 2), (1, 2)]),
        ((1, 1, 1, 1, 4), [0, 0, 1, 1], [(0, 1), (0, 1)]),  # one group of `model` over both hosts
        ((1, 2, 1, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 2, 1, 2, 2), [0, 1, 0, 1, 2, 3, 2, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 2, 2, 1, 1), [0, 1, 0, 1], [(0, 2), (1, 2)]),  # parts need not be neighbours
        ((2, 1, 1, 2, 1), [1, 1, 0, 0], [(1, 2), (0, 2)]),
    ],
)
def test_a_host_reads_the_part_of_a_batch_that_its_devices_hold(shape, hosts, parts):
    assert [sharding.part_of_batch(on_hosts(shape, hosts), host) for host in range(max(hosts) + 1)] == parts


@pytest.mark.parametrize(
    ("hosts", "says"),
    [([0, 0, 0, 1, 1, 1], "hosts have some rows of a batch in common"), ([1, 1, 1, 1, 1, 1], "has no device")],
)
def test_a_mesh_across_which_hosts_lie_askew_is_refused(hosts, says):
    with pytest.raises(ValueError, match=says):
        sharding.part_of_batch(on_hosts((1, 3, 1, 1, 2), hosts), 0)


def test_what_two_hosts_saved_goes_on_on_one(data, unbroken, tmp_path):
    """On another number of hosts and of devices: its digests say that every number is what was saved."""
    store = checkpoint.Run(unbroken)
    names = {p.name for p in (unbroken / "checkpoints" / str(store.latest())).rglob("ocdbt.process_*")}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= names, "both hosts wrote"
    store.close()
    shutil.copytree(unbroken, tmp_path / "run")
    done = child.run(tmp_path / "run", data, steps=child.STEPS + 2)
    assert done.step == child.STEPS + 2
    assert list(losses(tmp_path / "run")) == list(range(1, child.STEPS + 3))


def test_a_host_is_killed_the_others_end_and_the_run_goes_on_to_the_same_bits(data, tmp_path, unbroken):
    hosts = started(tmp_path / "run", data, killed_at=9)
    log, killed = tmp_path / "run" / "host0.log", tmp_path / "run" / "killed"
    while "supervise: ended with" not in log.read_text():
        time.sleep(0.1)
        assert hosts[0].poll() is None, log.read_text()[-3000:]
    assert time.time() - killed.stat().st_mtime < HEARTBEAT + 10, "it waits for a host that is lost"
    assert ended(tmp_path / "run", hosts) == [0, 0], log.read_text()[-3000:]
    survivor, killed = ((tmp_path / "run" / f"host{i}.log").read_text() for i in (0, 1))
    assert "supervise: ended with 137 (killed" in killed and "starting it again in 1 s (try 2 of 4)" in killed
    assert "supervise: ended with 134 (another host was lost" in survivor
    mine, theirs = losses(tmp_path / "run"), losses(unbroken)
    assert mine == {step: theirs[step] for step in mine} and len(mine) == child.STEPS
    goodput = json.loads((tmp_path / "run" / "goodput.json").read_text())
    assert goodput["processes"] == 2 and goodput["seconds"]["down"] > 0
    same_model(tmp_path / "run", unbroken)


def test_a_preempted_host_makes_all_save_at_one_step(data, tmp_path, unbroken, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("STEP_SECONDS", "1")  # or the run were done before the signal comes
    hosts = started(folder, data)
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 2:
        time.sleep(0.05)
        assert hosts[0].poll() is None, (folder / "host0.log").read_text()[-3000:]
    hosts[1].terminate()  # one of them; its supervisor passes it on, and the other host's starts again
    code = hosts[1].wait(200)
    said = (folder / "host1.log").read_text()
    assert code == 143 and "the same command goes on from there" in said
    os.killpg(hosts[0].pid, signal.SIGKILL)
    step = int(said.rpartition("stopped at step ")[2].split()[0])
    assert f"stopped at step {step} of" in (folder / "host0.log").read_text()
    assert list(losses(folder))[-1] == step
    monkeypatch.delenv("STEP_SECONDS")
    assert ended(folder, started(folder, data)) == [0, 0]
    theirs = losses(unbroken)
    assert losses(folder) == {n: theirs[n] for n in range(1, child.STEPS + 1)}
    same_model(folder, unbroken)


def test_an_interrupt_of_one_of_several_hosts_is_told_to_all(monkeypatch):
    """As a SIGTERM is, which JAX listens to; the second one stops at once."""
    told: list[int] = []
    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda _: bool(told))
    try:
        with hosts.Stop("saving") as stop:
            assert stop.at(1) == 0
            signal.raise_signal(signal.SIGINT)
            assert told == [signal.SIGTERM] and stop.at(2) == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        told[:] = [signal.SIGTERM]
        with hosts.Stop("saving") as stop:
            assert stop.at(3) == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == before[0]
    finally:
        signal.signal(signal.SIGTERM, before[1])


FAILS = """
import jax
from jax.experimental import multihost_utils
from moe_jax import hosts

def job(how):
    if how == "late":  # the first fails while the other waits
        if hosts.first():
            raise ValueError("no disk")
        hosts.wait("the first")
    multihost_utils.process_allgather(jax.numpy.ones(()))
    if how == "both" or not hosts.first():
        raise {"value": ValueError("a.jsonl:3: no text"), "both": ValueError("no text"), "bug": KeyError("x")}[how]
    multihost_utils.process_allgather(jax.numpy.ones(()))  # of which the other knows nothing
"""


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("value", 2, ["host 1 failed: ValueError: a.jsonl:3: no text", "error: a.jsonl:3: no text"]),
        ("bug", 1, ["host 1 failed: KeyError: 'x'", "KeyError: 'x'"]),
        ("both", 2, ["error: no text"] * 2),
        ("late", 2, ["error: no disk", "host 0 failed: ValueError: no disk"]),
    ],
)
def test_a_host_that_fails_ends_all_with_its_code_in_seconds(how, code, says, tmp_path):
    """Though they wait for it within a step."""
    (tmp_path / "fails.py").write_text(FAILS)
    lines = ["from __gin__ import dynamic_registration", "from moe_jax import main", "import fails"]
    lines += ["main.run.jobs = [@fails.job]", f"fails.job.how = '{how}'"]
    (tmp_path / "fails.gin").write_text("\n".join(lines))
    paths = os.pathsep.join(filter(None, [str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "moe_jax.main", f"--gin_file={tmp_path}/fails.gin", "--processes=2"]
    command += [f"--coordinator=localhost:{free_port()}"]
    env = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "2"}
    both = [
        subprocess.Popen([*command, f"--process={i}"], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    said = [host.communicate(timeout=200)[1] for host in both]
    assert [host.returncode for host in both] == [code, code], said
    for text, line in zip(said, says, strict=True):
        assert line in text.splitlines()
        assert ("Traceback" in text) == (line == "KeyError: 'x'")
        assert bool(re.search(r"host . failed", text)) == line.startswith("host ")


def test_a_host_that_cannot_join_says_so():
    command = [sys.executable, "-m", "moe_jax.main", "--gin_file=runs/quickstart.gin", "--coordinator=nowhere"]
    done = subprocess.run([*command, "--processes=2", "--process=5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "error: cannot join the other hosts" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nmore"), 75),
        (RuntimeError("UNAVAILABLE: failed to connect to all addresses"), 75),
        (RuntimeError("INVALID_ARGUMENT: Unexpected task"), 2),
        (ValueError("Number of processes must be defined."), 2),
    ],
)
def test_hosts_that_are_late_are_tried_again_and_wrong_flags_are_not(error, code, monkeypatch, capsys):
    given = {}

    def initialize(*_, **options):
        given.update(options)
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    argv = ["--gin_file=runs/quickstart.gin", "--distributed", "--heartbeat=7", "--join_timeout=9"]
    assert main.main(argv) == code
    assert given == {"heartbeat_timeout_seconds": 7, "initialization_timeout": 9}
    said = capsys.readouterr().err
    assert "cannot join the other hosts" in said and str(error).splitlines()[0] in said and said.count("\n") == 1


def test_alone_is_as_before():
    assert jax.process_count() == 1 and hosts.first() and not hosts.several()
    assert hosts.alone(lambda x: x + 1)(1) == hosts.in_turn(lambda x: x + 1)(1) == 2

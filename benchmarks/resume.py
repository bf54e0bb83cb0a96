"""One of two hosts of a run is killed: how long until the other has noticed and until both train on, and whether what
comes of it is what an unbroken run gives, to the bit.

    python -m benchmarks.resume --json resume.json        # some minutes

Hosts are processes of four virtual devices each, under tpu_scripts/supervise.sh, that train the quickstart. One is
killed (SIGKILL) after a step that lies behind the last checkpoint. "noticed" is until the other host has ended, the
rival its heartbeat; "step" until a step is logged again, which is the one after that checkpoint, the rival an unbroken
run's time from start to its first; "caught up" until the killed step is logged again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT
from benchmarks.measure import main, row

PROCESSES, DEVICES, HEARTBEAT, PAUSE = 2, 4, 10, 1
STEPS, SAVED, KILLED = 18, 6, 10
ENDED = "supervise: ended with"  # now and then also at the start: Gloo waits 30 s for a host that is slow to compile
JOBS = "[@train_data/prepare.prepare, @valid_data/prepare.prepare, @train.train]"


def command(folder: Path, data: Path, port: int, process: int) -> list[str]:
    about: dict[str, Any] = {
        "RUN_DIR": folder,
        "DATA": data / "train",
        "VALID_DATA": data / "valid",
        "EXAMPLES": 400,
        "BATCH": 8,
    }
    about |= {"STEPS": STEPS, "EVERY": SAVED, "main.run.jobs": JOBS, "train.train.log_every": 1}
    command = [str(ROOT / "tpu_scripts" / "supervise.sh"), "--wait", str(PAUSE), "--tries", "5", "--", sys.executable]
    command += ["-m", "moe_jax.main", "--gin_file=runs/quickstart.gin"]
    command += [
        f"--gin_bindings={name}={json.dumps(str(v)) if isinstance(v, Path) else v}" for name, v in about.items()
    ]
    command += [f"--coordinator=localhost:{port}", f"--processes={PROCESSES}", f"--process={process}"]
    return [*command, f"--heartbeat={HEARTBEAT}"]


@contextlib.contextmanager
def hosts(folder: Path, data: Path) -> Generator[list[subprocess.Popen]]:
    """Their supervisors, each in a group of its own, all of which end with this."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    out = []
    try:
        for i in range(PROCESSES):
            with open(folder / f"host{i}.log", "w") as log:
                words, both = command(folder, data, port, i), subprocess.STDOUT
                one = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=both, start_new_session=True)
                out.append(one)
        yield out
    finally:
        for host in out:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)


def log(folder: Path, process: int) -> str:
    return (folder / f"host{process}.log").read_text("utf-8")


def losses(folder: Path) -> dict[int, str]:
    """The line that was logged of each step, as far as it is whole."""
    path = folder / "metrics.jsonl"
    whole = path.read_text("utf-8").rpartition("\n")[0].splitlines() if path.exists() else []
    return {json.loads(line)["step"]: line for line in whole if '"loss"' in line}


def when(happened: Callable[[], Any], folder: Path, running: list[subprocess.Popen]) -> float:
    """The time at which it has. Raises RuntimeError where a host is given up before."""
    while not happened():
        if any(host.poll() for host in running):
            raise RuntimeError(f"a host ended:\n{log(folder, 0)[-2000:]}\n{log(folder, 1)[-2000:]}")
        time.sleep(0.02)
    return time.monotonic()


def ended(folder: Path, running: list[subprocess.Popen]) -> None:
    when(lambda: all(host.poll() == 0 for host in running), folder, running)


def killed() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        whole, broken, data = (Path(temporary) / name for name in ("whole", "broken", "data"))
        began = time.monotonic()
        with hosts(whole, data) as running:
            first = when(lambda: losses(whole), whole, running) - began
            ended(whole, running)
        with hosts(broken, data) as running:
            when(lambda: KILLED in losses(broken), broken, running)
            last, before = running[-1].pid, log(broken, 0).count(ENDED)
            child = subprocess.run(["pgrep", "-P", str(last)], capture_output=True, text=True, check=True).stdout
            os.kill(int(child.split()[0]), signal.SIGKILL)
            began = time.monotonic()
            noticed = when(lambda: log(broken, 0).count(ENDED) > before, broken, running) - began
            when(lambda: max(losses(broken), default=0) < KILLED, broken, running)
            step = when(lambda: max(losses(broken), default=0) > SAVED, broken, running) - began
            caught = when(lambda: KILLED in losses(broken), broken, running) - began
            ended(broken, running)
        same = {"losses": losses(broken) == losses(whole)}
        names = ("model.safetensors", "metrics.jsonl")
        same |= {name: (broken / name).read_bytes() == (whole / name).read_bytes() for name in names}
        if not all(same.values()):
            raise RuntimeError(f"not what the unbroken run gave: {same}")
    about = {"unit": "s", "hosts": PROCESSES, "devices": DEVICES, "killed after": KILLED, "checkpoint": SAVED}
    about |= {"same bits": ", ".join(same)}
    yield row("noticed", noticed, float(HEARTBEAT), None, **about)
    yield row("step", step, first, None, **about)
    yield row("caught up", caught, first, None, **about)


if __name__ == "__main__":
    main(str(__doc__), {"killed": killed})

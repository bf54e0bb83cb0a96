"""A short training run, with everything in it that a resumed run must get right. As a program:

python child.py RUN_DIR DATA STEP    is killed, without warning, after logging that step
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny
from jax.sharding import Mesh

from moe_jax import adapters, checkpoint, optim, sharding, train
from moe_jax.data import write_prepared
from moe_jax.moe import dispatch, routers
from moe_jax.packing import Packable
from moe_jax.text import tokeniser as tk

STEPS, SAVE_EVERY = 12, 4


FAMILIES = {"asr": 1, "ocr": 2}
FACTORS = adapters.Adapters(rank=2, full=["router/"])


def tokeniser() -> tk.Tokeniser:
    return tk.train(["the cat sat on the mat and looked at a bird"] * 3, 282)


def copying(folder: Path) -> Path:
    """Data: four letters, a mark of the task, the four letters again (for the second task: backwards)."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(512):
        task, letters = 1 + i % 2, rng.integers(20, 26, 4).tolist()
        examples.append(Packable([*letters, task + 8, *letters[:: 3 - 2 * task]], [1] * 5 + [2] * 4, task))
    write_prepared(folder, examples, length=18, tokeniser=tokeniser(), families=FAMILIES)
    return folder


def everything(folder) -> tuple:
    """Parameters and optimiser state by their bits, with the log and the exported model."""
    store = checkpoint.Run(folder)
    step = store.latest()
    raw = [store.manager.restore(step)[item] for item in ("params", "opt")]
    store.close()
    bits = jax.tree.map(lambda x: np.asarray(x).tobytes(), raw)
    return step, bits, (folder / "metrics.jsonl").read_bytes(), (folder / "model.safetensors").read_bytes()


def one_device() -> Mesh:
    return sharding.make_mesh(devices=jax.devices()[:1])


NOISY = partial(routers.BiasBalanced, jitter=0.1)


def configured(router=NOISY, **args):
    """A model with noise, state that no gradient moves, dropped tokens and auxiliary losses."""
    ffn = tiny.moe(router, partial(dispatch.slots, factor=1.0))
    return tiny.configured(ffn, **{"auxiliary": {"load_balance": 0.01, "router_z": 0.001}, **args})


def run(run_dir, data, **changes) -> train.State:
    settings: dict[str, Any] = {
        "model": configured(),
        "optimizer": partial(optim.adamw, optim.warmup_linear(0.01, steps=STEPS, warmup=2)),
        "data": str(data),
        "valid_data": str(data),
        "mesh": one_device,
        "steps": STEPS,
        "batch_size": 8,
        "valid_batches": 2,
        "log_every": 1,
        "eval_every": 6,
        "save_every": SAVE_EVERY,
        "progress": False,
    }
    return train.train(str(run_dir), **(settings | changes))


def signal_at(last: int, number: int):
    """Logs that send this process a signal when a step has been logged."""

    class Signalling(train.Logs):
        def metrics(self, step, scalars):
            super().metrics(step, scalars)
            if step == last:
                os.kill(os.getpid(), number)

    return Signalling


if __name__ == "__main__":
    train.Logs = signal_at(int(sys.argv[3]), signal.SIGKILL)
    run(sys.argv[1], sys.argv[2])

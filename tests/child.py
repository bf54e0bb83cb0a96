"""A short training run, with everything in it that a resumed run must get right. As a program:

python child.py RUN_DIR DATA STEP    is killed, without warning, after logging that step
"""

import os
import signal
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import tiny
from jax.sharding import AxisType, Mesh

from moe_jax import optim, sharding, train
from moe_jax.moe import dispatch, routers

STEPS, SAVE_EVERY = 12, 4


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


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

"""One of several hosts of a short training run (`child.py`).

python host.py RUN_DIR DATA PORT PROCESSES PROCESS [KILLED_AT]    kills itself, once, after that step

With STEP_SECONDS each step lasts so much longer; MESH is the mesh's axes as JSON; EVALUATE a corpus to score after it;
BASE a model to begin with, of which adapters train.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

run_dir, data, port, processes, process = sys.argv[1:6]

from moe_jax import hosts  # noqa: E402

hosts.join(f"localhost:{port}", int(processes), int(process), 10)

import child  # noqa: E402

from moe_jax import evaluate, sharding, train  # noqa: E402
from moe_jax.partfile import Stopped  # noqa: E402

made = train.make_step


def make_step(*args, **options):
    step_fn = made(*args, **options)

    def step(params, opt, number, *rest):
        params, opt, metrics = step_fn(params, opt, number, *rest)
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        done = Path(run_dir) / "killed"
        if len(sys.argv) > 6 and int(number) == int(sys.argv[6]) and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return params, opt, metrics

    return step


train.make_step = make_step

try:
    axes = json.loads(os.environ.get("MESH", '{"data": 4, "expert": 2}'))
    mesh = lambda: sharding.make_mesh(**axes)  # noqa: E731
    base = {"init_from": os.environ["BASE"], "adapters": child.FACTORS} if "BASE" in os.environ else {}
    child.run(run_dir, data, mesh=mesh, **base)
    if corpus := os.environ.get("EVALUATE"):
        evaluate.evaluate(run_dir, valid=[corpus], test=[corpus], valid_data=data, beams=2, mesh=mesh, progress=False)
except Stopped as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.code)

"""What a checkpoint costs a run: bytes, how long a step waits for a save, until it is on the disk, and to read it back.

    python -m benchmarks.checkpoints

Random parameters and two moments of each, as Adam has them, in matrices of 4 MiB. A save copies arrays and their
digests while training waits; they are written while it goes on ("ours" is the wait, "rival" all of it). "read" is
against the same bytes by `safetensors`, that are read and copied.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from benchmarks.measure import main, row
from moe_jax import checkpoint

SIDE, ROUNDS = 1024, 3
SIZES = {"25M": 25, "100M": 100}  # matrices of 2**20 parameters


def table(number: int, seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), number)
    return {f"blocks/{i}": jax.random.normal(key, (SIDE, SIDE)) for i, key in enumerate(keys)}


def timed(call: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def cases(number: int) -> Iterator[dict[str, Any]]:
    params, opt = table(number, 0), [table(number, 1), table(number, 2)]
    jax.block_until_ready((params, opt))
    with tempfile.TemporaryDirectory() as temporary:
        run = checkpoint.Run(temporary)
        waits, wholes = [], []
        for step in range(ROUNDS):
            began = time.perf_counter()
            run.save(step, params, opt, {}, 1.0)
            waits.append(time.perf_counter() - began)
            run.manager.wait_until_finished()
            wholes.append(time.perf_counter() - began)
        last = run.folder / str(ROUNDS - 1)
        size = sum(f.stat().st_size for f in last.rglob("*") if f.is_file())
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (params, opt))
        read = min(
            timed(lambda: (run.params(ROUNDS - 1, like[0]), run.opt(ROUNDS - 1, like[1]))) for _ in range(ROUNDS)
        )
        run.close()
        about = {"unit": "s", "MB": size / 1e6, "MB of arrays": 12e-6 * number * SIDE**2}
        yield row("save: wait / whole", sorted(waits)[1], sorted(wholes)[1], None, **about)
        shutil.rmtree(run.folder)
        plain = {f"{i}/{n}": x for i, t in enumerate((params, *opt)) for n, x in t.items()}
        file = Path(temporary) / "plain.safetensors"
        save_file(jax.device_get(plain), file)
        theirs = min(timed(lambda: jax.tree.map(jnp.array, load_file(file))) for _ in range(ROUNDS))
        yield row("read", read, theirs, None, **about)


if __name__ == "__main__":
    main(str(__doc__), {name: partial(cases, number) for name, number in SIZES.items()})

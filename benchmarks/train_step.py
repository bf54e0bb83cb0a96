"""A whole training step of the corrector (forward, loss, backward, AdamW) against transformers on PyTorch.

    python -m benchmarks.train_step --json step.json        # about 8 minutes on two cores; needs '.[bench]'

Both have the same shapes, parameters and batch, and first show equal logits. PyTorch runs eagerly with its fused AdamW
and two implementations of the expert layer; the rival is the fastest of them. Each runs in a process of its own, and
they take turns of 4 steps (of the large batch 1), each after as many that are not timed. "first call" traces and
compiles, or finds the program where it was kept; "host" is how long a step holds the process that calls it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import peer
from benchmarks.measure import apart, interleaved, main, row, unpadded
from moe_jax import optim, train, tree
from moe_jax.types import Batch

RATE, TARGET = 1e-4, 1.0
TURN = 4 * 2048  # tokens
EXPERTS = ("eager", "grouped_mm")  # "batched_mm" gathers a matrix for every token: out of memory at these sizes


Steps = Callable[[int], tuple[float, float]]
"""A call is so many steps; it gives the last loss, and the seconds for which that step held the host."""


def ours(model: Any, tokens: np.ndarray) -> Steps:
    info = unpadded(*tokens.shape)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    batch = Batch(jnp.asarray(tokens), jnp.roll(jnp.asarray(tokens), -1, axis=1), weights, info)
    transform = optim.adamw(lambda step: RATE)
    step = train.make_step(model, transform, seed=0, micro=1, dtype="float32", max_targets=tokens.shape[1])
    params = tree.flatten(model)
    state = [params, transform.init(params)]

    def call(steps: int) -> tuple[float, float]:
        for _ in range(steps):
            began = time.perf_counter()
            state[0], state[1], metrics = step(state[0], state[1], jnp.int32(0), batch)
            held = time.perf_counter() - began
            loss = float(metrics["loss"])
        return loss, held

    return call


def theirs(network: Any, tokens: np.ndarray) -> Steps:
    import torch

    network.train()
    ids = torch.from_numpy(tokens.astype(np.int64))
    optimizer = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def call(steps: int) -> tuple[float, float]:
        for _ in range(steps):
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = network(ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            held = time.perf_counter() - began
        return float(loss.detach()), held

    return call


def _ours(shape: peer.Shape, tokens: np.ndarray) -> Steps:
    return ours(peer.ours(shape), tokens)


def _theirs(shape: peer.Shape, tokens: np.ndarray, experts: str) -> Steps:
    return theirs(peer.theirs(shape, peer.ours(shape), experts), tokens)


def step(shape: peer.Shape, rows: int, length: int) -> Iterator[dict[str, Any]]:
    tokens = np.random.default_rng(0).integers(3, shape.vocab, (rows, length)).astype(np.int32)
    model = peer.ours(shape)
    peer.agree(shape, model, peer.theirs(shape, model))
    with contextlib.ExitStack() as processes:
        kinds = EXPERTS if shape.experts else ("dense",)
        rivals = {kind: processes.enter_context(apart(_theirs, shape, tokens, kind)) for kind in kinds}
        rivals["ours"] = processes.enter_context(apart(_ours, shape, tokens))
        first = {name: call(1) for name, call in rivals.items()}
        losses = {name: loss for name, (loss, _) in first.items()}
        if not np.allclose(list(losses.values()), losses["ours"], rtol=1e-4):
            raise ValueError(f"the losses of the first step differ: {losses}")
        turn = max(TURN // tokens.size, 1)
        times = interleaved({name: partial(call, turn) for name, call in rivals.items()}, rounds=5, rouse=1)
        host = rivals["ours"](1)[1]
    times = {name: seconds / turn for name, seconds in times.items()}
    mine, best = times.pop("ours"), min(times, key=lambda name: times[name])
    flops = 6 * shape.active * tokens.size
    more = {"unit": "ms", "their experts": best, "tokens/s": tokens.size / mine, "GFLOP/s": flops / mine / 1e9}
    more |= {"first call s": first["ours"][1], "host ms": 1e3 * host}
    yield row("step", 1e3 * mine, 1e3 * times[best], TARGET, **more)


CASES = {
    f"{name} {rows}x{length}": partial(step, shape, rows, length)
    for name, shape in (("moe", peer.MOE), ("dense", peer.DENSE))
    for rows, length in ((8, 256), (16, 512))
}

if __name__ == "__main__":
    main(str(__doc__), CASES)

"""A whole training step of the corrector (forward, loss, backward, AdamW) against transformers on PyTorch.

    python -m benchmarks.train_step --json step.json        # about 5 minutes on two cores; needs '.[bench]'

Both have the same shapes, parameters and batch, and first show equal logits. PyTorch runs eagerly with its fused AdamW
and two implementations of the expert layer; the rival is the fastest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peer
from benchmarks.measure import interleaved, main, row, unpadded
from moe_jax import optim, train, tree
from moe_jax.types import Batch

RATE, TARGET = 1e-4, 1.0
EXPERTS = ("eager", "grouped_mm")  # "batched_mm" gathers a matrix for every token: out of memory at these sizes


def ours(model: Any, tokens: np.ndarray) -> Callable[[], Any]:
    """A call is one step."""
    info = unpadded(*tokens.shape)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    batch = Batch(jnp.asarray(tokens), jnp.roll(jnp.asarray(tokens), -1, axis=1), weights, info)
    transform = optim.adamw(lambda step: RATE)
    step = train.make_step(model, transform, seed=0, micro=1, dtype="float32", max_targets=tokens.shape[1])
    params = jax.tree.map(jnp.array, tree.flatten(model))  # the step donates them
    state = [params, transform.init(params)]

    def call() -> float:
        state[0], state[1], metrics = step(state[0], state[1], jnp.int32(0), batch)
        return float(metrics["loss"])

    return call


def theirs(shape: peer.Shape, model: Any, tokens: np.ndarray, experts: str) -> Callable[[], Any]:
    import torch

    network = peer.theirs(shape, model, experts).train()
    ids = torch.from_numpy(tokens.astype(np.int64))
    optimizer = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = network(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return call


def step(shape: peer.Shape, rows: int, length: int) -> Iterator[dict[str, Any]]:
    tokens = np.random.default_rng(0).integers(3, shape.vocab, (rows, length)).astype(np.int32)
    model = peer.ours(shape)
    peer.agree(shape, model, peer.theirs(shape, model))
    kinds = EXPERTS if shape.experts else ("dense",)
    rivals = {kind: theirs(shape, model, tokens, kind) for kind in kinds}
    rivals["ours"] = ours(model, tokens)
    first = {name: call() for name, call in rivals.items()}
    if not np.allclose(list(first.values()), first["ours"], rtol=1e-4):
        raise ValueError(f"the losses of the first step differ: {first}")
    times = interleaved(rivals, seconds=20, rounds=5)
    mine, best = times.pop("ours"), min(times, key=lambda name: times[name])
    flops = 6 * shape.active * tokens.size
    more = {"unit": "ms", "their experts": best, "tokens/s": tokens.size / mine, "GFLOP/s": flops / mine / 1e9}
    yield row("step", 1e3 * mine, 1e3 * times[best], TARGET, **more)


CASES = {
    f"{name} {rows}x{length}": partial(step, shape, rows, length)
    for name, shape in (("moe", peer.MOE), ("dense", peer.DENSE))
    for rows, length in ((8, 256), (16, 512))
}

if __name__ == "__main__":
    main(str(__doc__), CASES)

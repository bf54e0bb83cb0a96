"""What task-level routing saves at inference: the part of a model that one direction needs against the whole of it.

    python -m benchmarks.task_level

A translator with random weights (d 384, 3 + 3 layers, 16 experts of 768 units, top 2, 8,000 tokens) reads and writes
batches of one direction, greedily, 32 tokens. "ours" is the subnetwork (`moe_jax.subnetwork`: of the decoder's 16
experts 2), the rivals are the whole model with the same task-level decoder, and a model with token-level gates on both
sides. Memory is that of the parameters, in bytes: each token is multiplied with as many in all three. (Kudugunta et al.
2021 report 1.87 times the peak throughput, with experts over many devices.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import measure
from moe_jax import decode, describe, subnetwork, tree
from moe_jax.layers.param import Rngs
from moe_jax.models.translator import Translator
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.routers import TopK
from moe_jax.moe.task_routers import TaskLevel

TASKS = {f"translate/{n}": n for n in range(1, 9)}
VOCAB, STEPS = 8000, 32


def model(decoder: Any, layers: int = 3) -> Translator:
    ffn = partial(MoeFfn, num_experts=16, hidden=768)
    sizes: dict[str, Any] = {"d": 384, "vocab": VOCAB, "encoder_layers": layers, "decoder_layers": layers}
    return Translator(
        **sizes, ffn=partial(ffn, router=decoder), encoder_ffn=partial(ffn, router=TopK), rngs=Rngs(params=0)
    )


def cases(batch: int) -> Iterator[dict[str, Any]]:
    whole, tokens = model(TaskLevel), model(TopK)
    meta = {"model": json.loads(json.dumps(describe.describe(whole))), "families": TASKS}
    table, about = subnetwork.extract(tree.flatten(whole), meta, "translate/1")
    part = tree.unflatten(describe.abstract(about["model"]), table)
    prompts = np.random.default_rng(0).integers(9, VOCAB, (batch, 24)).tolist()

    def write(network: Any) -> Any:
        read = decode.prefill(network, prompts, tasks=[1] * batch)
        return decode.search(network, read, max_new=STEPS, eos=(0,))

    networks = {"subnetwork": part, "task level": whole, "token level": tokens}
    seconds = measure.interleaved({name: partial(write, network) for name, network in networks.items()})
    size = {name: 4 * tree.count(tree.flatten(network)) for name, network in networks.items()}
    for rival in ("task level", "token level"):
        ours, theirs = 1e3 * seconds["subnetwork"], 1e3 * seconds[rival]
        yield measure.row(f"time / {rival}", ours, theirs, None, unit="ms")
        yield measure.row(f"parameters / {rival}", size["subnetwork"] / 1e6, size[rival] / 1e6, None, unit="MB")


if __name__ == "__main__":
    measure.main(__doc__, {f"batch {n}": partial(cases, n) for n in (1, 8, 32)})

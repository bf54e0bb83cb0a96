"""A model and batches small enough for any test."""

import gzip
import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import describe, main, pipeline, tree
from moe_jax.layers.attention import Attention
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.models.corrector import Corrector
from moe_jax.moe import dispatch, routers, task_routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.packing import COLUMNS, Packable, pack, to_batch
from moe_jax.tasks.families import FAMILIES
from moe_jax.text.tokeniser import Tokeniser
from moe_jax.types import Batch

VOCAB, D, E = 40, 16, 4

dense = partial(DenseFfn, hidden=24)


def moe(router=routers.TopK, to=dispatch.dropless, *, hidden: int = 8):
    return partial(MoeFfn, num_experts=E, hidden=hidden, router=router, dispatch=to)


def configured(ffn=dense, **args):
    """A `Corrector` of two layers, not yet built: call it with a vocabulary and rngs."""
    args = {"d": D, "layers": 2, "attention": partial(Attention, heads=4, kv_heads=2)} | args
    return partial(Corrector, ffn=ffn, **args)


def model(ffn=dense, **args) -> Corrector:
    return configured(ffn, **args)(vocab=VOCAB, rngs=Rngs(params=0))


def corpus(folder: Path) -> Path:
    """The first lines of the shipped corpus: jobs on them have shapes, and so programs, in common."""
    for path in Path(main.shipped("base.safetensors")).parent.glob("*.jsonl.gz"):
        split = path.name.split(".")[1]
        with gzip.open(path) as file:
            few = list(itertools.islice(file, {"train": 60, "valid": 8, "test": 6}[split]))
        (folder / path.name).write_bytes(gzip.compress(b"".join(few)))
    return folder


def exported(folder: Path) -> Path:
    """A run folder with a random MoE that has the shipped tokeniser, as `model.safetensors`."""
    tokeniser = Tokeniser.load(main.shipped("tokeniser.model"))
    ffn = partial(MoeFfn, num_experts=2, hidden=8, router=task_routers.TaskMapped)
    made = Corrector(d=D, layers=2, vocab=tokeniser.vocab_size, ffn=ffn, rngs=Rngs(params=0))
    meta = {"model": describe.describe(made), "families": FAMILIES, "layout": "aligned", "length": 64}
    pipeline.export(folder / "model.safetensors", tree.flatten(made), meta | tokeniser.meta(), guard=2.5)
    return folder


def batch(seed: int = 0, rows: int = 8, length: int = 12) -> Batch:
    """Packed examples of four families, each a prompt to read and a text to write."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(4 * rows):
        size = int(rng.integers(3, 8))
        read = int(rng.integers(1, size))
        roles = [1] * read + [2] * (size - read)
        examples.append(Packable(rng.integers(1, VOCAB, size).tolist(), roles, int(rng.integers(1, 5))))
    packed = list(pack(examples, length))[:rows]
    return jax.tree.map(jnp.asarray, to_batch({name: np.stack([row[name] for row in packed]) for name in COLUMNS}))

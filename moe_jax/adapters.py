"""What of a model trains: all of it, some of its leaves, or factors of low rank beside leaves that stand still.

LoRA (Hu et al. 2021) is a reparametrisation of the flat table path -> array: W' = W + (alpha / rank) A B on the last
two dims of a leaf, each matrix of a stack (a layer's, an expert's) with factors of its own. B begins as zero, so that
step 0 is the base. A step merges before it computes: that costs one more copy of the adapted leaves and their whole
gradient, where adding (x A) B to the activations would keep neither; in turn it is exact, and works for every leaf,
dispatch and kernel without a word in the model. There is no dropout: LoRA's acts on activations.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import checkpoint, tree
from moe_jax.types import Array

Table = dict[str, Array]
A, B = "/lora_a", "/lora_b"
BALANCE = re.compile(r"/router/(router/)?bias$")  # moves by the router's own rule, not by gradients


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Args:
    targets: patterns (regexes, searched in paths) of the leaves that get factors.
    full: patterns of the leaves that train as they are; they go before `targets`. What matches neither is frozen.
    rank, alpha: defaults as in HyPoradise's code.
    frozen_dtype: "bfloat16" halves the memory of frozen leaves (not of routers), and rounds them.
    """

    targets: Sequence[str] = (r"/attention/[qkvo]$",)
    full: Sequence[str] = ()
    rank: int = 16
    alpha: float = 16.0
    frozen_dtype: str = "float32"

    def __post_init__(self):
        if isinstance(self.targets, str) or isinstance(self.full, str):
            raise ValueError(f"adapters: give lists of patterns, not targets={self.targets!r}, full={self.full!r}")
        if not self.targets and not self.full:
            raise ValueError("adapters: nothing would train; give patterns of leaves as targets, full or both")
        if self.rank < 1 or self.frozen_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"adapters: rank={self.rank} must be 1 or more, frozen_dtype={self.frozen_dtype!r} float32 or bfloat16"
            )

    def split(self, table: Mapping[str, Any], words: Mapping[str, Sequence], key: Array) -> tuple[Table, Table]:
        """(what moves: leaves that train, new factors, the balance state of layers of which something trains; what
        stands still) of a model's table.

        Args:
          words: path -> the names of its trailing dims (`tree.axes`).

        Raises ValueError for a pattern that matches nothing, and for a target that is no matrix.
        """
        full, targets = _matching(self.full, table), _matching(self.targets, table)
        layers = {p: BALANCE.sub("/", p) for p in table if BALANCE.search(p)}
        balanced = {p for p, layer in layers.items() if any(path.startswith(layer) for path in full | targets)}
        moving = {p: x for p, x in table.items() if p in full or p in balanced}
        frozen = {p: self.kept(p, x) for p, x in table.items() if p not in moving}
        for i, path in enumerate(sorted(targets - set(moving))):
            if len(words[path]) < 2:
                raise ValueError(f"adapters: {path} is no matrix, it cannot have factors; narrow targets, or use full")
            *stack, rows, columns = table[path].shape
            # Normal, as in the paper, which leaves its size open: with variance 1 / inputs, our choice.
            a = jax.random.normal(jax.random.fold_in(key, i), (*stack, rows, self.rank)) * rows**-0.5
            moving |= {path + A: a, path + B: jnp.zeros((*stack, self.rank, columns))}
        return moving, frozen

    def kept(self, path: str, x: Any) -> Any:
        """A frozen leaf in the dtype in which it is kept."""
        return x if tree.is_router(path) else x.astype(self.frozen_dtype)

    def merge(self, moving: Mapping[str, Any], frozen: Mapping[str, Any]) -> Table:
        """The table of the model, in float32."""
        table = {p: x.astype(jnp.float32) for p, x in frozen.items()}
        table |= {p: x for p, x in moving.items() if not p.endswith((A, B))}
        for path in (p.removesuffix(A) for p in moving if p.endswith(A)):
            # "highest": where products of float32 are rounded, what is exported must be what was trained.
            delta = jnp.matmul(moving[path + A], moving[path + B], precision="highest")
            table[path] = table[path] + self.alpha / self.rank * delta
        return table


EVERYTHING = Adapters(targets=(), full=(r"",))


def _matching(patterns: Sequence[str], table: Mapping[str, Any]) -> set[str]:
    """The paths that any pattern matches. Raises ValueError for a pattern without any."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            own = {path for path in table if re.search(pattern, path)}
        except re.error as error:
            raise ValueError(f"adapters: {pattern!r} is no regular expression: {error}") from None
        if not own:
            near = difflib.get_close_matches(pattern, table, n=3, cutoff=0)
            raise ValueError(f"adapters: no path of this model matches {pattern!r}; near are {', '.join(near)}")
        found |= own
    return found


def trained(moving: Mapping[str, Any]) -> Table:
    """Those that gradients move."""
    return {p: x for p, x in moving.items() if not BALANCE.search(p)}


def differentiated(moving: Mapping[str, Any]) -> set[str]:
    """The paths of the leaves that a step has the gradient of: those of factors among them."""
    return {p.removesuffix(A).removesuffix(B) for p in trained(moving)}


def factor_words(words: Mapping[str, Sequence[str | None]]) -> dict[str, tuple[str | None, ...]]:
    """The words of every leaf's factors: a factor lies as its leaf does, its rank on every device."""
    matrices = {p: tuple(w) for p, w in words.items() if len(w) > 1}
    return {p + A: (*w[:-1], None) for p, w in matrices.items()} | {
        p + B: (*w[:-2], None, w[-1]) for p, w in matrices.items()
    }


def summary(moving: Mapping[str, Array], frozen: Mapping[str, Array]) -> str:
    """What trains: how many leaves and parameters, their share of all, and their names."""
    own = trained(moving)
    size, rest = tree.count(own), tree.count(frozen)
    names = sorted(f"{p} (factors)" if p + A in own else p for p in differentiated(moving))
    share = f"{size / 1e6:.2f} M of {(size + rest) / 1e6:.2f} M parameters ({size / (size + rest):.2%})"
    return f"{len(own)} leaves train, {share}: {', '.join(names)}"


def fingerprint(table: Mapping[str, Any]) -> str:
    """sha256 of leaves with their paths, dtypes and shapes: which base it was, however its file was written."""
    digest = hashlib.sha256()
    for path in sorted(table):
        x = np.ascontiguousarray(table[path])
        digest.update(json.dumps([path, x.dtype.name, x.shape]).encode() + x.tobytes())
    return digest.hexdigest()


def merged(path: Path | str, base: Path | str) -> tuple[Table, dict[str, Any]]:
    """(table, metadata) of a run's `adapters.safetensors` merged into the base on which it was trained: what the run
    exported as `model.safetensors`. Raises CheckpointError for what holds no adapters, and for another base.
    """
    moving, meta = checkpoint.read_safetensors(path)
    try:
        adapters = Adapters(**meta.pop("adapters"))
        sha256 = meta.pop("base")
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{path}: holds no adapters ({error}); name a run's adapters.safetensors"
        ) from error
    table = checkpoint.read_safetensors(base)[0]
    frozen = {p: x for p, x in table.items() if p not in moving}
    if fingerprint(frozen) != sha256:
        raise checkpoint.CheckpointError(
            f"{base} is not the base of {path}: name the file that the run started from (where it was changed by "
            "init_rules, the model.safetensors of a run of 0 steps)"
        )
    try:
        return adapters.merge(moving, {p: adapters.kept(p, x) for p, x in frozen.items()}), meta
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: its factors do not fit the base ({error}); is it whole?") from error

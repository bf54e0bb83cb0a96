"""Whose tensor is whose: names and layouts of other formats against our paths.

Every tensor is accounted for, in both directions: one that is missing, left over or of another shape is an error.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# What weights may be, as safetensors calls it, and what they become: nothing computes in 64 bits.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float32"}
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 100
_BRIEF.maxlevel = 1


class InteropError(ValueError):
    """One line: what, where, how to mend it."""


def brief(value: Any) -> str:
    """A value of a file in a message, however long it is."""
    return _BRIEF.repr(value)


def plain(name: str) -> str:
    """The same without quotes."""
    return brief(name)[1:-1]


class Source(Protocol):
    """Tensors by name; nothing is read before it is asked for. `kinds`: their dtypes, as safetensors calls them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def kinds(self) -> Mapping[str, str]: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a format calls our leaves, and how it lays them out.

    Attributes:
      top: our path -> name.
      block: our path within a block -> name, with {layer} and, where each expert has a tensor of its own, {expert}.
      norm_offset: added to the scales of norms when they are read (Gemma keeps them around 0).
      interleaved: rotary pairs lie beside each other, not a half of the head apart (GGUF's llama).
    """

    top: Mapping[str, str]
    block: Mapping[str, str]
    norm_offset: float = 0.0
    interleaved: bool = False


DENSE = {f"ffn/{name}": f"model.layers.{{layer}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
ATTENTION = {f"attention/{n}": f"model.layers.{{layer}}.self_attn.{n}_proj.weight" for n in "qkvo"}
ATTENTION |= {f"attention/{n}_bias": f"model.layers.{{layer}}.self_attn.{n}_proj.bias" for n in "qkv"}
NORMS = {
    "norm_attention/scale": "model.layers.{layer}.input_layernorm.weight",
    "norm_ffn/scale": "model.layers.{layer}.post_attention_layernorm.weight",
}
TOP = {"embedding": "model.embed_tokens.weight", "norm/scale": "model.norm.weight", "output": "lm_head.weight"}
LLAMA = Naming(TOP, NORMS | ATTENTION | DENSE)
GEMMA = dataclasses.replace(LLAMA, norm_offset=1.0)
_MIXTRAL = "model.layers.{layer}.block_sparse_moe"
MIXTRAL = dataclasses.replace(
    LLAMA,
    block=NORMS
    | ATTENTION
    | {"ffn/router/gate": f"{_MIXTRAL}.gate.weight"}
    | {
        f"ffn/experts/{ours}": f"{_MIXTRAL}.experts.{{expert}}.{theirs}.weight"
        for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
)
_QWEN = "model.layers.{layer}.mlp"
QWEN2_MOE = dataclasses.replace(
    LLAMA,
    block=NORMS
    | ATTENTION
    | DENSE
    | {"ffn/router/gate": f"{_QWEN}.gate.weight", "ffn/shared_gate": f"{_QWEN}.shared_expert_gate.weight"}
    | {f"ffn/experts/{n}": f"{_QWEN}.experts.{{expert}}.{n}_proj.weight" for n in ("gate", "up", "down")}
    | {f"ffn/shared/{n}": f"{_QWEN}.shared_expert.{n}_proj.weight" for n in ("gate", "up", "down")},
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of theirs lies: `index` into the leading dims (layer, expert) of our leaf at `path`."""

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]  # theirs
    theirs: Callable[[np.ndarray], np.ndarray]  # layouts, both ways
    ours: Callable[[np.ndarray], np.ndarray]


def places(model: Any, shapes: Mapping[str, tuple[int, ...]], naming: Naming) -> Iterator[Place]:
    """A place for every tensor of a `Corrector` whose leaves have these shapes.

    Raises InteropError for a leaf that the format has no name for.
    """
    dense = set(model.dense_layers)
    numbers = {
        "blocks": [n for n in range(model.layers) if n not in dense],
        "dense_blocks": list(model.dense_layers),
    }
    for path, shape in shapes.items():
        stack, _, part = path.partition("/")
        stacked = stack in numbers
        name = naming.block.get(part) if stacked else naming.top.get(path)
        if name is None:
            raise InteropError(f"{path} has no counterpart in this format")
        forth, back = _layout(path, model, naming)
        for i, layer in enumerate(numbers[stack]) if stacked else [(None, None)]:
            experts = range(shape[1]) if "{expert}" in name else [None]
            for expert in experts:
                index = tuple(n for n in (i, expert) if n is not None)
                own = shape[len(index) :]
                theirs = own if len(own) == 1 or path == "embedding" else (*own[:-2], own[-1], own[-2])
                yield Place(name.format(layer=layer, expert=expert), path, index, theirs, forth, back)


def _layout(path: str, model: Any, naming: Naming) -> tuple[Callable, Callable]:
    """Functions from our layout to theirs and back: their matrices are (out, in)."""
    last = path.rsplit("/", 1)[-1]
    if last == "scale":
        offset = np.float32(naming.norm_offset)  # in float32, as Gemma adds it: a sum near 1 would be rounded
        return (lambda x: x - offset, lambda x: x + offset) if offset else (np.asarray, np.asarray)
    if path == "embedding" or last.endswith("_bias"):
        return np.asarray, np.asarray
    turn = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731
    if not (naming.interleaved and last in ("q", "k")):
        return turn, turn
    half = model.attention.head // 2

    def pairs(w_OxI: np.ndarray, first: int, second: int) -> np.ndarray:
        split = w_OxI.reshape(-1, first, second, w_OxI.shape[-1])
        return split.swapaxes(1, 2).reshape(w_OxI.shape)

    return lambda x: pairs(turn(x), 2, half), lambda x: turn(pairs(x, half, 2))


def read(model: Any, shapes: Mapping[str, tuple[int, ...]], naming: Naming, source: Source, name: str) -> dict:
    """Our table path -> array of the source's tensors; `name` is what messages call it. A leaf has the dtype of its
    tensors, or float32 where they differ or something is added to them.

    Raises InteropError before weights are read where a tensor is missing, left over, of another shape or no floats;
    and for numbers that are not finite.
    """
    given = dict(source.shapes)
    twin = naming.top["output"]
    if model.tied and twin in given and given[twin] == given.get(naming.top["embedding"]):
        del given[twin]  # written although it is the embedding, as some tools do
    if not model.attention.rope_scaling:
        half, base = model.attention.head // 2, model.attention.rope_base
        wanted = base ** (-np.arange(half) / half)
        for tensor in [t for t, shape in given.items() if FREQUENCIES.fullmatch(t) and shape == (half,)]:
            if not np.allclose(source.read(tensor).astype(np.float32), wanted, rtol=0.01):  # some are of 16 bits
                what = f"{tensor} holds other frequencies than rope_theta, {base:g}, gives"
                raise InteropError(f"{name}: {what}; mend its configuration, or take another copy of the model")
            del given[tensor]  # what early Llama models were saved with, though it follows from the configuration
    found = list(_fitting(places(model, shapes, naming), given, name))
    if left := given.keys() - {place.name for place in found}:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        tensors = f"the tensor {plain(min(left))}{more}"
        raise InteropError(f"{name}: has no place for {tensors}: not what its configuration describes")
    for tensor, kind in source.kinds.items():
        if kind not in FLOATS:
            known = ", ".join(FLOATS)
            raise InteropError(f"{name}: {tensor} is {kind}; known: {known}; take the model in one of these")
    dtypes: dict[str, np.dtype] = {}
    for place in found:
        dtype = np.dtype(jnp.dtype(FLOATS[source.kinds[place.name]]))
        added = naming.norm_offset and place.path.endswith("/scale")
        if dtypes.setdefault(place.path, dtype) != dtype or added:
            dtypes[place.path] = np.dtype(np.float32)
    table = {path: np.empty(shapes[path], dtype) for path, dtype in dtypes.items()}
    for place in found:
        x = source.read(place.name)
        if not _finite(x):
            raise InteropError(
                f"{name}: {place.name} holds a number that is not finite; take another copy of the model"
            )
        table[place.path][place.index] = place.ours(x)
    if model.tied and twin in source.shapes and not np.array_equal(source.read(twin), table["embedding"]):
        raise InteropError(f"{name}: {twin} is not the embedding, but its configuration says tie_word_embeddings")
    return table


def _fitting(wanted: Iterator[Place], given: Mapping[str, tuple[int, ...]], name: str) -> Iterator[Place]:
    """Stops at the first that does not fit: a configuration may ask for more than could ever be listed."""
    for place in wanted:
        if place.name not in given:
            raise InteropError(f"{name}: lacks the tensor {place.name}: not what its configuration describes")
        if given[place.name] != place.shape:
            shape = brief(given[place.name])
            raise InteropError(f"{name}: {place.name} is {shape}, its configuration asks for {place.shape}")
        yield place


def _finite(x: np.ndarray) -> bool:
    """As float32, in which models are computed."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(x.astype(np.float32, copy=False)).all())

"""GGUF files (llama.cpp). The package `gguf` dequantises weights, to float32; its reader of files believes what they
claim, so headers are read here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.interop.tensors import InteropError, Naming, brief, plain
from moe_jax.layers.attention import frequencies

NAMES = {f"attention/{n}": f"blk.{{layer}}.attn_{n}.weight" for n in "qkv"}
NAMES |= {f"attention/{n}_bias": f"blk.{{layer}}.attn_{n}.bias" for n in "qkv"}
NAMES |= {f"ffn/{n}": f"blk.{{layer}}.ffn_{n}.weight" for n in ("gate", "up", "down")}
NAMES |= {f"ffn/experts/{n}": f"blk.{{layer}}.ffn_{n}_exps.weight" for n in ("gate", "up", "down")}
NAMES |= {
    "attention/o": "blk.{layer}.attn_output.weight",
    "norm_attention/scale": "blk.{layer}.attn_norm.weight",
    "norm_ffn/scale": "blk.{layer}.ffn_norm.weight",
    "ffn/router/gate": "blk.{layer}.ffn_gate_inp.weight",
}
TOP = {"embedding": "token_embd.weight", "norm/scale": "output_norm.weight", "output": "output.weight"}
NAMINGS = {"llama": Naming(TOP, NAMES, interleaved=True), "qwen2": Naming(TOP, NAMES)}

# What it calls the values of a config.json; the prefix is the architecture's.
KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "max_position_embeddings": "context_length",
}
CONTROL, USER_DEFINED = 3, 4  # types of tokens
VERSIONS = (2, 3)
# Types of values: numbers by NumPy's names, texts, arrays.
NUMBERS = dict(enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])) | {10: "<u8", 11: "<i8", 12: "<f8"}
TEXT, ARRAY = 8, 9
DEEPEST = 4  # arrays in arrays
DIMS = 4  # of a tensor
# Llama 3.1 and later: each rotary frequency is divided by one of these factors. All such models were made alike.
FACTORS = "rope_freqs.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# How texts are cut before their bytes are merged, by the name that the file gives it.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {"llama-bpe": rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "qwen2": rf"{_LETTERS}|\p{{N}}|{_REST}"}


class Tensor(NamedTuple):
    """As a header has it; `offset` counts from where the weights begin, `kind` is the number of a quantisation."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Header:
    """What stands before the weights of a file: its values by key, its tensors, and where the weights begin.

    Whatever a length claims is held against the bytes that are left before it is believed. Raises ValueError.
    """

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0
        if self._take("<u1", 4).tobytes() != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("<u4")) not in VERSIONS:
            raise ValueError(f"its version is {version}; known: {VERSIONS}, little-endian")
        tensors, values = self._number(), self._number()
        self.values: dict[str, Any] = {}
        for _ in range(values):
            key = self._text()
            if key in self.values:
                raise ValueError(f"{plain(key)} is in it twice")
            self.values[key] = self._value(self._number("<u4"))
        self.tensors = [self._tensor() for _ in range(tensors)]
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {brief(alignment)}")
        self.end = -(-self.at // alignment) * alignment

    def _take(self, dtype: str, count: int) -> np.ndarray:
        size, left = count * np.dtype(dtype).itemsize, len(self.data) - self.at
        if size > left:
            raise ValueError(f"at byte {self.at} it wants {size} more, of which it has {left}")
        self.at += size
        return self.data[self.at - size : self.at].view(dtype)

    def _number(self, dtype: str = "<u8") -> Any:
        return self._take(dtype, 1)[0].item()

    def _text(self) -> str:
        return self._take("<u1", self._number()).tobytes().decode()

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == TEXT:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"a value is of the unknown type {kind}")
        if depth == DEEPEST:
            raise ValueError(f"arrays lie more than {DEEPEST} deep in arrays")
        kind, count = self._number("<u4"), self._number()
        if kind in NUMBERS:
            return self._take(NUMBERS[kind], count).tolist()
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _tensor(self) -> Tensor:
        name, dims = self._text(), self._number("<u4")
        if dims > DIMS:
            raise ValueError(f"{plain(name)} has {dims} dimensions")
        shape = tuple(reversed(self._take("<u8", dims).tolist()))
        if not shape or 0 in shape:
            raise ValueError(f"{plain(name)} is {shape}")
        return Tensor(name, shape, self._number("<u4"), self._number())


class File:
    """A GGUF file: its values by key, its tensors by name."""

    def __init__(self, path: Path):
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise InteropError(f"{path}: reading GGUF needs a package: pip install 'moe_jax[pretrained]'") from None
        self.path = path
        try:
            data = np.asarray(np.memmap(path, mode="r"))
            header = Header(data)
            self._places = dict(self._placed(header.tensors, data[header.end :]))
        except OSError as error:
            raise InteropError(f"{path}: cannot read ({error.strerror or error})") from None
        except InteropError:
            raise
        except ValueError as error:
            raise InteropError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None
        self.values = header.values
        self.shapes = {tensor.name: tensor.shape for tensor in header.tensors}
        self.architecture = self.values.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in NAMINGS:
            known = ", ".join(NAMINGS)
            raise InteropError(f"{path}: architecture {brief(self.architecture)} is not known; known: {known}")

    @property
    def kinds(self) -> dict[str, str]:
        """What they are once they are dequantised."""
        return dict.fromkeys(self.shapes, "F32")

    def _placed(self, tensors: Iterable[Tensor], data: np.ndarray) -> Iterable[tuple[str, tuple[Tensor, np.ndarray]]]:
        """Each tensor with its bytes, of which no two share any."""
        from gguf import GGML_QUANT_SIZES

        sizes: Mapping[int, tuple[int, int]] = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        names, last = set(), 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            name = plain(tensor.name)
            if tensor.kind not in sizes:
                what = f"{name} has the unknown quantisation {tensor.kind}"
                raise InteropError(f"{self.path}: {what}; a newer gguf may know it: pip install --upgrade gguf")
            block, size = sizes[tensor.kind]
            if tensor.shape[-1] % block:
                raise ValueError(f"{name} is {tensor.shape}, which is not in whole blocks of {block}")
            size *= math.prod(tensor.shape) // block
            if tensor.name in names:
                raise ValueError(f"{name} is in it twice")
            if not last <= tensor.offset <= tensor.offset + size <= len(data):
                where = f"bytes {tensor.offset} to {tensor.offset + size} of {len(data)}"
                raise ValueError(f"{name} is {where}: beyond the end, or over the tensor before")
            names.add(tensor.name)
            last = tensor.offset + size
            yield tensor.name, (tensor, data[tensor.offset : last])

    def read(self, name: str) -> np.ndarray:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor, data = self._places[name]
        kind = GGMLQuantizationType(tensor.kind)
        try:
            with np.errstate(all="ignore"):  # damaged scales give what is not finite, which is looked for
                return dequantize(data.reshape(*tensor.shape[:-1], -1), kind).reshape(tensor.shape)
        except NotImplementedError:
            raise InteropError(f"{self.path}: {name} is quantised as {kind.name}, which cannot be read") from None

    def config(self) -> dict[str, Any]:
        """What a config.json would say."""
        own = {name: self.values.get(f"{self.architecture}.{key}") for name, key in KEYS.items()}
        embedding = self.shapes.get("token_embd.weight", ())
        own["vocab_size"] = embedding[0] if embedding else None
        turned = self.values.get(f"{self.architecture}.rope.dimension_count")
        if own["head_dim"] is None:
            own["head_dim"] = turned
        if turned not in (None, own["head_dim"]):
            raise InteropError(f"{self.path}: rope.dimension_count is {brief(turned)}: moe_jax turns whole heads")
        scaling = self.values.get(f"{self.architecture}.rope.scaling.type")
        if scaling not in (None, "none"):
            factor = self.values.get(f"{self.architecture}.rope.scaling.factor")
            own["rope_scaling"] = {"rope_type": scaling, "factor": factor}
        elif FACTORS in self.shapes:
            own["rope_scaling"] = self._llama3(own["rope_theta"], own["head_dim"])
        kind = "mixtral" if own["num_local_experts"] else self.architecture
        return {**own, "model_type": kind, "tie_word_embeddings": "output.weight" not in self.shapes}

    def _llama3(self, base: Any, head: Any) -> dict[str, Any]:
        """The scaling that the tensor of factors is the outcome of, which is then none of the model's weights."""
        factors = self.read(FACTORS).ravel()
        scaling = LLAMA3 | {"factor": float(factors.max())}
        if isinstance(base, float) and head == 2 * len(factors):
            scaled = (np.asarray(frequencies(len(factors), base, s)) for s in ((), scaling))
            with np.errstate(all="ignore"):
                if np.allclose(np.divide(*scaled), factors, rtol=1e-4):
                    del self.shapes[FACTORS]
                    return scaling
        raise InteropError(
            f"{self.path}: {FACTORS} scales rotary frequencies otherwise than Llama 3.1; import the Hugging Face folder"
        )

    def tokeniser(self) -> dict[str, Any]:
        """Its byte-pair encoding as a `tokenizer.json`. Raises InteropError for another kind of tokeniser."""
        kind, cut = (self.values.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        if kind != "gpt2":
            raise InteropError(f"{self.path}: its tokeniser is a {brief(kind)}; import the model's Hugging Face folder")
        lists = [self.values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type")]
        tokens, merges, types = (x if isinstance(x, list) else [] for x in lists)
        words = all(isinstance(text, str) for text in (*tokens, *merges))
        if not (tokens and words and len(tokens) == len(types) and len(set(tokens)) == len(tokens)):
            raise InteropError(f"{self.path}: its tokens, their types and merges do not fit together; fetch it again")
        return byte_pairs(tokens, merges, types, cut, str(self.path))

    def ends(self) -> tuple[list[int], int | None]:
        """Ids that end a text, and the one that every text begins with, if any."""
        eos = [self.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        begins = self.values.get("tokenizer.ggml.add_bos_token", self.values.get("tokenizer.ggml.pre") == "llama-bpe")
        return [e for i, e in enumerate(eos) if e is not None and e not in eos[:i]], (
            self.values.get("tokenizer.ggml.bos_token_id") if begins else None
        )


def byte_pairs(tokens: list[str], merges: list[str], types: list[int], cut: Any, where: str) -> dict[str, Any]:
    """A tokenizer.json (the `tokenizers` package's format) of a byte-level BPE."""
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words = {"type": "Split", "behavior": "Isolated", "invert": False}
    if cut == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        pre = [digits, {**byte_level, "use_regex": True}]
    elif cut == "gpt-2":
        pre = [{**byte_level, "use_regex": True}]
    elif isinstance(cut, str) and cut in WORDS:
        pre = [{**words, "pattern": {"Regex": WORDS[cut]}}, {**byte_level, "use_regex": False}]
    else:
        known = ", ".join(("smollm", "gpt-2", *WORDS))
        raise InteropError(
            f"{where}: texts are cut as {brief(cut)}; known: {known}; import the Hugging Face folder instead"
        )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind == CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    model: Mapping[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": cut == "llama-bpe",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) for merge in merges],
    }
    return json.loads(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
                "post_processor": None,
                "decoder": {**byte_level, "use_regex": True},
                "model": model,
            }
        )
    )

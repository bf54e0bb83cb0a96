"""GGUF files (llama.cpp), read by the `gguf` package; weights are dequantised to float32."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.interop.tensors import InteropError, Naming

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
NAMINGS = {"llama": Naming(TOP, NAMES, interleaved=True), "qwen2": Naming(TOP, NAMES), "gemma": Naming(TOP, NAMES)}

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
DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error)
# How texts are cut before their bytes are merged, by the name that the file gives it.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {"llama-bpe": rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "qwen2": rf"{_LETTERS}|\p{{N}}|{_REST}"}


class File:
    """A GGUF file: its values by key, its tensors by name."""

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise InteropError(f"{path}: reading GGUF needs a package: pip install 'moe_jax[pretrained]'") from None
        self.path = path
        try:
            reader = GGUFReader(path)
            self.values = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except OSError as error:
            raise InteropError(f"{path}: cannot read ({error.strerror or error})") from None
        except DAMAGED as error:
            raise InteropError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        self.architecture = self.values.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in NAMINGS:
            raise InteropError(f"{path}: architecture {self.architecture!r} is not known; known: {', '.join(NAMINGS)}")

    def read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise InteropError(f"{self.path}: {name} is quantised as {kind}, which cannot be read") from None
        except DAMAGED as error:
            raise InteropError(f"{self.path}: {name} is damaged ({error}); fetch the file again") from None

    def config(self) -> dict[str, Any]:
        """What a config.json would say."""
        own = {name: self.values.get(f"{self.architecture}.{key}") for name, key in KEYS.items()}
        embedding = self.shapes.get("token_embd.weight", ())
        own["vocab_size"] = embedding[0] if embedding else None
        scaling = self.values.get(f"{self.architecture}.rope.scaling.type")
        if scaling not in (None, "none"):
            factor = self.values.get(f"{self.architecture}.rope.scaling.factor")
            own["rope_scaling"] = {"rope_type": scaling, "factor": factor}
        kind = "mixtral" if own["num_local_experts"] else self.architecture
        act = "gelu_pytorch_tanh" if kind == "gemma" else "silu"
        return {**own, "model_type": kind, "hidden_act": act, "tie_word_embeddings": "output.weight" not in self.shapes}

    def tokeniser(self) -> dict[str, Any]:
        """Its byte-pair encoding as a `tokenizer.json`. Raises InteropError for another kind of tokeniser."""
        kind, cut = (self.values.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        if kind != "gpt2":
            raise InteropError(f"{self.path}: its tokeniser is a {kind!r}; import the model's Hugging Face folder")
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
        return [e for e in dict.fromkeys(eos) if e is not None], (
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
    elif cut in WORDS:
        pre = [{**words, "pattern": {"Regex": WORDS[cut]}}, {**byte_level, "use_regex": False}]
    else:
        known = ", ".join(("smollm", "gpt-2", *WORDS))
        raise InteropError(f"{where}: texts are cut as {cut!r}; known: {known}; import the Hugging Face folder instead")
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

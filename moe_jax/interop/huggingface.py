"""Hugging Face folders: config.json, safetensors and tokenizer.json. Nothing of a folder is run, nothing is unpickled,
and no file is read that an index names outside of it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax.checkpoint import dtypes, slice_of
from moe_jax.interop import tensors
from moe_jax.interop.tensors import InteropError, Naming, brief, plain

NAMINGS: dict[str, Naming] = {
    "llama": tensors.LLAMA,
    "mistral": tensors.LLAMA,
    "qwen2": tensors.LLAMA,
    "gemma": tensors.GEMMA,
    "mixtral": tensors.MIXTRAL,
    "qwen2_moe": tensors.QWEN2_MOE,
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SCALING = {  # what each type of scaled rotary frequencies is given by
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
IDLE = 1  # units of the shared expert that their qwen2_moe must have, where ours has none: its weights are zero
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALLEST, LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
SHORTEST = 16  # tokens of prompt and correction together
DEEPEST = 1 << 12  # layers


def read_json(path: Path) -> dict[str, Any]:
    """Raises InteropError for a file that is missing or no JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InteropError(f"{path}: cannot read ({error.strerror}); is this a model's folder?") from None
    except (ValueError, RecursionError):
        raise InteropError(f"{path}: not JSON; fetch it again") from None
    if not isinstance(value, dict):
        raise InteropError(f"{path}: not a JSON object; fetch it again")
    return value


# --- the configuration ------------------------------------------------------------------------------------------------


class Config:
    """The values of a config.json, checked as they are asked for."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def error(self, what: str) -> InteropError:
        return InteropError(f"{self.where}: {what}")

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        return self.positive(name, value)

    def positive(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not SMALLEST <= value <= LARGEST:
            raise self.error(f"{name} is {brief(value)}, it must be a number above 0 that float32 can hold")
        return value

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = 1 << 24) -> int:
        value = self.number(name, default)
        if value != int(value) or not least <= value <= most:
            raise self.error(f"{name} is {brief(value)}, it must be a whole number from {least} to {most}")
        return int(value)

    def refuse(self, name: str, why: str) -> None:
        """Of what we do not compute."""
        if value := self.values.get(name):
            raise self.error(f"{name} is {brief(value)}, which moe_jax does not compute ({why})")


def describe(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The model that a config.json describes, as `moe_jax.describe` has it.

    Raises InteropError for an architecture that is not known, or a part of one that is not computed here.
    """
    c = Config(values, where)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in NAMINGS:
        raise c.error(f"model_type is {brief(kind)}; known: {', '.join(NAMINGS)}")
    c.refuse("quantization_config", "take the folder of the unquantised model")
    c.refuse("mlp_bias", "a bias of feed-forward layers")
    c.refuse("use_bidirectional_attention", "attention to what comes later")
    if kind == "llama":
        c.refuse("attention_bias", "a bias of the output of attention")
    act = values.get("hidden_activation") or values.get("hidden_act", "silu")
    if kind == "gemma" and act == "gelu":  # what Gemma's first configurations say, and never meant
        act = "gelu_pytorch_tanh"
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise c.error(f"hidden_act is {brief(act)}; known: {', '.join(ACTIVATIONS)}")
    d, layers = c.size("hidden_size"), c.size("num_hidden_layers", most=DEEPEST)
    more = {} if act == "silu" else {"activation": ACTIVATIONS[act]}
    dense = {"class": "DenseFfn", "args": {"hidden": c.size("intermediate_size"), **more}}
    attention = {
        **_heads(c, d),
        "bias": kind in ("qwen2", "qwen2_moe") and values.get("qkv_bias", True) is not False,
        "window": _window(c, kind),
        **_rotary(c),
    }
    tied = values.get("tie_word_embeddings")
    args: dict[str, Any] = {
        "d": d,
        "layers": layers,
        "vocab": c.size("vocab_size"),
        "attention": {"class": "Attention", "args": attention},
        "ffn": dense,
        "conv_width": 0,
        "embedding_scale": d**0.5 if kind == "gemma" else 1.0,
        "norm_eps": _epsilon(c),
        "tied": kind == "gemma" if tied is None else bool(tied),
    }
    if kind == "mixtral":
        args["ffn"] = _moe(c, c.size("num_local_experts"), c.size("intermediate_size"), more)
    if kind == "qwen2_moe":
        args |= _qwen2_moe(c, dense, layers, more)
    return {"class": "Corrector", "args": args}


def bound(values: Mapping[str, Any], where: str) -> int | None:
    """Positions that the model was made for, where it says."""
    c, name = Config(values, where), "max_position_embeddings"
    return None if values.get(name) is None else c.size(name, least=SHORTEST)


def _heads(c: Config, d: int) -> dict[str, int]:
    heads = c.size("num_attention_heads")
    shared, head = c.size("num_key_value_heads", heads), c.size("head_dim", d // heads)
    if heads % shared:
        raise c.error(f"num_attention_heads is {heads}, it must be a multiple of num_key_value_heads, {shared}")
    if head % 2:
        raise c.error(f"head_dim is {head}, it must be even")
    return {"heads": heads, "kv_heads": shared, "head": head}


def _epsilon(c: Config) -> float:
    value = c.number("rms_norm_eps", 1e-6)
    if value >= 1:
        raise c.error(f"rms_norm_eps is {brief(value)}, it must be below 1")
    return value


def _window(c: Config, kind: str) -> int | None:
    uses = c.values.get("use_sliding_window", kind in ("mistral", "mixtral"))
    return c.size("sliding_window", least=SHORTEST) if uses and c.values.get("sliding_window") else None


def _rotary(c: Config) -> dict[str, Any]:
    """Older configurations have rope_theta and rope_scaling, newer ones rope_parameters with both."""
    found = c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise c.error("rope_parameters are no object")
    rope = {k: v for k, v in found.items() if v is not None}
    kind = rope.pop("type", None)
    kind = rope.setdefault("rope_type", kind or "default")
    given = (rope.pop("rope_theta", None), c.values.get("rope_theta"))
    base = next((base for base in given if base is not None), 10_000.0)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise c.error("partial_rotary_factor: moe_jax turns whole heads")
    if not isinstance(kind, str) or kind not in SCALING:
        raise c.error(f"rope_type is {brief(kind)}; known: {', '.join(SCALING)}")
    scaling = {name: float(c.positive(f"{kind} rope's {name}", rope.get(name))) for name in SCALING[kind]}
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise c.error("llama3 rope's high_freq_factor must be above its low_freq_factor")
    described = [["rope_type", kind], *map(list, scaling.items())] if scaling else []
    return {"rope_base": float(c.positive("rope_theta", base)), "rope_scaling": sorted(described)}


def _moe(c: Config, experts: int, hidden: int, more: Mapping[str, Any], **args: Any) -> dict[str, Any]:
    k = c.size("num_experts_per_tok")
    if k > experts:
        raise c.error(f"num_experts_per_tok is {k}, but there are {experts} experts")
    args = {
        "num_experts": experts,
        "hidden": hidden,
        "router": {"class": "Router", "args": {"k": k}},
        "experts": {"class": "Gated", "args": dict(more)},
        **args,
    }
    return {"class": "MoeFfn", "args": args}


def _qwen2_moe(c: Config, dense: Any, layers: int, more: Mapping[str, Any]) -> dict[str, Any]:
    every, only = c.size("decoder_sparse_step", 1), c.values.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(isinstance(n, int) and 0 <= n < layers for n in only):
        raise c.error(f"mlp_only_layers is {brief(only)}, it must be numbers of layers")
    only = set(only)
    shared = {"class": "DenseFfn", "args": {"hidden": c.size("shared_expert_intermediate_size"), **more}}
    sizes = c.size("num_experts"), c.size("moe_intermediate_size")
    ffn = _moe(c, *sizes, more, shared=shared, gated_shared=True)
    if not c.values.get("norm_topk_prob", False):
        ffn["args"]["router"]["args"]["weights"] = "full"
    numbers = [n for n in range(layers) if n in only or (n + 1) % every]
    if len(numbers) == layers:
        raise c.error("mlp_only_layers and decoder_sparse_step leave no layer with experts; call it a qwen2")
    return {"ffn": ffn, **({"dense": dense, "dense_layers": numbers} if numbers else {})}


def config(model: Any) -> dict[str, Any]:
    """The config.json of a `Corrector`. Raises InteropError where no architecture of theirs computes the same."""

    def no(what: str) -> InteropError:
        return InteropError(f"{what}: no architecture of Hugging Face's computes that, so it cannot be exported")

    attention, moe = model.attention, hasattr(model.ffn, "router")
    dense = model.ffn if not moe else model.dense
    activation = model.ffn.experts.activation if moe else dense.activation
    gemma = activation == "gelu_tanh"
    if model.conv_width:
        raise no(f"a convolution of {model.conv_width} taps")
    if model.embedding_scale != (model.d**0.5 if gemma else 1.0):
        raise no(f"embeddings times {model.embedding_scale:g}")
    out = {
        "hidden_size": model.d,
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocab,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation),
        "rope_theta": attention.rope_base,
        "rope_scaling": dict(attention.rope_scaling) or None,
        "sliding_window": attention.window,
        "max_position_embeddings": attention.window or 1 << 15,
    }
    if dense is not None:
        out["intermediate_size"] = dense.hidden
    if not moe:
        kind = "gemma" if gemma else "qwen2" if attention.bias else "mistral" if attention.window else "llama"
        if gemma and (attention.bias or attention.window or not model.tied):
            raise no("this mix of activation, biases, window and output")
        return _typed(kind, out | ({"use_sliding_window": False} if kind == "qwen2" else {}))
    router, shared = model.ffn.router, model.ffn.shared
    if gemma:
        raise no("experts with the activation gelu_tanh")
    if type(router).__name__ not in ("Router", "TaskMapped") or router.weights not in ("chosen", "full"):
        raise no(f"the router {type(router).__name__}")
    if shared is not None and not model.ffn.gated_shared:
        raise no("a shared expert without a gate")
    out |= {"num_experts_per_tok": router.k}
    if not (attention.bias or shared or model.dense_layers or router.weights == "full"):
        return _typed("mixtral", out | {"num_local_experts": router.num_experts, "intermediate_size": model.ffn.hidden})
    if attention.window:
        raise no("a window of attention together with biases, shared experts or dense layers")
    more = {
        "num_experts": router.num_experts,
        "moe_intermediate_size": model.ffn.hidden,
        "shared_expert_intermediate_size": shared.hidden if shared else IDLE,
        "norm_topk_prob": router.weights == "chosen",
        "mlp_only_layers": list(model.dense_layers),
        "decoder_sparse_step": 1,
        "qkv_bias": attention.bias,
        "use_sliding_window": False,
    }
    return _typed("qwen2_moe", {"intermediate_size": model.ffn.hidden} | out | more)


def _typed(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    name = {"qwen2_moe": "Qwen2Moe"}.get(kind, kind.capitalize())
    return {"model_type": kind, "architectures": [f"{name}ForCausalLM"], **values}


# --- the tensors ------------------------------------------------------------------------------------------------------


class Folder:
    """The safetensors of a folder, in one file or in the shards that an index names."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = self._index()
        self._files = {name: self._open(name) for name in (sorted(set(index.values())) if index else [WEIGHTS])}
        self._where: dict[str, str] = {}
        for name, file in self._files.items():
            for tensor in file.keys():  # noqa: SIM118
                if tensor in self._where:
                    both = f"{self._where[tensor]} and in {name}"
                    raise InteropError(f"{folder}: {plain(tensor)} is in {both}; remove one")
                self._where[tensor] = name
        if index and (odd := index.items() ^ self._where.items()):
            tensor = min(odd)[0]
            said, found = (where.get(tensor, "no file") for where in (index, self._where))
            what = f"says that {plain(tensor)} is in {said}, it is in {found}"
            raise InteropError(f"{folder}/{INDEX}: {what}; fetch the index and the files again")
        slices = {tensor: self._files[name].get_slice(tensor) for tensor, name in self._where.items()}
        self.shapes = {tensor: tuple(part.get_shape()) for tensor, part in slices.items()}
        self.kinds: dict[str, str] = {tensor: part.get_dtype() for tensor, part in slices.items()}

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        return {t: d for file in self._files.values() for t, d in dtypes(file).items()}

    def _index(self) -> dict[str, str] | None:
        """Tensor -> file; None where all are in one."""
        if (self.folder / WEIGHTS).is_file():
            return None
        if not (self.folder / INDEX).is_file():
            raise InteropError(f"{self.folder}: holds neither {WEIGHTS} nor {INDEX}; pickled weights are not read")
        index = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()) or not index:
            raise InteropError(f"{self.folder}/{INDEX}: has no weight_map of tensors to files; fetch it again")
        for name in set(index.values()):
            if not re.fullmatch(r"[^/\\\0-\x1f]{1,200}\.safetensors", name):
                what = f"names {brief(name)}, which is no safetensors file of its folder"
                raise InteropError(f"{self.folder}/{INDEX}: {what}; fetch it again")
        return index

    def _open(self, name: str) -> Any:
        path = self.folder / name
        try:
            return safe_open(path, framework="flax")
        except OSError as error:
            raise InteropError(f"{path}: cannot read ({error.strerror or error}); fetch it again") from None
        except SafetensorError as error:
            raise InteropError(f"{path}: not whole safetensors ({error}); fetch it again") from None

    def files(self) -> list[Path]:
        return [self.folder / name for name in self._files]

    def slice(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        """Part `index` (of the leading dims) of a tensor."""
        return slice_of(self._files[self._where[name]], name, index)

    def read(self, name: str) -> np.ndarray:
        return self.slice(name, ())

"""`moe-jax import` and `moe-jax export --to huggingface`: a pretrained model becomes a checkpoint of ours, and back."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from moe_jax import decode, describe, tree
from moe_jax.interop import gguf, huggingface, tensors
from moe_jax.interop.tensors import InteropError
from moe_jax.text.prompt import check_layout
from moe_jax.text.tokeniser import Tokeniser

LONGEST = decode.BUCKETS[-1]
SHARD = 5 << 30  # bytes of a safetensors file, as Hugging Face cuts them


def bring(source: Path | str, *, length: int = 1024, layout: str = "instruct") -> tuple[dict[str, np.ndarray], dict]:
    """(table, metadata) of a model of others: what `checkpoint.write_safetensors` takes.

    Args:
      source: a Hugging Face folder, or a GGUF file.
      length: tokens of prompt and correction together; the model's own bound where that is less.
      layout: how prompts are written (`moe_jax.text.templates`).

    Raises InteropError or ValueError, in one line, before anything is loaded by halves.
    """
    from moe_jax.text import pretrained  # its package is an extra

    source = Path(source)
    file = None if source.is_dir() else gguf.File(source)
    where = str(source if file else source / "config.json")
    values = file.config() if file else huggingface.read_json(source / "config.json")
    description, bound = huggingface.describe(values, where), huggingface.bound(values, where)
    tokeniser: Tokeniser
    given: tensors.Source
    if file:
        eos, bos = file.ends()
        about = {"tokenizer": file.tokeniser(), "eos": eos, "bos": bos, "vocab_size": description["args"]["vocab"]}
        tokeniser = pretrained.Pretrained(json.dumps(about, ensure_ascii=False).encode(), where)
        given, naming = file, gguf.NAMINGS[str(file.architecture)]
    else:
        tokeniser = pretrained.from_folder(source)
        given, naming = huggingface.Folder(source), huggingface.NAMINGS[values["model_type"]]
    check_layout(tokeniser, layout)
    if not huggingface.SHORTEST <= length <= LONGEST:
        raise InteropError(f"length={length} must be between {huggingface.SHORTEST} and {LONGEST} tokens")
    model = describe.abstract(description)
    if tokeniser.vocab_size != model.vocab:
        raise InteropError(f"{source}: vocab_size is {tokeniser.vocab_size}, the embedding has {model.vocab} rows")
    shapes = {path: tuple(x.shape) for path, x in tree.flatten(model).items()}
    table = tensors.read(model, shapes, naming, given, str(source))
    meta = {
        "model": describe.describe(model),
        "families": {},
        "layout": layout,
        "length": min(filter(None, (length, bound, model.attention.window))),
        **({"positions": bound} if bound else {}),
        **tokeniser.meta(),
    }
    return table, meta


def give(table: Mapping[str, Any], meta: Mapping[str, Any], output: Path | str) -> str:
    """Writes a folder that Hugging Face transformers loads; returns its model_type.

    Raises InteropError for a model that none of its architectures can hold, or if `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise InteropError(f"{output}: exists already; choose another folder, or remove this one")
    if "model" not in meta or "tokeniser_model" not in meta:
        raise InteropError("the checkpoint does not describe its model; export it from its run")
    model = describe.abstract(meta["model"])
    tokeniser = Tokeniser.of_meta(meta)
    config = huggingface.config(model)
    if isinstance(meta.get("positions"), int):
        config["max_position_embeddings"] = meta["positions"]
    config |= {"eos_token_id": list(tokeniser.eos), "bos_token_id": tokeniser.bos}
    if config.get("shared_expert_intermediate_size") and model.ffn.shared is None:
        described = json.loads(json.dumps(meta["model"]))
        shared = {"class": "DenseFfn", "args": {"hidden": huggingface.IDLE}}
        described["args"]["ffn"]["args"] |= {"shared": shared, "gated_shared": True}
        model = describe.abstract(described)
        dtype = next(iter(table.values())).dtype
        idle = {p: np.zeros(x.shape, dtype) for p, x in tree.flatten(model).items() if "/ffn/shared" in p}
        table = {**table, **idle}
    shapes = {path: tuple(x.shape) for path, x in tree.flatten(model).items()}
    for path, shape in shapes.items():
        if path not in table or tuple(table[path].shape) != shape:
            raise InteropError(f"{path} is not what the model's description asks for, {shape}: is this a whole model?")
    places = list(tensors.places(model, shapes, huggingface.NAMINGS[config["model_type"]]))
    dtypes = {str(np.dtype(x.dtype)) for x in table.values()}
    config["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    files: dict[str, Any] = {"config.json": config, "generation_config.json": {"eos_token_id": list(tokeniser.eos)}}
    if (whole := json.loads(tokeniser.model) if tokeniser.model.startswith(b"{") else None) is not None:
        spelled = {token["id"]: token["content"] for token in whole["tokenizer"].get("added_tokens") or ()}
        names = {"eos_token": spelled.get(tokeniser.eos[0]), "bos_token": spelled.get(tokeniser.bos)}
        files["tokenizer.json"] = whole["tokenizer"]
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": tokeniser.bos is not None,
            **{name: token for name, token in names.items() if token},
        }
    aside = output.with_name(f"{output.name}.{os.getpid()}.part")
    aside.mkdir(parents=True)
    try:
        _write_tensors(aside, table, places)
        for name, value in files.items():
            (aside / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return config["model_type"]


def _write_tensors(folder: Path, table: Mapping[str, Any], places: Sequence[tensors.Place]) -> None:
    """In one file, or in shards and an index."""
    shards: list[list[tensors.Place]] = [[]]
    held = total = 0
    for place in places:
        size = math.prod(place.shape) * np.dtype(table[place.path].dtype).itemsize
        if shards[-1] and held + size > SHARD:
            shards.append([])
            held = 0
        shards[-1].append(place)
        held, total = held + size, total + size
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else huggingface.WEIGHTS
        arrays = {p.name: np.ascontiguousarray(p.theirs(np.asarray(table[p.path][p.index]))) for p in shard}
        (folder / name).write_bytes(save(arrays, metadata={"format": "pt"}))
        where |= dict.fromkeys(arrays, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / huggingface.INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

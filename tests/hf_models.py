"""Small models of each pretrained family, written to disk, and what Hugging Face transformers computes of them.

tests/golden/pretrained.json holds what it said, so that parity is tested without it; where it is installed
(`pip install -e '.[bench]'`), `python tests/hf_models.py` asks it again and writes the file anew.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "pretrained.json"
PROMPT = [3, 17, 9, 31, 5, 11, 2]
STEPS = 8
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
}
LONG = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "num_experts": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama of long contexts": {"model_type": "llama", "head_dim": 6, "rope_parameters": LONG},
    "mistral": {"model_type": "mistral", "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"model_type": "qwen2_moe", **MOE},
    "qwen2_moe with a dense layer": {"model_type": "qwen2_moe", **MOE, "mlp_only_layers": [1], "norm_topk_prob": True},
}


def weights(shapes: dict[str, list[int]], offset: float) -> dict[str, np.ndarray]:
    """Numbers that depend on the names alone; by raw Philox output, which numpy keeps the same over its versions."""
    out = {}
    for name, shape in shapes.items():
        raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(math.prod(shape))
        x = (raw / 2.0**63 - 1).reshape(shape).astype(np.float32)
        out[name] = 0.2 * x + offset if "norm" in name else x / math.sqrt(shape[-1]) * (3 if "embed" in name else 1.7)
    return out


def write(folder: Path, name: str) -> dict[str, Any]:
    """The model's folder; returns what transformers says of it."""
    found = json.loads(GOLDEN.read_text("utf-8"))[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(found["config"]))
    save_file(weights(found["shapes"], float(name != "gemma")), folder / "model.safetensors")
    write_tokeniser(folder)
    return found


def write_tokeniser(folder: Path) -> None:
    """A word a letter, for models of 40 tokens."""
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz .,'-0123456"])}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    tokeniser = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(["<pad>", "</s>"])],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<pad>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokeniser))


def computed(folder: Path) -> tuple[np.ndarray, list[int]]:
    """(logits_LxV of `PROMPT`, `STEPS` greedy tokens after it) by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(prompt).logits[0].numpy()
        said = model.generate(prompt, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    return logits, said[0, len(PROMPT) :].tolist()


def record() -> None:
    import tempfile

    import transformers

    out: dict[str, Any] = {}
    for name, values in MODELS.items():
        config = transformers.AutoConfig.for_model(**SIZES | values)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            from safetensors import safe_open

            with safe_open(Path(folder) / "model.safetensors", "np") as file:
                shapes = {t: file.get_slice(t).get_shape() for t in sorted(file.keys())}
            saved = json.loads((Path(folder) / "config.json").read_text())
            save_file(weights(shapes, float(name != "gemma")), Path(folder) / "model.safetensors", {"format": "pt"})
            logits, greedy = computed(Path(folder))
        rounded = [[round(float(x), 6) for x in row] for row in logits]
        out[name] = {"config": saved, "shapes": shapes, "logits": rounded, "greedy": greedy}
    GOLDEN.write_text(json.dumps(out) + "\n")
    print(f"{GOLDEN}: {len(out)} models by transformers {transformers.__version__}")


if __name__ == "__main__":
    record()

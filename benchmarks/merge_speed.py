"""Seconds and peak memory of a merge, beside mergekit where it is installed and has the method.

    python -m benchmarks.merge_speed

Four models and their base, 1 GB of float32 in all (Llama's shape: d 512, 8 layers, 32,000 tokens; random numbers), each
merge a process of its own, in turns where there are two to compare. Time is the whole process, from its start to its
end. Memory is the peak of what a process allocates (RssAnon: pages of mapped files are not counted, they can go at any
time) above that of a process which only imports what it needs; its goal is 3 times the largest tensor times the models.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from benchmarks import measure

D, LAYERS, HIDDEN, VOCAB, MODELS = 512, 8, 2048, 32_000, 4
ROUNDS = 3
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": D,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
# method -> theirs with the options that are ours, or None where mergekit does not have it
# (fisher and regmean need statistics, which are of checkpoints of ours alone).
METHODS: dict[str, dict[str, Any] | None] = {
    "average": {"merge_method": "linear"},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.25, "normalize": False}},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2, "normalize": True}},
    "dare": {"merge_method": "dare_linear", "parameters": {"density": 0.1, "lambda": 0.25, "normalize": False}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.1, "normalize": True}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.5}},
    "della": {"merge_method": "della", "parameters": {"density": 0.3, "epsilon": 0.1, "normalize": True}},
    "breadcrumbs": {"merge_method": "breadcrumbs", "parameters": {"density": 0.14, "gamma": 0.01, "lambda": 0.25}},
    "consensus": None,
    "stitch": None,
    "magnitude": None,
    "singular_values": None,
    "lors": None,
    "tsv": None,
    "isotropic": None,
}


def shapes() -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        out |= {f"{at}.self_attn.{n}_proj.weight": (D, D) for n in "qkvo"}
        out |= {f"{at}.mlp.{n}_proj.weight": (HIDDEN, D) for n in ("gate", "up")}
        out |= {f"{at}.mlp.down_proj.weight": (D, HIDDEN)}
        out |= {f"{at}.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    return out


def write(folder: Path) -> list[Path]:
    """The base and the models."""
    base, out = (
        {n: np.random.default_rng(0).normal(size=s, scale=0.02).astype(np.float32) for n, s in shapes().items()},
        [],
    )
    for i in range(MODELS + 1):
        rng = np.random.default_rng(i)
        table = {
            n: x + (rng.standard_normal(x.shape, np.float32) * np.float32(0.002) if i else 0) for n, x in base.items()
        }
        path = folder / (f"model{i}" if i else "base")
        path.mkdir()
        save_file(table, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(CONFIG))
        out.append(path)
    return out


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, peak bytes of anonymous memory) of a process."""
    own = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}  # that of this benchmark, no one else's
    began, peak = time.perf_counter(), 0
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=said) as child,
    ):
        while child.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                status = Path(f"/proc/{child.pid}/status").read_text()
                peak = max(peak, 1024 * int(status.partition("RssAnon:")[2].split()[0]))
            time.sleep(0.02)
        if child.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}\n{said.read()}")
    return time.perf_counter() - began, peak


def cases(name: str) -> Iterator[dict[str, Any]]:
    theirs = METHODS[name]
    kit = shutil.which("mergekit-yaml", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, *models = write(folder)
        models = models[:2] if name == "slerp" else models
        recipe = {"base": str(base), "models": list(map(str, models)), "method": name}
        (folder / "ours.yaml").write_text(yaml.safe_dump(recipe))
        ours = [sys.executable, "-m", "moe_jax.cli", "merge", "--recipe", str(folder / "ours.yaml"), "--output"]
        rivals = {"ours": ours}
        if theirs and kit:
            listed = [{"model": str(m), "parameters": {"weight": 1.0}} for m in models]
            given = {**theirs, "models": listed, "dtype": "float32"}
            if theirs["merge_method"] != "linear":
                given["base_model"] = str(models[0] if name == "slerp" else base)
            (folder / "theirs.yaml").write_text(yaml.safe_dump(given))
            rivals["theirs"] = [kit, str(folder / "theirs.yaml")]
        found: dict[str, list[tuple[float, int]]] = {who: [] for who in rivals}
        rounds = ROUNDS if len(rivals) > 1 else 1
        for turn, (who, command) in itertools.product(range(rounds), rivals.items()):
            out = folder / f"{who}{turn}"
            found[who].append(timed([*command, str(out)]))
            shutil.rmtree(out)
        idle = timed([sys.executable, "-c", "import jax.numpy as jnp; import moe_jax.merging.merge; jnp.ones(3) + 1"])[
            1
        ]
    seconds = {who: median(s for s, _ in runs) for who, runs in found.items()}
    memory = {who: max(m for _, m in runs) for who, runs in found.items()}
    rival = seconds.get("theirs")
    ratio = seconds["ours"] / rival if rival else None
    yield {"case": "seconds", "ours": seconds["ours"], "rival": rival, "ratio": ratio, "target": None, "unit": "s"}
    goal = 3 * 4 * VOCAB * D * len(models)
    yield {
        "case": "memory / goal",
        "ours": (memory["ours"] - idle) / 1e6,
        "rival": goal / 1e6,
        "ratio": (memory["ours"] - idle) / goal,
        "target": 1.0,
        "unit": "MB",
        "whole process": memory["ours"] / 1e6,
        "mergekit's": memory["theirs"] / 1e6 if rival else None,
    }


if __name__ == "__main__":
    measure.main(__doc__, {name: lambda name=name: cases(name) for name in METHODS})

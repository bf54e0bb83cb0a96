"""A pretrained model, ours against transformers on PyTorch: importing it, a training step, and writing.

    python -m benchmarks.pretrained bases/SmolLM2-135M-Instruct.Q4_1.gguf --json pretrained.json    # needs '.[bench]'

The file, a GGUF of a dense model, is imported and then exported for transformers, so that both have the same float32
weights. Logits must agree to 1e-3 and greedy texts token by token. Each runs in a process of its own, and they take
turns. Training is AdamW of all parameters on rows without padding; neither writes an end. "import" is a process from
its start to its end: their rival reads the same file and saves what it has read; memory is the peak of what a process
allocates. "MB" of writing are the weights, which each new token reads once.
"""

from __future__ import annotations

import functools
import gzip
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import decode, peer, train_step
from benchmarks.measure import apart, interleaved, main, row
from benchmarks.merge_speed import timed
from moe_jax import checkpoint, describe, tree
from moe_jax.interop import bring
from moe_jax.text.tokeniser import Tokeniser

ROWS, LENGTH = 4, 128
PROMPT, NEW = 60, 32
ROUNDS = 3
TEXT = Path(__file__).resolve().parents[1] / "tasks" / "data" / "clean.en.txt.gz"
THEIRS = """
import sys, torch, transformers
from safetensors.torch import save_model  # save_pretrained refuses what was a GGUF
_, folder, name, output = sys.argv
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(output)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
save_model(model, f"{output}/model.safetensors")
"""


@functools.cache
def brought(source: str) -> tempfile.TemporaryDirectory[str]:
    """A folder, gone with this process, of `base.safetensors`, ours, and `huggingface`, theirs, which agree."""
    folder = tempfile.TemporaryDirectory()
    table, meta = bring.bring(source)
    table = {name: np.asarray(x, np.float32) for name, x in table.items()}
    checkpoint.write_safetensors(Path(folder.name) / "base.safetensors", table, meta)
    bring.give(table, meta, Path(folder.name) / "huggingface")
    mine, _ = model(folder.name)
    peer.agree(peer.Shape(vocab=mine.vocab), mine, network(folder.name))
    return folder


def model(folder: str) -> tuple[Any, Tokeniser]:
    table, meta = checkpoint.read_safetensors(Path(folder) / "base.safetensors")
    return tree.unflatten(describe.abstract(meta["model"]), table), Tokeniser.of_meta(meta)


def network(folder: str) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/huggingface", dtype=torch.float32)


def text(tokeniser: Tokeniser, rows: int, length: int) -> np.ndarray:
    """tokens_BxL of running text."""
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        ids = tokeniser.encode(" ".join(file.read(16 * rows * length).split("\n")))
    return np.array(ids[: rows * length], np.int32).reshape(rows, length)


def _ours_steps(folder: str, tokens: np.ndarray) -> train_step.Steps:
    return train_step.ours(model(folder)[0], tokens)


def _their_steps(folder: str, tokens: np.ndarray) -> train_step.Steps:
    return train_step.theirs(network(folder), tokens)


def step(source: str) -> Iterator[dict[str, Any]]:
    folder = brought(source).name
    mine, tokeniser = model(folder)
    tokens, size = text(tokeniser, ROWS, LENGTH), tree.count(tree.flatten(mine))
    with apart(_ours_steps, folder, tokens) as ours, apart(_their_steps, folder, tokens) as theirs:
        (first, _), (second, _) = ours(1), theirs(1)
        if not np.isclose(first, second, rtol=1e-4):
            raise ValueError(f"the losses of the first step differ: {first} and {second}")
        times = interleaved({"ours": partial(ours, 1), "theirs": partial(theirs, 1)}, rounds=5)
    # The embedding is the output too, so every parameter is multiplied once a token.
    more = {f"{who}tokens/s": tokens.size / times[name] for who, name in (("", "ours"), ("theirs ", "theirs"))}
    more["GFLOP/s"] = 6 * size * tokens.size / times["ours"] / 1e9
    yield row(f"{ROWS}x{LENGTH}", 1e3 * times["ours"], 1e3 * times["theirs"], 1.0, unit="ms", **more)


def _ours_writes(folder: str, prompts: np.ndarray, beams: int) -> decode.Writes:
    mine, tokeniser = model(folder)
    return decode.ours(mine, prompts, beams, NEW, tokeniser.eos)


def _their_writes(folder: str, prompts: np.ndarray, beams: int) -> decode.Writes:
    return decode.theirs(network(folder), prompts, beams, NEW)


def write(beams: int, batch: int, source: str) -> Iterator[dict[str, Any]]:
    folder = brought(source).name
    mine, tokeniser = model(folder)
    prompts, size = text(tokeniser, batch, PROMPT), tree.count(tree.flatten(mine))
    with apart(_ours_writes, folder, prompts, beams) as ours, apart(_their_writes, folder, prompts, beams) as theirs:
        first, second = ours(), theirs()
        if (beams == 1 and first != second) or {len(t) for t in first} != {NEW}:
            raise ValueError("the two wrote different texts")
        times = interleaved({"ours": ours, "theirs": theirs}, rounds=3)
    more: dict[str, Any] = {"tokens/s": batch * NEW / times["ours"], "theirs tokens/s": batch * NEW / times["theirs"]}
    more |= {"GFLOP/s": 2 * size * batch * (PROMPT + beams * NEW) / times["ours"] / 1e9, "MB": 4 * size / 1e6}
    yield row(f"{NEW} tokens", 1e3 * times["ours"], 1e3 * times["theirs"], 1.0, unit="ms", **more)


def imported(source: str) -> Iterator[dict[str, Any]]:
    path = Path(source).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        commands = {
            "ours": [sys.executable, "-m", "moe_jax.cli", "import", "--model", str(path), "--output", str(out)],
            "theirs": [sys.executable, "-c", THEIRS, str(path.parent), path.name, str(out)],
        }
        found: dict[str, list[tuple[float, int]]] = {who: [] for who in commands}
        for _ in range(ROUNDS):
            for who, command in commands.items():
                found[who].append(timed(command))
                out.unlink() if out.is_file() else shutil.rmtree(out)
    seconds = {who: median(s for s, _ in runs) for who, runs in found.items()}
    peak = {who: max(m for _, m in runs) / 1e6 for who, runs in found.items()}
    yield row("seconds", seconds["ours"], seconds["theirs"], 1.0, unit="s")
    yield row("peak memory", peak["ours"], peak["theirs"], 1.0, unit="MB")


CASES = (
    {"step": step}
    | {f"greedy batch {batch}": partial(write, 1, batch) for batch in (1, 4)}
    | {f"beam 4 batch {batch}": partial(write, 4, batch) for batch in (1, 4)}
    | {"import": imported}
)

if __name__ == "__main__":
    main(str(__doc__), CASES, given="a GGUF file of a dense model")

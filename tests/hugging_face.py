"""A folder as Hugging Face's models have it, with a tiny tokeniser of bytes and three control tokens."""

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 288  # of the embedding; the tokeniser has fewer tokens, of which "!" is 0


@functools.cache
def tokenizer_json(more: int = 0) -> str:
    """`more`: tokens that no text needs, for large ids."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    built.add_special_tokens([END, START, STOP])
    built.add_tokens(["<tool>", *(f"<{i}>" for i in range(more))])
    built.enable_truncation(4)
    return built.to_str()


def write(folder: Path, more: int = 0, **changes: Any) -> Path:
    """Writes the files; `changes` are to the configs' values, by name. For `more` see `tokenizer_json`."""
    folder.mkdir(exist_ok=True)
    files: dict[str, dict[str, Any]] = {
        "tokenizer": json.loads(tokenizer_json(more)),
        "config": {"vocab_size": VOCAB_SIZE, "bos_token_id": 1},
        "generation_config": {"eos_token_id": [END]},
        "tokenizer_config": {"eos_token": {"content": STOP}, "bos_token": START},
    }
    for name, change in changes.items():
        files[name] |= change
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return folder

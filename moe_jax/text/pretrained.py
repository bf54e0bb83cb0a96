"""Tokenisers of pretrained models: a Hugging Face `tokenizer.json`, read by the package `tokenizers`.

What travels is one JSON object:

    {"tokenizer": {...}, "eos": [2, 0], "bos": null, "vocab_size": 49152}

`tokenizer` is the model's tokenizer.json as it stands. `vocab_size` is the rows of the embedding, which may be more
than the tokeniser has tokens (they are padded), never fewer.

Text of a user never becomes a control token: "<|im_end|>" that somebody typed is spelled in ordinary pieces. By
default `tokenizers` would find it, and every other added token, in any text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_jax.text.tokeniser import Tokeniser

try:
    import tokenizers
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "tokenizers is not installed: tokenisers of pretrained models need it; pip install 'moe_jax[pretrained]'",
        name="tokenizers",
    ) from None


class Pretrained(Tokeniser):
    """A tokeniser from the bytes that `from_folder` made (see `Tokeniser.load`).

    What its own pieces can spell round-trips exactly; what its normaliser changes (Qwen's composes accents, NFC)
    stays changed.
    """

    def __init__(self, model: bytes, name: str = "the tokeniser model"):
        """Raises ValueError, in one line, for what `from_folder` would not have made."""
        super().__init__(model)
        about = _object(model, name)
        if {"tokenizer", "eos", "bos", "vocab_size"} - about.keys():
            raise ValueError(f"{name}: not a tokeniser of moe_jax; give the folder of the Hugging Face model instead")
        self._tokenizer = _tokenizer(about["tokenizer"], name)
        tokens = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        eos, bos, self._vocab_size = about["eos"], about["bos"], about["vocab_size"]
        if type(self._vocab_size) is not int or max(tokens, default=0) >= self._vocab_size:
            raise ValueError(
                f"{name}: token ids up to {max(tokens, default=0)}, but an embedding of {self._vocab_size} rows: "
                "this tokeniser belongs to another model"
            )
        rows, few = self._vocab_size, len(tokens)
        if rows - few > max(rows // 20, min(few, 1024)):  # rows are padded: of Qwen2's by 290, of DeepSeek's by 2.4 %
            raise ValueError(
                f"{name}: {few} tokens for an embedding of {rows} rows: this tokeniser belongs to another model"
            )
        ends: list[Any] = eos if isinstance(eos, list) else [None]
        for i in ends if bos is None else [*ends, bos]:
            if type(i) is not int or not 0 <= i < self._vocab_size or self._tokenizer.id_to_token(i) is None:
                raise ValueError(f"{name}: {i!r} is no token of it that a text could begin or end with")
        if not ends:
            raise ValueError(f"{name}: no end-of-text token")
        self.eos, self.bos = tuple(ends), bos
        added = about["tokenizer"].get("added_tokens") or []
        self._controls = {token["content"]: token["id"] for token in added if token.get("special")}
        self._silent = {*self._controls.values(), *self.eos, bos}
        for content, i in self._controls.items():  # not by being found in a text, but by the model's own pieces
            if i in self.encode(f"{content} {content}{content}") and content != self._unknown:
                raise ValueError(f"{name}: the text {content!r} would become the control token {i}; it cannot be used")

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def _unknown(self) -> str | None:
        return getattr(self._tokenizer.model, "unk_token", None)

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"not valid Unicode text: {text[:60]!a}") from None

    def decode(self, ids: Iterable[int]) -> str:
        spoken = [i for i in self._ids(ids) if i not in self._silent]
        return self._tokenizer.decode(spoken, skip_special_tokens=False)

    def control(self, name: str) -> int | None:
        return self._controls.get(name)


def from_folder(folder: str | os.PathLike) -> Pretrained:
    """The tokeniser of a Hugging Face model's folder; of its files, none but those named here is opened.

    tokenizer.json          the tokeniser itself
    config.json             the rows of the embedding
    tokenizer_config.json   the end-of-text that targets end with; whether prompts begin with a token
    generation_config.json  more ends of text (as in config.json)

    Raises ValueError, in one line, for what is missing or damaged.
    """
    folder = Path(folder)
    tokenizer = _read(folder / "tokenizer.json")
    config = _read(folder / "config.json")
    generation = _read(folder / "generation_config.json", optional=True)
    settings = _read(folder / "tokenizer_config.json", optional=True)
    built = _tokenizer(tokenizer, str(folder / "tokenizer.json"))

    def ids(given: Any) -> list[Any]:
        """Of an id, a token, a token's description, or a list of these."""
        if isinstance(given, list):
            return [i for one in given for i in ids(one)]
        content = given.get("content") if isinstance(given, Mapping) else given
        try:
            i = built.token_to_id(content) if isinstance(content, str) else content
        except UnicodeEncodeError:
            raise ValueError(f"{folder}: an end-of-text or begin-of-text is {content!r}, which is no text") from None
        return [] if i is None else [i]

    ends = [settings.get("eos_token"), generation.get("eos_token_id"), config.get("eos_token_id")]
    about = {
        "tokenizer": tokenizer,
        "eos": list(dict.fromkeys(ids(ends))),
        "bos": next(iter(_front(built, settings.get("add_bos_token"), ids(settings.get("bos_token")))), None),
        "vocab_size": config.get("vocab_size"),
    }
    return Pretrained(json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode(), str(folder))


def _front(built: tokenizers.Tokenizer, wanted: bool | None, bos: list[Any]) -> list[Any]:
    """What stands in front of a text: as the settings say, else what the tokeniser itself puts there."""
    if wanted is not None:
        return bos if wanted else []
    plain, whole = (built.encode("a", add_special_tokens=added).ids for added in (False, True))
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


def _tokenizer(value: Any, name: str) -> tokenizers.Tokenizer:
    """Built such that it finds no added token in a text, and neither cuts nor pads."""
    try:
        added = [{**token, "special": True} for token in value.get("added_tokens") or []]
        built = tokenizers.Tokenizer.from_str(json.dumps({**value, "added_tokens": added}))
    except BaseException as error:  # `tokenizers` raises plain exceptions, and panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: not a tokeniser that the package tokenizers reads ({reason})") from None
    built.encode_special_tokens = True
    built.no_truncation()
    built.no_padding()
    return built


def _read(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        return _object(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror}); is this a Hugging Face model's folder?") from None


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{name}: not JSON, or damaged") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: not a JSON object")
    return value

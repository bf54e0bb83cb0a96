"""Text <-> token ids: what every tokeniser can do, and our own one (`pretrained.py` has those of pretrained models).

Ours is a SentencePiece unigram model with byte fallback. Every text round-trips exactly (double spaces, line
breaks, any script): the model normalises nothing, and what it has no piece for is spelled in UTF-8 bytes, so
`<unk>` never occurs. Each *word* carries its leading space, the first one too, so that a word has the same
pieces wherever it stands, in a prompt or in a target.

Ids: 0 padding, 1 end of text, 2 unknown (never produced), 3-8 the control tokens of `prompt.py`, then symbols of a
tokeniser's own (such as "<2de>"), if any, 256 bytes, then pieces: without symbols the bytes are 9-264. No text can
spell a control token or symbol: "<hyp>" typed by a user is five characters of text.
"""

from __future__ import annotations

import abc
import base64
import hashlib
import io
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece
from safetensors import SafetensorError, safe_open

PAD, EOS, UNK = 0, 1, 2
CONTROLS = ("<hyp>", "<alt>", "<or>", "</alt>", "<src>", "<fix>")
HYP, ALT, OR, END_ALT, SRC, FIX = range(3, 9)
FIRST_BYTE = 9  # of a tokeniser without symbols
_SPACE_MARK = "\u2581"  # SentencePiece's own spelling of a space; a literal one must go through bytes


class Tokeniser(abc.ABC):
    """What prompts, prepared data and decoding need of a tokeniser, whichever it is.

    Attributes:
      model: the whole tokeniser as bytes, which travel with prepared data and checkpoints; `load` reads them.
      sha256: of `model`.
      eos: ids of end-of-text: targets end with the first, a written text with any.
      bos: the id that stands in front of every prompt, or None.
    """

    eos: tuple[int, ...] = (EOS,)
    bos: int | None = None

    def __init__(self, model: bytes):
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()

    @staticmethod
    def load(source: str | os.PathLike | bytes) -> Tokeniser:
        """From a tokeniser's file or its bytes, a checkpoint that holds one, or the folder of a Hugging Face model.

        Raises ValueError in one line; nothing is executed on load.
        """
        name = "the tokeniser model" if isinstance(source, bytes) else str(source)
        try:
            if not isinstance(source, bytes) and Path(source).is_dir():
                from moe_jax.text import pretrained

                return pretrained.from_folder(source)
            if isinstance(source, bytes):
                model = source
            else:
                model = _of_checkpoint(Path(source)) or Path(source).read_bytes()
        except OSError as error:
            raise ValueError(f"{source}: cannot read the tokeniser ({error.strerror})") from None
        if model.startswith(b"{"):  # SentencePiece's protocol buffers never do
            from moe_jax.text import pretrained

            return pretrained.Pretrained(model, name)
        from moe_jax.text import symbols

        if model.startswith(symbols.MAGIC):
            return symbols.Symbols(model, name)
        return Unigram(model, name)

    @staticmethod
    def of_meta(meta: Mapping[str, str]) -> Tokeniser:
        """The inverse of `meta`. Raises KeyError, TypeError or ValueError."""
        return Tokeniser.load(_model(meta))

    def meta(self) -> dict[str, str]:
        """How it travels in the metadata of a checkpoint."""
        return {"tokeniser": self.sha256, "tokeniser_model": base64.b64encode(self.model).decode()}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model aside, then renames it, so that a torn file never carries the name."""
        aside = Path(f"{path}.{os.getpid()}.tmp")
        aside.write_bytes(self.model)
        aside.replace(path)

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Rows of the embedding: every id is below."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of plain text: whatever a user typed, none of them is a control token."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids (say, of a model): control tokens are skipped, broken UTF-8 becomes U+FFFD."""

    def control(self, name: str) -> int | None:
        """The id of the control token that is spelled so, or None."""
        return None

    def _ids(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids {min(ids)}..{max(ids)} outside of [0, {self.vocab_size})")
        return ids


def _model(meta: Mapping[str, str]) -> bytes:
    return base64.b64decode(meta["tokeniser_model"])


def _of_checkpoint(path: Path) -> bytes | None:
    """The tokeniser in the metadata of a safetensors file of ours; None where `path` is no such file."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="np") as file:
            return _model(json.loads((file.metadata() or {})["moe_jax"]))
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: holds no tokeniser; name a checkpoint of moe_jax, or a tokeniser") from None


class Unigram(Tokeniser):
    """Our own tokeniser, from the bytes of a SentencePiece model (see `train`).

    Attributes:
      symbols: the tokens that it was given besides `CONTROLS`.
    """

    def __init__(self, model: bytes, name: str = "the tokeniser model"):
        """Raises ValueError, in one line, if `model` is damaged or lacks the fixed special ids."""
        super().__init__(model)
        try:
            if not model:  # SentencePiece would wait for a model instead of refusing
                raise RuntimeError("empty")
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._first_byte = max(self._sp.piece_to_id("<0x00>"), FIRST_BYTE)
            pieces = [self._sp.id_to_piece(i) for i in range(self._first_byte + 1)]
            spelt = [i for i in range(FIRST_BYTE, self._first_byte) if not self._sp.is_control(i)]
        except (RuntimeError, IndexError, TypeError):
            raise ValueError(f"{name}: not a SentencePiece model, or a damaged one") from None
        self.symbols = tuple(pieces[FIRST_BYTE : self._first_byte])
        if pieces != ["<pad>", "</s>", "<unk>", *CONTROLS, *self.symbols, "<0x00>"] or spelt:
            raise ValueError(f"{name}: unexpected special ids {pieces[:20]}; train it with moe_jax.text")
        self._space_mark = [self._first_byte + byte for byte in _SPACE_MARK.encode()]

    @property
    def vocab_size(self) -> int:
        return self._sp.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """`decode(encode(text)) == text` for every text without lone surrogates."""
        return self.encode_words(text.split(" ")) if text else []

    def encode_words(self, words: Sequence[str]) -> list[int]:
        """The ids of words (no spaces inside; an empty word is a second space), each with its leading space.

        Concatenates: `encode_words(a + b) == encode_words(a) + encode_words(b)`.
        """
        spaced = "".join(" " + word for word in words)
        try:  # one call a part: a call for a list of them starts threads, 40 times slower
            first, *rest = (self._sp.encode(part.encode()) for part in spaced.split(_SPACE_MARK))
        except UnicodeEncodeError:
            raise ValueError(f"not valid Unicode text: {spaced[:60]!a}") from None
        return first + [i for ids in rest for i in (*self._space_mark, *ids)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode(ids).removeprefix(" ")

    def control(self, name: str) -> int | None:
        return FIRST_BYTE + self.symbols.index(name) if name in self.symbols else None

    def decode_words(self, ids: Iterable[int]) -> list[str]:
        """The inverse of `encode_words`."""
        text = self._decode(ids)
        return text.removeprefix(" ").split(" ") if text else []

    def _decode(self, ids: Iterable[int]) -> str:
        return self._sp.decode([i for i in self._ids(ids) if i >= self._first_byte])


def train(sentences: Iterable[str], vocab_size: int, seed: int = 0, symbols: Sequence[str] = ()) -> Unigram:
    """Trains on `sentences`: deterministic, one thread. Raises ValueError if there is too little text.

    Args:
      sentences: texts; see `fair_sample` for a fair share of every language.
      vocab_size: pieces in all, with the 9 special ids, the symbols and the 256 bytes.
      seed: of SentencePiece's own generator.
      symbols: control tokens besides `CONTROLS`, which no text can spell: `control` gives their ids.
    """
    sentencepiece.set_random_generator_seed(seed)
    model = io.BytesIO()
    lines = (" " + line for text in sentences for line in text.splitlines() if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # `encode_words` writes the leading spaces itself
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            control_symbols=[*CONTROLS, *symbols],
            max_sentence_length=1 << 20,  # the default of 4 KiB skips longer texts without a word
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train {vocab_size} pieces: {str(error).rpartition('] ')[2].strip()}") from None
    return Unigram(model.getvalue())


def fair_sample(
    texts_by_group: Mapping[str, Sequence[str]], characters: int, seed: int, temperature: float = 2.0
) -> Iterator[str]:
    """Yields texts until `characters` are drawn: a group's share is its size to the power 1 / temperature.

    Temperature 1 keeps the natural shares; higher ones lift small languages. Texts of a group come shuffled,
    and come again once they have all been drawn.
    """
    rng = random.Random(seed)
    groups = sorted(name for name, texts in texts_by_group.items() if any(texts))
    if not groups:
        raise ValueError("no text to train a tokeniser on")
    shares = [sum(map(len, texts_by_group[name])) ** (1 / temperature) for name in groups]
    streams = {name: _cycle(texts_by_group[name], rng) for name in groups}
    drawn = 0
    owed = dict.fromkeys(groups, 0.0)  # shares are of characters, not of texts
    while drawn < characters:
        name = max(groups, key=owed.__getitem__)
        text = next(streams[name])
        yield text
        drawn += len(text)
        owed[name] -= len(text)
        for group, share in zip(groups, shares, strict=True):
            owed[group] += len(text) * share / sum(shares)


def _cycle(texts: Sequence[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(texts, len(texts))

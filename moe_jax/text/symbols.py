"""A vocabulary of single characters or of whole words: for digits, commands and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from moe_jax.text.tokeniser import UNK, Tokeniser

MAGIC = b"moe_jax symbols\n"
FIRST = UNK + 1
UNITS = {"characters": (list, ""), "words": (str.split, " ")}  # text -> symbols, and what joins them again


class Symbols(Tokeniser):
    """Ids: 0 padding, 1 end of text, 2 unknown (never produced), then the symbols in order. Its model is `MAGIC` and
    {"units": "words", "symbols": ["one", "two"]}."""

    def __init__(self, model: bytes, name: str = "the tokeniser model"):
        """Raises ValueError, in one line, for a damaged model."""
        super().__init__(model)
        try:
            said = json.loads(model.removeprefix(MAGIC))
            self.units, self.symbols = said["units"], tuple(said["symbols"])
            self._apart, self._between = UNITS[self.units]
            self._id = {symbol: i for i, symbol in enumerate(self.symbols, FIRST)}
            if not all(self._apart(symbol) == [symbol] for symbol in self._id) or len(self._id) < len(self.symbols):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{name}: a damaged vocabulary of symbols") from None

    @classmethod
    def of(cls, texts: Iterable[str], units: str) -> Symbols:
        """Those of `texts`, sorted. Raises ValueError for units that are not `UNITS`."""
        if units not in UNITS:
            raise ValueError(f"unknown units {units!r}; known: {', '.join(UNITS)}")
        symbols = sorted({symbol for text in texts for symbol in UNITS[units][0](text)})
        return cls(MAGIC + json.dumps({"units": units, "symbols": symbols}, ensure_ascii=False).encode())

    @property
    def vocab_size(self) -> int:
        return FIRST + len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a symbol that is not among them."""
        symbols = self._apart(text)
        for symbol in symbols:
            if symbol not in self._id:
                raise ValueError(f"{symbol!a} is not among the {len(self.symbols)} {self.units} of the vocabulary")
        return [self._id[symbol] for symbol in symbols]

    def decode(self, ids: Iterable[int]) -> str:
        return self._between.join(self.symbols[i - FIRST] for i in self._ids(ids) if i >= FIRST)

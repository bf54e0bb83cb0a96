"""Named, versioned text normalisers: what a metric forgives before it counts.

A rate without its normaliser cannot be compared, so every row of a report carries the signature `name|vN`. A
change of behaviour is a new version, never an edit in place.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """A pure, idempotent function from text to text, with a name and a version."""

    name: str
    version: int
    fn: Callable[[str], str]

    @property
    def signature(self) -> str:
        """For example `speech|v1`."""
        return f"{self.name}|v{self.version}"

    def __call__(self, text: str) -> str:
        return self.fn(text)


class _Shapes(dict):
    """A `str.translate` table from each character to its class, filled as characters are met.

    w letter or digit, m mark or joiner (belongs to the character before it), i may stand inside a word
    (apostrophe, Catalan middle dot), s space, p anything else.
    """

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in "'’·":
            shape = "i"
        elif category[0] in "LN":
            shape = "w"
        elif category[0] == "M" or category == "Cf":
            shape = "m"
        else:
            shape = "s" if character.isspace() else "p"
        self[code] = shape
        return shape


_SHAPES = _Shapes()
_WORD = r"w[wm]*(?:iw[wm]*)*"
_WORDS = re.compile(_WORD)
_TOKENS = re.compile(_WORD + r"|[^s]m*")


def _pieces(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The pieces of `text` whose shapes match; `re` alone would split words at Indic vowel signs."""
    return [text[slice(*match.span())] for match in pattern.finditer(text.translate(_SHAPES))]


def tokens(text: str) -> list[str]:
    """Words (with inner apostrophes) and single punctuation marks, in order; spaces are dropped.

    A hyphen is punctuation: "re-use" is three tokens.
    """
    return _pieces(text, _TOKENS)


# Mapped before NFKC, which would turn U+00B4 into a space and an accent, and after it, as "ŉ" becomes "ʼn".
_APOSTROPHES = str.maketrans(dict.fromkeys("‘’‛′ʼ＇`´", "'"))
_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _speech(text: str) -> str:
    text = "".join(c for c in text.translate(_APOSTROPHES) if unicodedata.category(c) != "Cf")
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    return " ".join(_pieces(text.translate(_APOSTROPHES), _WORDS))


def _written(text: str) -> str:
    return _collapse(unicodedata.normalize("NFC", text).translate(_QUOTES))


def _hypo2trans(text: str) -> str:
    return _collapse(re.sub(r"\n+.+", "", re.sub(r"[^\w\s]|\d", "", text.lower())))


SPEECH = Normaliser("speech", 1, _speech)
"""What cannot be heard goes: NFKC, lower case, words only. A word is letters, marks and digits of any script
with inner apostrophes; everything else, hyphens included, separates words. It is not Whisper's English
normaliser: no numbers, spellings or fillers are rewritten, so that it means the same in every language."""

WRITTEN = Normaliser("written", 1, _written)
"""Case and punctuation count: NFC, curly quotes to straight ones, white space collapsed."""

RAW = Normaliser("raw", 1, _collapse)
"""White space collapsed, nothing else."""

HYPO2TRANS = Normaliser("hypo2trans", 1, _hypo2trans)
"""As HyPoradise's authors score (`inference.py` of Hypo2Trans): lower case, the first line alone, punctuation and
digits deleted, so that "it's" is "its" and "twenty-one" is "twentyone". They lower the prediction alone (their lists
are in lower case), average the rates of lines, and skip a line whose reference is empty, which counts here."""

NORMALISERS = {normaliser.name: normaliser for normaliser in (SPEECH, WRITTEN, RAW, HYPO2TRANS)}

FAMILY_NORMALISER = {
    "asr": "speech",
    **dict.fromkeys(("ocr", "mt", "st", "gec"), "written"),
    **dict.fromkeys(("tn", "itn"), "raw"),  # the form itself is what is corrected
}


def family_normaliser(family: str) -> Normaliser:
    """The default normaliser of a task family; `written` for a family that the table does not name."""
    return NORMALISERS[FAMILY_NORMALISER.get(family, "written")]

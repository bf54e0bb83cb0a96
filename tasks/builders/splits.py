"""One split rule for every set: a text's letters decide, so the same sentence never lands on both sides.

Sets that are split by document (ua-gec) or by the English side of a translation (GNOME Help in other
languages) keep their own split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

SHORTEST_SPAN = 15  # letters; shorter sentences ("He was gone.") are common speech and only count when equal


def letters(text: str) -> str:
    """Lower-cased letters and digits only: case, spacing and punctuation do not make a sentence new."""
    return "".join(c for c in text.lower() if c.isalnum())


def split_of(text: str) -> str:
    """ "train", "valid" or "test" (90 / 5 / 5) by the SHA-1 of the text's letters."""
    bucket = int(hashlib.sha1(letters(text).encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 5 else "valid" if bucket < 10 else "train"


class HeldOut:
    """Sentences that training text must not repeat.

    `sentence in held_out` is true when its letters equal, contain, or are contained in the letters of a
    held-out sentence; the contained one must have at least `SHORTEST_SPAN` letters.
    """

    def __init__(self, sentences: Iterable[str]):
        self._letters = {letters(s) for s in sentences}
        self._by_start: dict[str, list[str]] = {}  # first letters -> held-out sentences
        self._windows: dict[str, list[str]] = {}  # any window -> held-out sentences that have it
        for text in self._letters:
            if len(text) < SHORTEST_SPAN:
                continue
            windows = _windows(text)
            self._by_start.setdefault(windows[0], []).append(text)
            for window in windows:
                self._windows.setdefault(window, []).append(text)

    def __len__(self) -> int:
        return len(self._letters)

    def __contains__(self, sentence: str) -> bool:
        text = letters(sentence)
        if text in self._letters:
            return True
        windows = _windows(text)
        if not windows:
            return False
        if any(text in held for held in self._windows.get(windows[0], ())):
            return True
        return any(text.startswith(held, i) for i, w in enumerate(windows) for held in self._by_start.get(w, ()))


def _windows(text: str) -> list[str]:
    return [text[i : i + SHORTEST_SPAN] for i in range(len(text) - SHORTEST_SPAN + 1)]

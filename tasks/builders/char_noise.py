"""Character-span edits ("rn" -> "m", a doubled letter, two letters swapped) and their rates, learned."""

from __future__ import annotations

import itertools
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from rapidfuzz.distance import Levenshtein

MAX_SPAN = 3  # characters on either side of one edit; longer changes are other words, not edits
BACKOFF = 10.0  # how many sightings in context weigh as much as the rate without context
EDGE = "\0"  # context before the first and after the last character


class Draw:
    """A weighted choice by one uniform number: much faster than `Generator.choice` for small tables."""

    def __init__(self, weighted: Iterable[tuple[object, float]]):
        pairs = list(weighted)
        self.values = [value for value, _ in pairs]
        self.cumulative = list(itertools.accumulate(weight for _, weight in pairs))
        self.total = self.cumulative[-1] if pairs else 0.0

    def __call__(self, uniform: float):
        return self.values[min(bisect(self.cumulative, uniform * self.total), len(self.values) - 1)]


def char_edits(clean: str, noisy: str) -> Iterator[tuple[int, str, str]]:
    """(position, clean characters, noisy characters) of each edit; neighbours and swaps count as one edit."""
    spans: list[list[int]] = []
    for op in Levenshtein.opcodes(clean, noisy):
        if op.tag == "equal":
            continue
        here = [op.src_start, op.src_end, op.dest_start, op.dest_end]
        if spans:
            start, _, noisy_start, _ = spans[-1]
            swap = sorted(clean[start : here[1]]) == sorted(noisy[noisy_start : here[3]])
            gap = here[0] - spans[-1][1]
            if gap == 0 or (gap == 1 and swap):
                spans[-1][1], spans[-1][3] = here[1], here[3]
                continue
        spans.append(here)
    for start, end, noisy_start, noisy_end in spans:
        yield start, clean[start:end], noisy[noisy_start:noisy_end]


class CharNoise:
    """Rates of character-span edits given one character on either side, backing off to no context.

    A span in context is one string: the character before, the span, the character after.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        """`pairs`: (clean, noisy) stretches of text that differ."""
        seen: Counter[str] = Counter()  # span in context -> times seen in clean text
        edits: dict[str, Counter[str]] = defaultdict(Counter)  # span in context -> what it became
        edits_anywhere: dict[str, Counter[str]] = defaultdict(Counter)
        for clean, noisy in pairs:
            seen.update(span for _, span in _spans(clean))
            padded = EDGE + clean + EDGE
            for at, old, new in char_edits(clean, noisy):
                if len(old) <= MAX_SPAN and len(new) <= MAX_SPAN:
                    edits[padded[at : at + len(old) + 2]][new] += 1
                    edits_anywhere[old][new] += 1
        seen_anywhere: Counter[str] = Counter()
        for span, count in seen.items():
            seen_anywhere[span[1:-1]] += count
        self._rate = {old: news.total() / seen_anywhere[old] for old, news in edits_anywhere.items()}
        self._rate_in_context = {
            span: (edits[span].total() + BACKOFF * self._rate[span[1:-1]]) / (count + BACKOFF)
            for span, count in seen.items()
            if span[1:-1] in self._rate
        }
        self._draw = {old: Draw(news.items()) for old, news in edits_anywhere.items()}
        self._draw_in_context = {span: Draw(news.items()) for span, news in edits.items() if news}
        self._places = lru_cache(maxsize=50_000)(self._find_places)

    def damage(self, text: str, distance: int, rng: np.random.Generator) -> str:
        """`text` after edits that cost about `distance` insertions, deletions and substitutions."""
        spent = 0
        for _ in range(distance):
            places = self._places(text)
            if spent >= distance or not places.values:
                break
            at, span = places(rng.random())
            old, new = span[1:-1], self._replacement(span, rng)
            text = text[:at] + new + text[at + len(old) :]
            spent += max(len(old), len(new))
        return text

    def _replacement(self, span: str, rng: np.random.Generator) -> str:
        old, in_context = span[1:-1], self._draw_in_context.get(span)
        if in_context and rng.random() * (in_context.total + BACKOFF * self._rate[old]) < in_context.total:
            return in_context(rng.random())
        return self._draw[old](rng.random())

    def _find_places(self, text: str) -> Draw:
        """Where `text` can be edited, weighted by the rate of edits there."""
        rates = self._rate_in_context
        found = [(place, rates.get(place[1]) or self._rate.get(place[1][1:-1], 0.0)) for place in _spans(text)]
        return Draw((place, rate) for place, rate in found if rate)


def _spans(text: str) -> Iterator[tuple[int, str]]:
    """(position, span in context) of every span of up to `MAX_SPAN` characters, the empty ones included."""
    padded = EDGE + text + EDGE
    for start in range(len(text) + 1):
        for end in range(start + 2, min(start + MAX_SPAN, len(text)) + 3):
            yield start, padded[start:end]

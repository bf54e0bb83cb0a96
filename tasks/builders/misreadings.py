"""What a recogniser makes of a word, learned from real n-best lists.

Words and short spans that it misread are misread as it did. Others turn into a word that looks like them, as
often as words of that length do, or have characters edited (`char_noise`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from moe_jax.tasks.builders.alignment import AlignedList
from moe_jax.tasks.builders.char_noise import CharNoise, Draw

LONGEST_SPAN = 2  # words that the table of misread spans knows together
SIMILAR_WORDS = 40  # words that may stand in for a word, the nearest ones
PRIOR = 2.0  # sightings of a word before its own rate weighs as much as that of words of its length
PUNCTUATION = ".,;:!?\"'“”‘’()—-"


class Misreadings:
    """How likely a word is misread (`rate`), and as what (`misread`)."""

    def __init__(self, lists: Sequence[AlignedList]):
        readings: dict[str, Counter[str]] = defaultdict(Counter)  # span of the reference -> its wrong readings
        misread: dict[str, float] = defaultdict(float)  # word -> share of hypotheses that misread it, summed
        seen: Counter[str] = Counter()  # word -> times in references
        for aligned in lists:
            seen.update(map(_core, aligned.words))
            for site in aligned.sites:
                readings[site.clean].update(r for r in site.readings if r and r != site.clean)
                for word in site.clean.split():
                    misread[_core(word)] += sum(r != site.clean for r in site.readings) / aligned.size
        self._inserted = Draw(readings.pop("", Counter({"": 1})).items())
        self._table = _table(readings)
        pairs = [(clean, noisy) for clean, c in readings.items() for noisy in c.elements()]
        self._chars = CharNoise(pairs)
        self._rate_of_word, self._rate_of_length = _rates(seen, misread)
        self._real_words = _real_words(pairs, seen)
        self._weight = {word: count**0.5 for word, count in seen.items()}  # recognisers favour common words
        self._about_as_long: dict[int, list[str]] = defaultdict(list)  # length -> words of about that length
        for word in sorted(word for word, count in seen.items() if count > 1):
            for length in range(len(word) - 2, len(word) + 3):
                self._about_as_long[length].append(word)
        self._similar_to = lru_cache(maxsize=None)(self._find_similar)

    def rate(self, word: str) -> float:
        """How often hypotheses misread this word; one never seen, as often as words of its length."""
        core = _core(word)
        rate = self._rate_of_word.get(core)
        return self._rate_of_length[min(len(core), len(self._rate_of_length) - 1)] if rate is None else rate

    def misread(self, clean: str, severity: float, rng: np.random.Generator) -> str:
        """A wrong reading of a span ("" inserts words); about a share `severity` of its characters change."""
        if not clean:
            return self._inserted(rng.random())
        known = self._known(clean, rng)
        if known is not None:
            return known
        words = clean.split()
        budgets = [int(severity * len(word) + rng.random()) for word in words]
        if not any(budgets):
            budgets[int(rng.random() * len(words))] = 1
        others = [self._other_word(w, b, rng) if b else None for w, b in zip(words, budgets, strict=True)]
        if not any(others):
            return self._chars.damage(clean, sum(budgets), rng)  # with the spaces, so that words run together
        edited = zip(words, budgets, others, strict=True)
        return " ".join(other or self._chars.damage(word, budget, rng) for word, budget, other in edited)

    def _other_word(self, word: str, distance: int, rng: np.random.Generator) -> str | None:
        return self._known(word, rng) or self._similar(word, distance, rng)

    def _known(self, clean: str, rng: np.random.Generator) -> str | None:
        """A reading that the recogniser gave this span; the more often it misread it, the surer."""
        for span in dict.fromkeys((clean, _core(clean))):
            known = self._table.get(span)
            if known and rng.random() * (known.total + 1) < known.total:
                return clean.replace(span, known(rng.random()), 1)
        return None

    def _similar(self, word: str, distance: int, rng: np.random.Generator) -> str | None:
        """A real word about `distance` edits away, as often as one stands in for a word of this length."""
        core = _core(word)
        if rng.random() >= self._real_words.get(len(core), 0.0):
            return None
        by_distance = self._similar_to(core)
        nearest = min(by_distance, key=lambda d: abs(d - distance), default=0)
        if not nearest or abs(nearest - distance) > 1 + distance // 3:
            return None
        return word.replace(core, by_distance[nearest](rng.random()), 1)

    def _find_similar(self, word: str) -> dict[int, Draw]:
        """Edit distance -> words of the references that far away."""
        near = self._about_as_long.get(len(word), [])
        reach = len(word) // 2 + 1
        found = process.extract(word, near, scorer=Levenshtein.distance, score_cutoff=reach, limit=SIMILAR_WORDS)
        by_distance: dict[int, list[tuple[str, float]]] = defaultdict(list)
        for other, distance, _ in found:
            if distance:
                by_distance[int(distance)].append((other, self._weight[other]))
        return {distance: Draw(others) for distance, others in by_distance.items()}


def _core(span: str) -> str:
    """A span without the punctuation around it."""
    return span.strip(PUNCTUATION) or span


def _table(misread: Mapping[str, Counter[str]]) -> dict[str, Draw]:
    """Short spans and their wrong readings; punctuation that both have at an end is left to the sentence."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for clean, readings in misread.items():
        core = _core(clean)
        before, _, after = clean.partition(core)
        for noisy, n in readings.items() if core.count(" ") < LONGEST_SPAN else ():
            inner = noisy.removeprefix(before).removesuffix(after)
            shared = inner and len(inner) == len(noisy) - len(before) - len(after)
            table[core if shared else clean][inner if shared else noisy] += n
    return {clean: Draw(readings.items()) for clean, readings in table.items()}


def _rates(seen: Mapping[str, int], misread: Mapping[str, float]) -> tuple[dict[str, float], list[float]]:
    """Error rate of each word, shrunk to that of its length, and of each length, shrunk to that of all."""
    sums = np.zeros((2, 1 + max(map(len, seen), default=0)))
    for word, count in seen.items():
        sums[:, len(word)] += misread.get(word, 0.0), count
    overall = max(sums[0].sum() / max(sums[1].sum(), 1.0), 1e-6)
    of_length = (sums[0] + PRIOR * overall) / (sums[1] + PRIOR)
    of_word = {w: (misread.get(w, 0.0) + PRIOR * of_length[len(w)]) / (n + PRIOR) for w, n in seen.items()}
    return of_word, of_length.tolist()


def _real_words(pairs: Sequence[tuple[str, str]], seen: Mapping[str, int]) -> dict[int, float]:
    """Length of a word -> how often it is misread as a known word; longer words are more often mangled."""
    of_length: dict[int, list[bool]] = defaultdict(list)
    for clean, noisy in pairs:
        if " " not in clean and " " not in noisy:
            of_length[len(_core(clean))].append(_core(noisy) in seen)
    return {length: sum(real) / len(real) for length, real in of_length.items()}

"""Noise like a recogniser's, learned from real n-best lists: for pretraining a denoiser on clean text.

Two things are learned. *Templates*, one for each real n-best list: how many hypotheses it had, at how many sites
they departed from the reference, which hypotheses shared a reading there and how far it was off. A clean sentence
gets the template of a real list of about its length, so the number of errors, untouched lines, n-best sizes and
what hypotheses share are those of real lists. *Replacements* fill the sites: words and short spans that the
recogniser misread are misread as it did; others turn into a word that looks like them, or have characters edited
(`char_noise`).
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from moe_jax.tasks.builders.alignment import Site, sites
from moe_jax.tasks.builders.char_noise import CharNoise, Draw

LONGEST_SPAN = 2  # words that the table of misread spans knows together
FEW_TEMPLATES = 20  # a sentence has at least so many templates to choose from, those of the nearest lengths
SIMILAR_WORDS = 40  # words that may stand in for a word, the nearest ones
PRIOR = 2.0  # sightings of a word before its own error rate weighs as much as that of its length
TRIES = 4  # to find a free place, or a reading that is not there yet
PUNCTUATION = ".,;:!?\"'“”‘’()—-"


@dataclasses.dataclass(frozen=True)
class Slot:
    """One site of a template.

    Attributes:
      words, chars: the length of what it covers in the reference; 0 where words were inserted.
      readings: for each hypothesis 0 where it was right, else 1, 2, ... for its reading.
      distances: of readings 1, 2, ...: edit distance to the reference; None where the words were dropped.
    """

    words: int
    chars: int
    readings: tuple[int, ...]
    distances: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Template:
    """The shape of one real n-best list: its reference's length in words, its size and its sites."""

    words: int
    hypotheses: int
    slots: tuple[Slot, ...]


class NoiseModel:
    """Noise of one family and language. Made by `NoiseModel.fit`."""

    def __init__(self, family: str, lists: Sequence[tuple[list[str], int, list[Site]]]):
        """`lists`: (words of the reference, number of hypotheses, sites) of each real n-best list."""
        self.family = family
        self._templates = sorted((_template(*one) for one in lists), key=lambda t: t.words)
        misread: dict[str, Counter[str]] = defaultdict(Counter)  # span of the reference -> its wrong readings
        share: dict[str, float] = defaultdict(
            float
        )  # word -> the share of hypotheses that misread it, summed
        for reference, size, found in lists:
            for site in found:
                clean = " ".join(reference[site.start : site.end])
                wrong = [r for r in site.readings if r and r != clean]
                misread[clean].update(wrong)
                for word in reference[site.start : site.end]:
                    share[_core(word)] += sum(r != clean for r in site.readings) / size
        self._inserted = Draw(misread.pop("", Counter({"": 1})).items())
        self._table = _table(misread)
        pairs = [(clean, noisy) for clean, c in misread.items() for noisy in c.elements()]
        self._chars = CharNoise(pairs)
        self._seen = Counter(_core(word) for reference, _, _ in lists for word in reference)
        self._rates = _Rates(self._seen, share)
        self._real_words = _real_words(pairs, self._seen)
        self._lexicon: dict[int, list[str]] = defaultdict(
            list
        )  # by length; words seen once may be names or errors
        for word in sorted(word for word, count in self._seen.items() if count > 1):
            self._lexicon[len(word)].append(word)
        self._like = lru_cache(maxsize=None)(self._find_like)
        self._of_length = lru_cache(maxsize=None)(self._find_templates)
        self._gain = 1.0
        self._gain = self._calibrate(lists)

    @classmethod
    def fit(cls, rows: Sequence[Mapping[str, Any]]) -> NoiseModel:
        """Learn from records (`task`, `hypotheses`, `reference`) of one family and language. Train rows only.

        Raises ValueError for no rows or for rows of several families.
        """
        families = sorted({row["task"] for row in rows})
        if len(families) != 1:
            raise ValueError(
                f"a noise model is of one family, these rows are of {families or 'none'}: select first"
            )
        lists = []
        for row in rows:
            reference = row["reference"].split()
            lists.append(
                (reference, len(row["hypotheses"]), sites(reference, [h.split() for h in row["hypotheses"]]))
            )
        return cls(families[0], lists)

    def style(self, sentence: str) -> str:
        """The reference of a noised sentence: what a recogniser of this family would have got right."""
        return speech(sentence) if self.family == "asr" else " ".join(sentence.split())

    def nbest(self, sentence: str, rng: np.random.Generator, *, count: int | None = None) -> list[str]:
        """Distinct readings of `sentence`, on average the best first: as many as a real list has, at most `count`."""
        words = self.style(sentence).split()
        templates = self._of_length(len(words))
        template = templates[int(rng.random() * len(templates))]
        lines: list[list[str]] = [[] for _ in range(template.hypotheses)]
        at = 0
        for start, end, slot in self._place(template, words, rng):
            readings = self._readings(" ".join(words[start:end]), slot, rng)
            for line, reading in zip(lines, slot.readings, strict=True):
                line += words[at:start]
                line += readings[reading].split()
            at = end
        return list(dict.fromkeys(" ".join(line + words[at:]) for line in lines))[:count]

    def _calibrate(self, lists: Sequence[tuple[list[str], int, list[Site]]]) -> float:
        """How many more sites to place: some find no room, and some words come out of one as they were."""
        rng = np.random.default_rng(0)
        real = made = 0
        for reference, _, found in lists[:: max(1, len(lists) // 500)]:
            best = [(reference[s.start : s.end], s.readings[0].split()) for s in found]
            real += sum(Levenshtein.distance(clean, noisy) for clean, noisy in best)
            noisy = self.nbest(" ".join(reference), rng, count=1)[0]
            made += Levenshtein.distance(reference, noisy.split())
        return min(max(real / max(made, 1), 1.0), 2.0)

    def _find_templates(self, words: int) -> list[Template]:
        nearest = sorted(self._templates, key=lambda t: abs(t.words - words))
        enough = max(FEW_TEMPLATES, len(nearest) // 30)
        reach = abs(nearest[:enough][-1].words - words)
        return [t for t in nearest if abs(t.words - words) <= reach]

    def _place(
        self, template: Template, words: list[str], rng: np.random.Generator
    ) -> list[tuple[int, int, Slot]]:
        """Where the slots go, in order: at words that are often misread and about as long as the template's were."""
        if not words or not template.slots:
            return []
        weights = Draw((i, self._rates(word)) for i, word in enumerate(words))
        placed: dict[int, tuple[int, int, Slot]] = {}
        taken: set[int] = set()
        for slot in template.slots:
            for _ in range(int(self._gain * len(words) / template.words + rng.random())):
                best: tuple[float, range] | None = None
                for _ in range(TRIES):
                    start = max(0, weights(rng.random()) - int(rng.random() * slot.words))
                    cover = range(start, min(start + max(slot.words, 1), len(words)))
                    misfit = abs(sum(len(words[i]) + 1 for i in cover) - slot.chars - 1)
                    if taken.isdisjoint(cover) and (best is None or misfit < best[0]):
                        best = misfit, cover
                if best:
                    taken.update(best[1])
                    start = best[1].start
                    placed[start] = (start, best[1].stop if slot.words else start, slot)
        return [placed[start] for start in sorted(placed)]

    def _readings(self, clean: str, slot: Slot, rng: np.random.Generator) -> list[str]:
        readings = [clean]
        for distance in slot.distances:
            severity = None if distance is None else distance / max(slot.chars, len(clean), 1)
            for _ in range(TRIES):
                reading = self._misread(clean, severity, rng)
                if reading not in readings:
                    break
            readings.append(reading)
        return readings

    def _misread(self, clean: str, severity: float | None, rng: np.random.Generator) -> str:
        if not clean:
            return self._inserted(rng.random())
        if severity is None:
            return ""
        known = self._known(clean, rng)
        if known is not None:
            return known
        words = clean.split()
        budgets = [int(severity * len(word) + rng.random()) for word in words]
        if not any(budgets):
            budgets[int(rng.random() * len(words))] = 1
        others = [self._other_word(w, b, rng) if b else w for w, b in zip(words, budgets, strict=True)]
        if any(others[i] for i, budget in enumerate(budgets) if budget):
            left = [
                o or self._chars.damage(w, b, rng) for w, b, o in zip(words, budgets, others, strict=True)
            ]
            return " ".join(left)
        return self._chars.damage(clean, sum(budgets), rng)  # with the spaces, so that words run together

    def _other_word(self, word: str, distance: int, rng: np.random.Generator) -> str | None:
        return self._known(word, rng) or self._similar(word, distance, rng)

    def _known(self, clean: str, rng: np.random.Generator) -> str | None:
        """A reading that the recogniser gave this span; the more often it misread it, the surer."""
        core = _core(clean)
        for span in (clean, core):
            known = self._table.get(span)
            if known and rng.random() * (known.total + 1) < known.total:
                return clean.replace(span, known(rng.random()), 1)
        return None

    def _similar(self, word: str, distance: int, rng: np.random.Generator) -> str | None:
        """A real word about `distance` edits away, as often as recognisers write real words in place of others."""
        core = _core(word)
        if rng.random() >= self._real_words.get(len(core), 0.0):
            return None
        by_distance = self._like(core)
        nearest = min(by_distance, key=lambda d: abs(d - distance), default=0)
        if not nearest or abs(nearest - distance) > 1 + distance // 3:
            return None
        return word.replace(core, by_distance[nearest](rng.random()), 1)

    def _find_like(self, word: str) -> dict[int, Draw]:
        others = [w for n in range(len(word) - 2, len(word) + 3) for w in self._lexicon.get(n, ())]
        reach = len(word) // 2 + 1
        found = process.extract(
            word, others, scorer=Levenshtein.distance, score_cutoff=reach, limit=SIMILAR_WORDS
        )
        by_distance: dict[int, list[tuple[str, float]]] = defaultdict(list)
        for other, distance, _ in found:
            if distance:
                by_distance[int(distance)].append((other, self._seen[other] ** 0.5))
        return {distance: Draw(others) for distance, others in by_distance.items()}


class _Rates:
    """How often a word is misread; for words seen seldom, how often words of that length are."""

    def __init__(self, seen: Mapping[str, int], misread: Mapping[str, float]):
        totals: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for word, count in seen.items():
            totals[len(word)][0] += misread.get(word, 0.0)
            totals[len(word)][1] += count
        overall = sum(wrong for wrong, _ in totals.values()) / max(sum(n for _, n in totals.values()), 1)
        self._other = max(overall, 1e-6)  # words longer than any seen
        self._of_length = {k: (wrong + PRIOR * self._other) / (n + PRIOR) for k, (wrong, n) in totals.items()}
        self._of_word = {
            word: (misread.get(word, 0.0) + PRIOR * self._of_length[len(word)]) / (count + PRIOR)
            for word, count in seen.items()
        }

    def __call__(self, word: str) -> float:
        core = _core(word)
        return self._of_word.get(core) or self._of_length.get(len(core), self._other)


def speech(text: str) -> str:
    """The style of recognised speech: lower-case words without punctuation; apostrophes inside words stay."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    words = (word.strip("'") for word in re.sub(r"[^\w']+", " ", text).split())
    return " ".join(word for word in words if word)


def _core(span: str) -> str:
    return span.strip(PUNCTUATION) or span


def _table(misread: Mapping[str, Counter[str]]) -> dict[str, Draw]:
    """Short spans and their wrong readings; punctuation that both sides end with is left to the sentence."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for clean, readings in misread.items():
        core = _core(clean)
        before, _, after = clean.partition(core)
        if core.count(" ") >= LONGEST_SPAN:
            continue
        for noisy, n in readings.items():
            shared = (
                noisy.startswith(before) and noisy.endswith(after) and len(noisy) > len(before) + len(after)
            )
            inner = noisy[len(before) : len(noisy) - len(after)]
            table[core if shared else clean][inner if shared else noisy] += n
    return {clean: Draw(readings.items()) for clean, readings in table.items()}


def _real_words(pairs: Sequence[tuple[str, str]], seen: Mapping[str, int]) -> dict[int, float]:
    """Length of a word -> how often it is misread as a known word; longer words are more often mangled."""
    of_length: dict[int, list[bool]] = defaultdict(list)
    for clean, noisy in pairs:
        if " " not in clean and " " not in noisy:
            of_length[len(_core(clean))].append(_core(noisy) in seen)
    return {length: sum(real) / len(real) for length, real in of_length.items()}


def _template(reference: Sequence[str], size: int, found: Sequence[Site]) -> Template:
    slots = []
    for site in found:
        clean = " ".join(reference[site.start : site.end])
        wrong = [r for r in dict.fromkeys(site.readings) if r != clean]
        distances = [Levenshtein.distance(clean, r) if r else None for r in wrong]
        readings = tuple(0 if r == clean else 1 + wrong.index(r) for r in site.readings)
        slots.append(Slot(site.end - site.start, len(clean), readings, tuple(distances)))
    slots.sort(key=lambda slot: -slot.words)  # the long ones find room first
    return Template(max(len(reference), 1), size, tuple(slots))

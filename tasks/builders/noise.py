"""Noise like a recogniser's, learned from real n-best lists: for pretraining a denoiser on clean text.

Two things are learned. *Templates*, one for each real n-best list: how many hypotheses it had, at how many
sites they departed from the reference, which hypotheses shared a reading there and how far it was off. A
clean sentence gets the template of a real list of about its length, so that the number of errors, untouched
lines, n-best sizes and what hypotheses share are those of real lists. *Misreadings* (`misreadings.py`) fill
the sites.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from moe_jax.tasks.builders.alignment import AlignedList, align
from moe_jax.tasks.builders.char_noise import Draw
from moe_jax.tasks.builders.misreadings import Misreadings

FEW_TEMPLATES = 20  # a sentence has at least so many templates to choose from, those of the nearest lengths
CALIBRATION_LISTS = 500
TRIES = 4  # to find a place that fits, or a reading that is not there yet

Placed = tuple[int, int, "Slot"]  # first word, word after the last, what happens there


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

    def __init__(self, family: str, lists: Sequence[AlignedList]):
        self.family = family
        self._templates = [_template(one) for one in lists]
        self._misreadings = Misreadings(lists)
        self._templates_for = lru_cache(maxsize=None)(self._find_templates)
        self._gain = 1.0
        self._gain = self._calibrate(lists)

    @classmethod
    def fit(cls, rows: Sequence[Mapping[str, Any]]) -> NoiseModel:
        """Learn from records (`task`, `hypotheses`, `reference`) of one family and language. Train rows only.

        Raises ValueError for no rows or for rows of several families.
        """
        families = sorted({row["task"] for row in rows})
        if len(families) != 1:
            given = " and ".join(families) or "no rows"
            raise ValueError(f"a noise model is of one family, got {given}: give the rows of one family")
        return cls(families[0], [align(row["reference"], row["hypotheses"]) for row in rows])

    def style(self, sentence: str) -> str:
        """The reference of a noised sentence: what a recogniser of this family would have got right."""
        return speech(sentence) if self.family == "asr" else " ".join(sentence.split())

    def nbest(
        self, sentence: str, rng: np.random.Generator, *, count: int | None = None, strength: float = 0.0
    ) -> list[str]:
        """Distinct readings of `sentence`, on average the best first: as many as a real list has, or `count`
        if that is fewer. Never an empty list; where all words would be dropped, they stay.

        `strength` makes it that of a better recogniser: so many of the sites where the real one erred are right in
        the first reading, half of these in all.
        """
        words = self.style(sentence).split()
        templates = self._templates_for(len(words))
        template = templates[int(rng.random() * len(templates))]
        lines: list[list[str]] = [[] for _ in range(template.hypotheses)]
        at = 0
        for start, end, slot in self._place(template, words, rng):
            readings = self._readings(" ".join(words[start:end]), slot, rng)
            luck = rng.random() if strength else 1.0
            right = len(lines) if luck < strength / 2 else 1 if luck < strength else 0
            for i, (line, reading) in enumerate(zip(lines, slot.readings, strict=True)):
                line += words[at:start]
                line += readings[0 if i < right else reading].split()
            at = end
        return list(dict.fromkeys(" ".join(line + words[at:] or words) for line in lines))[:count]

    def _place(self, template: Template, words: list[str], rng: np.random.Generator) -> list[Placed]:
        """Where the slots go, in order: at words often misread and about as long as those of the template."""
        if not words or not template.slots:
            return []
        draw = Draw((i, self._misreadings.rate(word)) for i, word in enumerate(words))
        share = self._gain * len(words) / template.words
        taken: set[int] = set()
        placed: list[Placed] = []
        for slot in template.slots:
            for _ in range(int(share + rng.random())):
                found: list[tuple[int, range]] = []
                for _ in range(TRIES):
                    start = max(0, draw(rng.random()) - int(rng.random() * slot.words))
                    cover = range(start, min(start + max(slot.words, 1), len(words)))
                    if taken.isdisjoint(cover):
                        found.append((abs(sum(len(words[i]) + 1 for i in cover) - 1 - slot.chars), cover))
                if found:
                    _, cover = min(found, key=lambda misfit_and_cover: misfit_and_cover[0])
                    taken.update(cover)
                    placed.append((cover.start, cover.stop if slot.words else cover.start, slot))
        return sorted(placed, key=lambda place: place[0])

    def _readings(self, clean: str, slot: Slot, rng: np.random.Generator) -> list[str]:
        """The words themselves, then the slot's wrong readings of them, no two alike if that can be had."""
        readings = [clean]
        for distance in slot.distances:
            reading = ""
            if distance is not None:
                severity = distance / max(slot.chars, len(clean), 1)
                for _ in range(TRIES):
                    reading = self._misreadings.misread(clean, severity, rng)
                    if reading not in readings:
                        break
            readings.append(reading)
        return readings

    def _calibrate(self, lists: Sequence[AlignedList]) -> float:
        """How many more slots to place: some find no room, and some words come out of one as they were."""
        rng = np.random.default_rng(0)
        real = made = 0
        for one in lists[:: max(1, len(lists) // CALIBRATION_LISTS)]:
            real += sum(Levenshtein.distance(s.clean.split(), s.readings[0].split()) for s in one.sites)
            noisy = self.nbest(" ".join(one.words), rng, count=1)[0]
            made += Levenshtein.distance(one.words, noisy.split())
        return min(max(real / max(made, 1), 1.0), 2.0)

    def _find_templates(self, words: int) -> list[Template]:
        """The templates of the nearest lengths."""
        nearest = sorted(self._templates, key=lambda t: abs(t.words - words))
        enough = max(FEW_TEMPLATES, len(nearest) // 30)
        reach = abs(nearest[:enough][-1].words - words)
        return [t for t in nearest if abs(t.words - words) <= reach]


def speech(text: str) -> str:
    """The style of recognised speech: lower-case words without punctuation; apostrophes inside words stay."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    words = (word.strip("'") for word in re.sub(r"[^\w']+", " ", text).split())
    return " ".join(word for word in words if word)


def _template(aligned: AlignedList) -> Template:
    slots = []
    for site in aligned.sites:
        wrong = [r for r in dict.fromkeys(site.readings) if r != site.clean]
        readings = tuple(0 if r == site.clean else 1 + wrong.index(r) for r in site.readings)
        distances = tuple(Levenshtein.distance(site.clean, r) if r else None for r in wrong)
        slots.append(Slot(site.end - site.start, len(site.clean), readings, distances))
    slots.sort(key=lambda slot: -slot.words)  # the long ones find room first
    return Template(max(len(aligned.words), 1), aligned.size, tuple(slots))

"""Languages and directions of translation, and the numbers that routers see. Without TensorFlow: runs read it too.

The languages are English and eight others that share their text (see builders/parallel.py): German and Swedish;
Spanish, Catalan, French and Italian; Russian and Czech. A direction is a task of its own, "translate/en-de"; one from a
language into itself restores masked text, one from "mt" edits what a machine translated, read beside what it was
translated from (the family `mt` of the corpus). What is not trained on by default:

    ZERO_SHOT   related (fr-ca) and unrelated languages (de-ru) that were never seen together, each seen with others
    NEW         a language that comes later: the new task of an adapter
    POST_EDIT   what a machine translated
"""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from pathlib import Path

from moe_jax import formats

FAMILY = "translate"
LANGUAGES = ("en", "de", "es", "ca", "fr", "it", "ru", "cs", "sv")  # append only
FIRST_ID = 16
DIRECTIONS = (  # append only: the place is the id
    *("en-de", "en-es", "en-ca", "en-fr", "en-it", "en-ru", "en-cs"),
    *("de-en", "es-en", "ca-en", "fr-en", "it-en", "ru-en", "cs-en"),
    *("es-ca", "ca-es", "es-it", "it-es", "ru-cs", "cs-ru"),
    *("fr-ca", "de-ru", "en-sv", "sv-en"),
    *("en-en", "de-de", "es-es", "ca-ca", "fr-fr", "it-it", "ru-ru", "cs-cs", "sv-sv"),
    *("mt-en", "mt-es"),
)
DRAFT, BETWEEN = "mt", " _ "  # who wrote what is edited; what stands between it and what it was translated from
ZERO_SHOT = ("fr-ca", "de-ru")
NEW = ("en-sv", "sv-en", "sv-sv")
POST_EDIT = ("mt-en", "mt-es")
TRAINED = tuple(direction for direction in DIRECTIONS if direction not in (*ZERO_SHOT, *NEW, *POST_EDIT))


def tested() -> list[str]:
    """The directions that are scored: those that are trained, and those that never are."""
    return [*trained(), *ZERO_SHOT]


def trained(source: str | None = None) -> list[str]:
    """Those that are trained on and translate, from all languages or one."""
    return [d for d in TRAINED if not denoises(d) and source in (None, languages(d)[0])]


def languages(direction: str) -> tuple[str, str]:
    """("en", "de") of "en-de"."""
    source, _, target = direction.partition("-")
    return source, target


def denoises(direction: str) -> bool:
    """Whether it restores masked text of one language."""
    source, target = languages(direction)
    return source == target


def edits(direction: str) -> bool:
    """Whether it edits what a machine translated."""
    return languages(direction)[0] == DRAFT


def direction_ids() -> dict[str, int]:
    """{"translate/en-de": 16, ...}: what `prepare.prepare.ids` takes."""
    return {f"{FAMILY}/{direction}": number for number, direction in enumerate(DIRECTIONS, FIRST_ID)}


def grouped(by: str) -> dict[int, int]:
    """Task id -> number of its group, from 1, so that 0 is left to unknown tasks.

    Args:
      by: "target", "source", "pair" or "type", or several: "target+type" has a group for each language written, and
        another for each that is restored. The first three are the granularities of "Beyond Distillation: Task-level
        MoE" (arXiv 2110.03742), a pair is a direction; the types are 1, translates, 2, denoises, and 3, edits.

    Raises ValueError for another granularity.
    """
    numbers = {language: number for number, language in enumerate((*LANGUAGES, DRAFT), 1)}
    groups = {
        "target": [numbers[languages(direction)[1]] for direction in DIRECTIONS],
        "source": [numbers[languages(direction)[0]] for direction in DIRECTIONS],
        "pair": list(range(1, len(DIRECTIONS) + 1)),
        "type": [3 if edits(direction) else 1 + denoises(direction) for direction in DIRECTIONS],
    }
    names = by.split("+")
    if not groups.keys() >= {*names}:
        raise ValueError(f"tasks cannot be grouped by {by!r}; choose {', '.join(groups)}, or several joined by +")
    found = list(zip(*(groups[name] for name in names), strict=True))
    order = {group: number for number, group in enumerate(dict.fromkeys(found), 1)}  # directions are append-only
    of = groups[by] if by in groups else [order[group] for group in found]
    return dict(zip(direction_ids().values(), of, strict=True))


def own_adapter() -> dict[int, int]:
    """Task id -> the expert of its own: what `ByTask` takes for static adapters. Who edits a language has that of who
    restores it."""
    own = {direction: place for place, direction in enumerate(DIRECTIONS)}
    own |= {direction: own["{1}-{1}".format(*languages(direction))] for direction in POST_EDIT}
    return {number: own[direction] for direction, number in zip(DIRECTIONS, direction_ids().values(), strict=True)}


def drafts(path: Path, direction: str) -> list[tuple[int, str, str]]:
    """Of a file of records of `mt` those whose reference is in the language of `direction`: (line; the draft,
    `BETWEEN`, the first of the texts that it was translated from; reference).

    Raises ValueError, in one line, for a file that cannot be read (`formats.read`).
    """
    try:
        return _drafts(path, path.stat().st_mtime_ns, languages(direction)[1])
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error})") from None


@functools.lru_cache(maxsize=12)
def _drafts(path: Path, mtime: int, language: str) -> list[tuple[int, str, str]]:
    found = [record for record in formats.read(path) if json.loads(record.raw).get("lang") == language]
    return [(r.line, BETWEEN.join((r.hypotheses[0], *r.sources[:1])), r.reference) for r in found if r.reference]


def read(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Lines of a multi-parallel file, {"en": "Press any key.", "de": ..., "set": ...}, and their numbers.

    Raises ValueError, in one line, for a bad file or line.
    """
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot read ({error})") from None


@functools.lru_cache(maxsize=3)
def _read(path: Path, mtime: int) -> list[tuple[int, dict[str, str]]]:
    """`mtime` makes the cache see a file that has changed."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return [(n, _texts(line, f"{path}:{n}")) for n, line in enumerate(file, 1) if line.strip()]


def _texts(line: bytes, place: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{place}: not JSON; write one JSON object a line") from None
    if not isinstance(row, dict) or not all(isinstance(text, str) for text in row.values()):
        raise ValueError(f'{place}: not an object of texts by language; write {{"en": "...", "de": "..."}}')
    if blank := [language for language, text in row.items() if not text.strip()]:
        raise ValueError(f"{place}: the text of {blank[0]} is empty; leave the language out of this row")
    return row

"""What to merge and how, as plain data: a YAML file, or the arguments of `merge.merge`.

base: runs/base/model.safetensors
method: lors                     # of `methods.METHODS`
options: {rank: 7, density: 0.2, scale: 0.2}
models:
  - runs/asr                     # a run folder, a safetensors file, or a Hugging Face folder
  - path: runs/ocr
    weight: 0.5                  # or [0.2, 1.0] from the first layer to the last, or by paths, of which the first
  - path: runs/mt                # that matches counts:
    weight: [{match: attention, weight: 0.3}, {match: "", weight: [1.0, 0.5]}]
  - merge: {method: ties, models: [runs/gec_a, runs/gec_b]}   # a stage: merged first, from the same base
rules:                           # the first that matches a path says how it is merged; "base": left as it is
  - {match: embedding, method: average}
  - {match: router, method: base}
seed: 0
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_jax.merging.methods import METHODS, Method, is_number, method
from moe_jax.merging.models import MergeError, Site

BASE = "base"  # the method that leaves arrays as they are


@dataclasses.dataclass(frozen=True)
class Weight:
    """(pattern of paths, values from the first layer to the last), of which the first that matches counts."""

    by_path: tuple[tuple[str, tuple[float, ...]], ...] = (("", (1.0,)),)

    def at(self, site: Site) -> float:
        """0 where no pattern matches; between the values by depth, outside of layers their mean."""
        for pattern, values in self.by_path:
            if re.search(pattern, site.name):
                if site.depth is None:
                    return float(np.mean(values))
                return float(np.interp(site.depth * (len(values) - 1), range(len(values)), values))
        return 0.0

    def knows(self, name: str) -> bool:
        """Whether a pattern matches a path."""
        return any(re.search(pattern, name) for pattern in self.patterns())

    def has_negative(self) -> bool:
        return any(value < 0 for _, values in self.by_path for value in values)

    def patterns(self) -> list[str]:
        return [pattern for pattern, _ in self.by_path]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Paths that match are merged by this method; None: they stay as in the base."""

    match: str
    method: Method | None
    name: str


@dataclasses.dataclass(frozen=True)
class Part:
    """One model: a path, or a stage of its own. `statistics`: a file of `statistics.gather` about it."""

    source: str | Stage
    weight: Weight
    statistics: str | None = None

    @property
    def said(self) -> str:
        """What messages call it."""
        return self.source if isinstance(self.source, str) else "a stage"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Models and how they become one."""

    method: Method
    name: str
    models: tuple[Part, ...]
    rules: tuple[Rule, ...]

    def rule(self, site: Site) -> tuple[str, Method | None]:
        """(name, method) for an array: that of the first rule that matches, or of all."""
        for rule in self.rules:
            if re.search(rule.match, site.name):
                return rule.name, rule.method
        return self.name, self.method

    def paths(self) -> list[str]:
        """Every model, stage by stage."""
        return [path for p in self.models for path in (p.source.paths() if isinstance(p.source, Stage) else [p.source])]

    def statistics(self) -> list[str]:
        """Every file of statistics, once."""
        return list(dict.fromkeys(p.statistics for s in self.stages() for p in s.models if p.statistics))

    def stages(self) -> list[Stage]:
        return [self, *(s for p in self.models if isinstance(p.source, Stage) for s in p.source.stages())]


@dataclasses.dataclass(frozen=True)
class Recipe:
    base: str
    stage: Stage
    seed: int = 0
    align: bool = False

    def inputs(self) -> list[str]:
        """Every path that is read."""
        return [self.base, *self.stage.paths(), *self.stage.statistics()]


def read(path: str) -> dict[str, Any]:
    """A recipe of a YAML file, in which paths of checkpoints begin where the command runs.

    Raises MergeError for a file that cannot be read or is no mapping.
    """
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise MergeError(f"{path}: cannot read the recipe ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise MergeError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(found, dict):
        raise MergeError(f"{path}: a recipe is a mapping with base, models and method; this is {type(found).__name__}")
    return found


def parse(recipe: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Raises MergeError for what is missing, unknown or of another kind."""
    known = {"base", "seed", "align", "method", "options", "models", "rules"}
    _check_names(recipe, known, where)
    base, seed, align = recipe.get("base"), recipe.get("seed", 0), recipe.get("align", False)
    if not isinstance(base, str) or not base:
        raise MergeError(f"{where}: base is missing: the checkpoint from which the models were tuned")
    if isinstance(seed, bool) or not isinstance(seed, int) or not isinstance(align, bool):
        raise MergeError(f"{where}: seed is a whole number, align true or false; not {seed!r}, {align!r}")
    if not 0 <= seed < 1 << 32:
        raise MergeError(f"{where}: seed is {seed}, it must be from 0 to {(1 << 32) - 1}")
    try:
        stage = _stage({k: v for k, v in recipe.items() if k not in ("base", "seed", "align")}, where)
    except RecursionError:  # YAML can say it of itself
        raise MergeError(f"{where}: a stage is within itself; write its models out") from None
    return Recipe(base, stage, seed, align)


def _stage(given: Any, where: str) -> Stage:
    if not isinstance(given, Mapping):
        raise MergeError(f"{where}: a stage is a mapping with method and models, not {given!r}")
    _check_names(given, {"method", "options", "models", "rules"}, where)
    name, models, rules = given.get("method", "lors"), given.get("models"), given.get("rules") or ()
    if not _is_list(models) or not models:
        raise MergeError(f"{where}: models is missing: a list of checkpoints")
    if not _is_list(rules):
        raise MergeError(f"{where}: rules is {rules!r}, it must be a list")
    chosen = _method(name, given.get("options"), where)
    if chosen is None:
        raise MergeError(f"{where}: the method of all is one of {', '.join(METHODS)}")
    parts = tuple(_part(part, f"{where}: model {i}") for i, part in enumerate(models, 1))
    return Stage(chosen, name, parts, tuple(_rule(rule, f"{where}: rule {i}") for i, rule in enumerate(rules, 1)))


def _rule(given: Any, where: str) -> Rule:
    if not isinstance(given, Mapping) or not isinstance(given.get("match"), str) or "method" not in given:
        raise MergeError(f"{where}: is {given!r}, it must have match and method")
    _check_names(given, {"match", "method", "options"}, where)
    _check_pattern(given["match"], where)
    return Rule(given["match"], _method(given["method"], given.get("options"), where), str(given["method"]))


def _method(name: Any, options: Any, where: str) -> Method | None:
    if name == BASE and not options:
        return None
    if (
        not isinstance(name, str)
        or not isinstance(options or {}, Mapping)
        or not all(isinstance(option, str) for option in options or {})
    ):
        raise MergeError(f"{where}: method is {name!r}, options {options!r}: a name, and a mapping of numbers by name")
    try:
        return method(name, options)
    except ValueError as error:
        raise MergeError(f"{where}: {error}") from None


def _part(given: Any, where: str) -> Part:
    if isinstance(given, str):
        given = {"path": given}
    if not isinstance(given, Mapping) or ("path" in given) == ("merge" in given):
        raise MergeError(f"{where}: is {given!r}, it must be a path, or have one of path and merge")
    _check_names(given, {"path", "merge", "weight", "statistics"}, where)
    source = _stage(given["merge"], where) if "merge" in given else given["path"]
    statistics = given.get("statistics")
    if not isinstance(source, (str, Stage)) or not isinstance(statistics, (str, type(None))):
        raise MergeError(f"{where}: path and statistics are texts, not {source!r} and {statistics!r}")
    return Part(source, _weight(given.get("weight", 1.0), where), statistics)


def _weight(given: Any, where: str) -> Weight:
    if _is_list(given) and given and all(isinstance(entry, Mapping) for entry in given):
        out = []
        for entry in given:
            _check_names(entry, {"match", "weight"}, where)
            if not isinstance(entry.get("match"), str):
                raise MergeError(f"{where}: a weight by path is {{match: ..., weight: ...}}, not {dict(entry)!r}")
            _check_pattern(entry["match"], where)
            out.append((entry["match"], _numbers(entry.get("weight"), where)))
        return Weight(tuple(out))
    return Weight((("", _numbers(given, where)),))


def _numbers(given: Any, where: str) -> tuple[float, ...]:
    values = given if _is_list(given) else [given]
    if not values or not all(map(is_number, values)):
        raise MergeError(
            f"{where}: weight is {given!r}, it must be a number, or a list from the first layer to the last"
        )
    return tuple(map(float, values))


def _check_names(given: Mapping, known: set[str], where: str) -> None:
    if unknown := sorted(map(str, given.keys() - known)):
        raise MergeError(f"{where}: unknown entry {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _check_pattern(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise MergeError(f"{where}: {pattern!r} is no regular expression ({error})") from None


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, (str, bytes))

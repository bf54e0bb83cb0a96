"""Checkpoints -> one checkpoint, array by array: what is in memory is the models' parts of one matrix (with several
devices, of one a device), never a model.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import math
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax import __version__, checkpoint, sharding
from moe_jax.merging import recipe as recipes
from moe_jax.merging.align import orders
from moe_jax.merging.methods import Method
from moe_jax.merging.models import HuggingFace, MergeError, Model, Site, check_alike, digest, open_model
from moe_jax.merging.recipe import Part, Recipe, Stage
from moe_jax.partfile import write_text
from moe_jax.types import Array

UNRELATED = 0.5  # a cosine to the base below which a model was hardly tuned from it
Card = dict[str, Any]


def merge(
    output: str,
    *,
    base: str,
    models: Sequence[Any],
    method: str = "lors",
    options: Mapping[str, Any] | None = None,
    rules: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    align: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Card:
    """Merges, and writes `output` (a safetensors file; of Hugging Face folders a folder) and the card beside it.

    Args:
      base ... align: see `recipe`. With `align`, experts of the models are put in the order of the base's first.

    Raises MergeError (also CheckpointError and InteropError), in one line, before anything is in `output`'s place.
    """
    given = {"base": base, "models": models, "method": method, "options": options, "rules": rules}
    parsed = recipes.parse({**given, "seed": seed, "align": align})
    check_free(output, overwrite, parsed.inputs())
    run = Merge(parsed)
    for said in run.unweighted() if progress else ():
        print(said, file=sys.stderr)
    if Path(output).exists() and isinstance(run.base, HuggingFace):
        raise MergeError(f"{output}: is a file, and a folder is to be written; remove it")
    card = run.card(given | {"seed": seed, "align": align})
    run.base.write(
        Path(output), run.dtypes, run.parts(progress), {"method": method, "seed": seed, "models": card["models"]}
    )
    return write_card(output, card)


def check_free(output: str, overwrite: bool, inputs: Sequence[str] = ()) -> None:
    """Raises MergeError where something is that may not be replaced; `inputs` (of run folders the model) never."""
    read = [path for given in inputs for path in (Path(given), Path(given) / "model.safetensors") if path.exists()]
    if Path(output).exists() and any(path.samefile(output) for path in read):
        raise MergeError(f"{output}: is an input of this merge; give another output")
    if Path(output).exists() and not overwrite:
        raise MergeError(f"{output}: is there already; remove it, or give another output")
    if Path(card_path(output)).exists() and not overwrite:
        raise MergeError(f"{card_path(output)}: is there already; remove it, or give another output")
    if Path(output).is_dir():
        raise MergeError(f"{output}: is a folder, which is not overwritten; remove it")


def card_path(output: str) -> Path:
    return Path(f"{output.rstrip('/')}.card.json")


def write_card(output: str, card: Card) -> Card:
    """Beside a model that is written; returned with the model's hash, this version and the date."""
    date = datetime.date.today().isoformat()
    card = card | {"moe_jax": __version__, "date": date, "output": open_model(output).digest()}
    write_text(card_path(output), json.dumps(card, indent=1) + "\n")
    return card


def batched(things: Iterable[Any], size: int) -> Iterator[list[Any]]:
    things = iter(things)
    while some := list(itertools.islice(things, size)):
        yield some


class Cosines:
    """Of models' matrices to those of `base`, added up as they are read."""

    def __init__(self, base: str):
        self._base = base
        self._products: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))

    def add(self, path: str, x: np.ndarray, base: np.ndarray) -> None:
        self._products[path] += [float(np.vdot(a, b)) for a, b in ((x, base), (x, x), (base, base))]

    def check(self, mend: str) -> None:
        """Raises MergeError, saying how to `mend` it, for a model that is hardly tuned from the base."""
        for path, (both, own, bases) in self._products.items():
            cosine = both / max(np.sqrt(own * bases), 1e-30)
            if own and cosine < UNRELATED:
                raise MergeError(
                    f"{path}: its matrices have a cosine of {cosine:.2f} to those of {self._base}: "
                    f"it was not tuned from that base; {mend}"
                )


class Merge:
    """A recipe with its models opened and checked against each other.

    Raises MergeError for models that do not fit, and for patterns that match no path.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.base = open_model(recipe.base)
        self.models: dict[str, Model] = {}
        for path in recipe.stage.paths():
            if path not in self.models:
                self.models[path] = open_model(path)
                check_alike(self.base, self.models[path])
        # Rounded no further than what is merged.
        opened = (self.base, *self.models.values())
        self.dtypes = {n: functools.reduce(jnp.promote_types, (m.dtypes[n] for m in opened)) for n in self.base.shapes}
        self.statistics = {
            part.statistics: _statistics(
                part.statistics, self.base, self.models[part.source] if isinstance(part.source, str) else None
            )
            for stage in recipe.stage.stages()
            for part in stage.models
            if part.statistics
        }
        for stage in recipe.stage.stages():
            self._check(stage)
        self._digests = {path: model.digest() for path, model in self.models.items()}
        if recipe.align:
            for model in self.models.values():
                model.order = orders(self.base, model)
        for stage in recipe.stage.stages():
            self._check_kinds(stage)
            self._check_weights(stage)
        self._cosines = Cosines(self.base.path)
        self._rooms: dict[int, np.ndarray] = {}

    def _check(self, stage: Stage) -> None:
        patterns = [rule.match for rule in stage.rules] + [p for part in stage.models for p in part.weight.patterns()]
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in self.base.shapes):
                raise MergeError(
                    f"the pattern {pattern!r} matches no path of {self.base.path}, such as {_some(self.base)}"
                )
        for name, chosen in [(stage.name, stage.method), *((rule.name, rule.method) for rule in stage.rules)]:
            if chosen is None or not chosen.statistics:
                continue
            for part in stage.models:
                if part.statistics is None:
                    raise MergeError(
                        f"{name} weighs by statistics, and {part.said} has none: make them with moe-jax statistics"
                    )
                kind = self.statistics[part.statistics].meta.get("statistics")
                if kind != chosen.statistics:
                    raise MergeError(f"{part.statistics}: holds {kind} statistics, {name} needs {chosen.statistics}")

    def _check_kinds(self, stage: Stage) -> None:
        """Raises MergeError for a method of some matrices that has none of them: all would be merged by its `rest`."""
        asked, met = set(), set()
        for name in self.base.shapes:
            for site in itertools.islice(self.base.sites(name), 1):
                label, chosen = stage.rule(site)
                asked.add(label if chosen is not None and chosen.matrices else None)
                met.add(label if chosen is not None and chosen.fits(name, site.matrix) else None)
        for label in asked - met - {None}:
            raise MergeError(
                f"{label} is for matrices of attention and MLP, which no path of {self.base.path} speaks of "
                f"(such as {_some(self.base)}); take another method"
            )

    def _check_weights(self, stage: Stage) -> None:
        """Raises MergeError where a mean has a negative weight: what divides by the sum of both signs is anything."""
        negative = [part for part in stage.models if part.weight.has_negative()]
        for name, part in itertools.product(self.base.shapes, negative):
            for site in self.base.sites(name):
                label, chosen = stage.rule(site)
                weight = part.weight.at(site)
                if chosen is None or weight >= 0 or not chosen.here(name, site.matrix).is_mean:
                    continue
                raise MergeError(
                    f"{part.said}: its weight is {weight:g} for {name}, which is a mean, of weights >= 0, by {label}; "
                    "take a method that sums, such as task_arithmetic"
                )

    def unweighted(self) -> Iterator[str]:
        """A line for each model whose weights by path leave arrays out."""
        for stage in self.recipe.stage.stages():
            for part in stage.models:
                if left := [name for name in self.base.shapes if not part.weight.knows(name)]:
                    yield (
                        f"{part.said}: its weights match no path of {len(left)} of {len(self.base.shapes)} arrays, "
                        f"such as {left[0]}: it adds nothing to those; "
                        '{match: "", weight: ...} at the end is for all others'
                    )

    def parts(self, progress: bool = True) -> Iterator[np.ndarray]:
        """The merged arrays in the order of the base's, a matrix after another, in its dtypes."""
        sites = [site for name in self.base.shapes for site in self.base.sites(name)]
        with tqdm(total=len(sites), desc="merging", unit="array", disable=None if progress else True) as bar:
            for (dtype, *_), group in itertools.groupby(sites, self._kind):
                for some in batched(group, jax.device_count()):
                    if self.recipe.stage.rule(some[0])[1] is None:  # to the bit, whatever the models have
                        yield from (self.base.slice(site.name, site.index).astype(dtype) for site in some)
                    elif jnp.issubdtype(dtype, jnp.floating):
                        yield self._merged(some, dtype)
                    else:
                        yield from (self._kept(site) for site in some)
                    bar.update(len(some))
        self._cosines.check("name the base that it was tuned from")

    def _kind(self, site: Site) -> tuple[np.dtype, Any, Any, Any]:
        """What neighbours have in common that are merged side by side: parts of one leaf, or leaves of one shape that
        are merged alike (but for statistics, which some may lack)."""
        chosen = [stage.rule(site)[1] for stage in self.recipe.stage.stages()]
        alike = [None if one is None else (one, one.fits(site.name, site.matrix)) for one in chosen]
        shape = self.base.shapes[site.name][len(site.index) :]
        return self.dtypes[site.name], shape, alike, site.name if self.statistics else None

    def _kept(self, site: Site) -> np.ndarray:
        """What is no floating-point array, such as a counter. Raises MergeError where models have another."""
        x = self.base.slice(site.name, site.index)
        for path, model in self.models.items():
            if not np.array_equal(x, model.slice(site.name, site.index)):
                raise MergeError(
                    f"{path}: {site.name} holds other whole numbers than {self.base.path}, which cannot be merged; "
                    "if they are quantised weights, take the folders of the unquantised models"
                )
        return x.astype(self.dtypes[site.name])

    def _merged(self, sites: Sequence[Site], dtype: np.dtype) -> np.ndarray:
        """The arrays at sites of one kind, side by side on the devices."""
        base_Sx = _stacked([self.base.read(site) for site in sites])
        out = self._delta(self.recipe.stage, sites, base_Sx, ())
        np.add(base_Sx, out, out=out)
        with np.errstate(over="ignore"):  # of float16: it is said below
            out = out.astype(dtype, copy=False)
        if not np.isfinite(out).all():
            raise MergeError(
                f"{sites[0].name}: merging made numbers beyond {dtype}; lower the scale, or look at weights"
            )
        return out

    def _delta(self, stage: Stage, sites: Sequence[Site], base_Sx: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
        _, chosen = stage.rule(sites[0])
        if chosen is None:  # a rule of an inner stage
            return np.zeros_like(base_Sx)
        fits = chosen.fits(sites[0].name, sites[0].matrix)
        deltas_MxSx = self._room(len(at), (len(stage.models), *base_Sx.shape))
        statistics: list[np.ndarray] = []
        for i, part in enumerate(stage.models):
            delta_Sx = deltas_MxSx[i]
            if isinstance(part.source, Stage):
                delta_Sx[...] = self._delta(part.source, sites, base_Sx, (*at, i))
            else:
                self._read(part.source, sites, base_Sx, delta_Sx)
            if fits and chosen.statistics and (about := self._statistic(part, sites)) is not None:
                statistics.append(about)
        weight_SxM = np.array([[part.weight.at(site) for part in stage.models] for site in sites], np.float32)
        keys_SxM = jnp.stack([jnp.stack([self._key(p.source, site, at) for p in stage.models]) for site in sites])
        known = statistics if len(statistics) == len(stage.models) else None
        return _apply(chosen.here(sites[0].name, sites[0].matrix), deltas_MxSx, weight_SxM, keys_SxM, base_Sx, known)

    def _room(self, depth: int, shape: tuple[int, ...]) -> np.ndarray:
        """Where a stage's deltas lie: where those of the site before it lay, if they were as many. XLA lets go of an
        array that it took as it is (`_there`) a moment after it has computed: new ones would lie beside those."""
        if depth not in self._rooms or self._rooms[depth].shape != shape:
            self._rooms.pop(depth, None)
            self._rooms[depth] = _aligned(shape)
        return self._rooms[depth]

    def _read(self, path: str, sites: Sequence[Site], base_Sx: np.ndarray, out_Sx: np.ndarray) -> None:
        """A model's deltas."""
        for i, site in enumerate(sites):
            x, base = self.models[path].read(site), base_Sx[i]
            if site.matrix:
                self._cosines.add(path, x, base)
            np.subtract(x, base, out=out_Sx[i, ...])

    def _statistic(self, part: Part, sites: Sequence[Site]) -> np.ndarray | None:
        if part.statistics is None or sites[0].name not in self.statistics[part.statistics].shapes:
            return None
        source = self.statistics[part.statistics]
        model = self.models[part.source] if isinstance(part.source, str) else self.base
        found = _stacked([model.ordered(source.slice, site) for site in sites])
        if not np.isfinite(found).all():
            raise MergeError(f"{part.statistics}: {sites[0].name} holds a number that is not finite; make it again")
        return found

    def _key(self, source: str | Stage, site: Site, at: tuple[int, ...]) -> Array:
        """Of the model itself, not of its place in the list: in another order it merges to the same."""
        who = self._digests[source] if isinstance(source, str) else "+".join(self._digests[p] for p in source.paths())
        text = f"{who} {site.name} {site.index} {len(at)}"
        return jax.random.fold_in(jax.random.key(self.recipe.seed), zlib.crc32(text.encode()))

    def card(self, given: Mapping[str, Any]) -> Card:
        """What is merged how, resolved: for each group of paths that is merged alike, its method and weights."""

        def resolved(stage: Stage) -> list[dict[str, Any]]:
            groups: dict[str, dict[str, Any]] = {}
            for name in self.base.shapes:
                sites = list(self.base.sites(name))
                label, chosen = stage.rule(sites[0])
                lacks = (
                    chosen is not None
                    and chosen.statistics
                    and any(
                        p.statistics is None or name not in self.statistics[p.statistics].shapes for p in stage.models
                    )
                )
                weights = [[round(p.weight.at(site), 6) for p in stage.models] for site in sites]
                weights = weights[:1] if all(w == weights[0] for w in weights) else weights
                how = label
                if chosen is not None and not chosen.fits(name, sites[0].matrix):
                    how = f"{label}: {chosen.rest} of whole deltas"
                elif lacks:
                    how = f"{label}: mean, without statistics"
                group = groups.setdefault(json.dumps([how, weights]), {"method": how, "weights": weights, "paths": []})
                group["paths"].append(name)
            return list(groups.values())

        def method_of(chosen: Method, models: int) -> dict[str, Any]:
            return {"paper": chosen.paper, "options": chosen.options() | {"scale": chosen.factor(models)}}

        stages = self.recipe.stage.stages()
        return {
            "recipe": json.loads(json.dumps(given, default=_plain)),
            "base": {"path": self.base.path, "sha256": self.base.digest()},
            "models": [{"path": path, "sha256": self._digests[path]} for path in self.models],
            "statistics": [{"path": path, "sha256": digest([s.path])} for path, s in self.statistics.items()],
            "stages": [
                {
                    "models": [p.source if isinstance(p.source, str) else "a stage" for p in stage.models],
                    "methods": {
                        name: method_of(chosen, len(stage.models))
                        for name, chosen in [(stage.name, stage.method), *((r.name, r.method) for r in stage.rules)]
                        if chosen
                    },
                    "arrays": resolved(stage),
                }
                for stage in stages
            ],
        }


def _plain(x: Any) -> Any:
    return dict(x) if isinstance(x, Mapping) else list(x)


def _some(model: Model) -> str:
    return ", ".join(sorted(model.shapes)[:3])


def _statistics(path: str, base: Model, of: Model | None) -> checkpoint.Source:
    """Raises MergeError for those of another model than the one beside which they are named (None: a stage)."""
    source = checkpoint.Source(path)
    kind = source.meta.get("statistics")
    if kind is None:
        raise MergeError(f"{path}: holds no statistics; make them with moe-jax statistics")
    own = source.meta.get("sha256")
    if own and of is not None and own != of.digest():
        was = source.meta.get("of")
        raise MergeError(f"{path}: holds statistics of {was} as it was, not of {of.path}; make them again")
    for name, shape in source.shapes.items():
        if name not in base.shapes:
            raise MergeError(f"{path}: is about {name}, which {base.path} does not have")
        whole = base.shapes[name]
        expected = whole if kind == "fisher" else (*whole[:-2], whole[-2], whole[-2])
        if shape != expected:
            raise MergeError(f"{path}: {name} is {shape}, for {base.path} it must be {expected}; make it again")
    return source


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Without a copy of what is alone: it may be a file's, of which memory has no more than is looked at."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Empty float32 that begins where XLA's own arrays may: `_there` then needs no copy of it."""
    size, step = math.prod(shape), 64 // 4
    room = np.empty(size + step, np.float32)
    start = -(room.ctypes.data // 4) % step
    return room[start : start + size].reshape(shape)


def _there(x: Any) -> Array:
    """An array where it is, if it is whole and aligned: to be computed with before it is written to again."""
    return jax.device_put(x, may_alias=True)


BLOCK = 1 << 20  # entries that are combined at once, where a method sees each by itself


def _apply(
    method: Method,
    deltas_MxSx: np.ndarray,
    weight_SxM: np.ndarray,
    keys_SxM: Array,
    base_Sx: np.ndarray,
    statistics: Sequence[np.ndarray] | None,
) -> np.ndarray:
    """The method at each of S sites: one after another on one device, side by side on several. `deltas_MxSx` becomes
    sparse in its place: what a merge holds at its peak is these."""
    sites = len(base_Sx)
    if min(sites, jax.device_count()) > 1:
        mesh = sharding.make_mesh()
        missing = -sites % jax.device_count()

        def spread(x: Any) -> Array:  # the last site again where devices are left over
            if missing and isinstance(x, np.ndarray):
                x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
            elif missing:  # keys
                x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
            return jax.device_put(x, sharding.batch_sharding(mesh))

        known = statistics and list(statistics)
        arguments = jax.tree.map(spread, (list(deltas_MxSx), weight_SxM, keys_SxM, base_Sx, known))
        return np.array(_side_by_side(method)(*arguments))[:sites]
    out_Sx = np.empty(base_Sx.shape, np.float32)
    for i in range(sites):
        if method.sparsify is not None:
            for delta_Sx, key in zip(deltas_MxSx, keys_SxM[i], strict=True):
                delta_Sx[i] = _compiled(method.sparsify)(_there(delta_Sx[i]), key)
        known = None if statistics is None else [s[i] for s in statistics]
        _combined(method, deltas_MxSx[:, i], weight_SxM[i], base_Sx[i], known, out_Sx[i, ...])
    return out_Sx


def _combined(
    method: Method,
    deltas_Mx: np.ndarray,
    weight_M: np.ndarray,
    base: np.ndarray,
    statistics: Sequence[np.ndarray] | None,
    out: np.ndarray,
) -> None:
    """Writes into `out` what a method makes of sparse deltas at a site."""
    parts: Iterable[Any] = [(deltas_Mx, base, statistics, out)]
    if method.pointwise:
        flat = (deltas_Mx.reshape(len(deltas_Mx), -1), *jax.tree.map(np.ravel, (base, statistics)), out.reshape(-1))
        starts = range(0, out.size, BLOCK)
        parts = (jax.tree.map(lambda x, at=at: x[..., at : at + BLOCK], flat) for at in starts)
    for some_Mx, own_base, known, into in parts:
        some_Mx = _there(some_Mx)
        if method.consensus is not None:
            some_Mx = _compiled(method.consensus)(some_Mx, weight_M)
        into[...] = _compiled(method.combine)(some_Mx, weight_M, own_base, known)
    out *= method.factor(len(deltas_Mx))


def _compiled(step: Callable[..., Array]) -> Callable[..., Array]:
    """Once for a function and its options, whatever method they are of: a search over scales compiles nothing anew."""
    return _program(getattr(step, "func", step), tuple(sorted(getattr(step, "keywords", {}).items())))


@functools.cache
def _program(step: Callable[..., Array], options: tuple[tuple[str, Any], ...]) -> Callable[..., Array]:
    return jax.jit(exact(functools.partial(step, **dict(options))))


@functools.cache
def _side_by_side(method: Method) -> Callable[..., Array]:
    def one(deltas, weight_M, keys_M, base, statistics):
        return method(deltas, weight_M, [keys_M[i] for i in range(len(deltas))], base, statistics)

    return jax.jit(exact(jax.vmap(one)))


def exact(step: Callable[..., Array]) -> Callable[..., Array]:
    """With products of float32 in float32 on accelerators too, whose default is faster and some 1e-3 off."""

    def run(*arguments: Any) -> Array:
        with jax.default_matmul_precision("highest"):
            return step(*arguments)

    return run

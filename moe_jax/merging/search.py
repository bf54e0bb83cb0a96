"""Which options of a method merge best, by the loss on validation data: a grid, or a search by Optuna (Akiba et al.
2019). Every trial is one line of a file, so that a search goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moe_jax import checkpoint, describe, tree, xla
from moe_jax.data import Dataset
from moe_jax.merging import merge as merging
from moe_jax.merging import recipe as recipes
from moe_jax.merging.methods import WHOLE, method
from moe_jax.merging.models import MergeError, digest, open_data, open_model
from moe_jax.moe.routers import MAX_TASKS
from moe_jax.partfile import write_text
from moe_jax.types import Metrics

Space = Mapping[str, Sequence[Any] | tuple[float, float]]  # option -> values to try, or a range to search in


@dataclasses.dataclass(frozen=True)
class Found:
    """`rows`: options and loss of each trial. `options`, `loss`: the best."""

    options: dict[str, Any]
    loss: float
    rows: list[dict[str, Any]]


def search(
    folder: str,
    *,
    recipe: Mapping[str, Any],
    space: Space,
    valid: str,
    trials: int | None = None,
    rows: int = 256,
    seed: int = 0,
    loss: Callable[[str], float] | None = None,
    progress: bool = True,
) -> Found:
    """Merges by `recipe` with the options of each trial, and keeps the trials in `folder`/trials.jsonl.

    Args:
      space: lists of values, of which every combination is tried; or pairs (low, high), searched by Optuna's TPE.
      valid: prepared rows, of which `rows` are read.  loss: of a checkpoint, instead of `validation_loss` of these.
      trials: of a search over ranges (default: 20).

    Raises MergeError for a space of both kinds, for a folder of another search or of anything else, and where no trial
    has a finite loss.
    """
    if trials is not None and trials < 1:
        raise MergeError(f"a search of {trials} trials finds nothing; give 1 or more")
    if not space or not all(space.values()):
        raise MergeError("a search needs an option with values to try, or a range")
    ranges = [isinstance(values, tuple) for values in space.values()]
    if any(ranges) and not all(ranges):
        raise MergeError("a search has lists of values, or ranges, not both")
    if odd := [values for values in space.values() if isinstance(values, tuple) and len(values) != 2]:
        raise MergeError(f"a range is a pair (low, high), not {odd[0]}; values to try are a list")
    parsed = recipes.parse(dict(recipe))
    for options in itertools.product(*space.values()):
        method(recipe.get("method", "lors"), dict(zip(space, options, strict=True)))
    if loss is None:
        loss = Loss(valid, rows)
        data = loss.opened(parsed.base, checkpoint.Source(parsed.base).meta)  # what it cannot read, before the work
        if data.split == "test":
            raise MergeError(f"{valid}: was prepared of test data, by which nothing is chosen; give validation data")
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    asked = {"recipe": recipe, "space": space, "valid": valid, "rows": rows, "seed": seed}
    asked["kind"] = "ranges" if all(ranges) else "values"
    asked["statistics"] = {p: digest([checkpoint.Source(p).path]) for p in parsed.stage.statistics()}
    asked["models"] = {path: open_model(path).digest() for path in (parsed.base, *parsed.stage.paths())}
    about = json.loads(json.dumps(asked, default=dict))
    _same_search(where, about)
    done = [json.loads(line) for line in _lines(where / "trials.jsonl")]
    if all(ranges):
        proposals = _searched(space, done, trials or 20, seed)
        size = trials or 20
    else:
        grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        tried = [row["options"] for row in done]
        proposals, size = iter([options for options in grid if options not in tried]), len(grid)
    made = where / "trial"
    with tqdm(total=size, initial=len(done), desc="trials", disable=None if progress else True) as bar:
        for options in proposals:
            _remove(made)
            given: dict[str, Any] = dict(recipe) | {"options": dict(recipe.get("options") or {}) | options}
            merging.merge(str(made), **given, progress=False)
            found = loss(str(made))
            done.append({"options": options, "loss": found if np.isfinite(found) else None})
            write_text(where / "trials.jsonl", "".join(json.dumps(row) + "\n" for row in done))
            bar.set_postfix(best=f"{min(map(_loss, done)):.4f}")
            bar.update()
    _remove(made)
    best = min(done, key=_loss)
    if best["loss"] is None:
        raise MergeError(f"{folder}: no trial has a finite loss; look at {where / 'trials.jsonl'}")
    return Found(best["options"], best["loss"], done)


def _loss(row: Mapping[str, Any]) -> float:
    return np.inf if row["loss"] is None else row["loss"]


class Loss:
    """Mean over families of the nll a token, of a checkpoint on prepared rows: families count alike. Compiled
    once for a kind of model and a shape of batch."""

    def __init__(self, data: str, rows: int = 256, batch_size: int = 16):
        self.data, self.rows, self.batch_size = data, rows, min(batch_size, rows)
        self._opened: dict[tuple[str | None, str | None], Dataset] = {}

    def __call__(self, path: str) -> float:
        return float(np.mean(list(self.by_family(path).values())))

    def opened(self, path: str, meta: Mapping[str, Any]) -> Dataset:
        """The data as the model of a checkpoint reads them. Raises MergeError where it cannot."""
        reads = ((meta.get("model") or {}).get("class"), meta.get("tokeniser"))
        if reads not in self._opened:
            self._opened[reads] = open_data(path, meta, self.data)
        return self._opened[reads]

    def by_family(self, path: str) -> dict[str, float]:
        """family -> nll a token (of a recogniser: its loss an utterance).

        Raises MergeError for data that the model does not read.
        """
        params, meta = checkpoint.read_safetensors(path)
        data = self.opened(path, meta)
        program = _program(json.dumps(meta["model"], sort_keys=True), data.meta["max_targets"])
        nll, weight = np.zeros(MAX_TASKS), np.zeros(MAX_TASKS)
        for batch in data.sample(self.rows, self.batch_size):
            found = program(params, batch)
            nll, weight = (
                nll + np.asarray(found["nll_T"], np.float64),
                weight + np.asarray(found["weight_T"], np.float64),
            )
        names = {number: name for name, number in data.meta["families"].items()}
        return {names[i]: float(nll[i] / weight[i]) for i in np.flatnonzero(weight)}


def _searched(space: Space, done: Sequence[Mapping[str, Any]], trials: int, seed: int):
    """Options of further trials, each a function of the trials before it and the seed: a search that was stopped goes
    on as if it had not been. Raises ModuleNotFoundError, with what to install, without Optuna."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a search over ranges needs Optuna: pip install 'moe_jax[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds: dict[bool, Any] = {True: optuna.distributions.IntDistribution, False: optuna.distributions.FloatDistribution}
    axes = {name: kinds[name in WHOLE](low=min(ends), high=max(ends)) for name, ends in space.items()}
    while len(done) < trials:
        sampler = optuna.samplers.TPESampler(seed=seed + len(done))
        study = optuna.create_study(sampler=sampler)
        for row in done:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(row["options"]),
                    distributions=axes,
                    value=row["loss"],
                    state=optuna.trial.TrialState.FAIL if row["loss"] is None else optuna.trial.TrialState.COMPLETE,
                )
            )
        yield study.ask(axes).params


@functools.cache
def _program(model: str, max_targets: int) -> Callable[[dict[str, jax.Array], Any], Metrics]:
    """(parameters, batch) -> metrics, of the model that a description, as JSON, is of."""
    empty = describe.abstract(json.loads(model))
    step = lambda params, batch: tree.unflatten(empty, params).loss(batch, max_targets=max_targets)[1]  # noqa: E731
    return jax.jit(step, compiler_options=xla.options())


def _same_search(folder: Path, about: Mapping[str, Any]) -> None:
    """Makes an empty folder, or one of a search without a trial, this search's. Raises MergeError for another's."""
    path = folder / "search.json"
    if not path.exists() and any(folder.iterdir()):
        raise MergeError(f"{folder}: holds something other than a search; remove it, or give another output")
    if path.exists() and json.loads(path.read_text("utf-8")) == about:
        return
    if _lines(folder / "trials.jsonl"):
        raise MergeError(f"{folder}: holds another search; remove it, or give another output")
    write_text(path, json.dumps(about, indent=1))


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.exists() else []


def _remove(made: Path) -> None:
    """A trial's checkpoint and card."""
    for path in (made, Path(merging.card_path(str(made)))):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

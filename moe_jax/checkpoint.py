"""Checkpoints: flat tables path -> array on disk, and the rules that start one model from another.

A run keeps Orbax steps (parameters, optimiser, position in the data, model description as separate items; the latest
and the best); a model to ship is one safetensors file. No pickle anywhere, and no config found beside a checkpoint is
ever executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from safetensors import SafetensorError, safe_open

from moe_jax import hosts

Table = dict[str, Any]


class CheckpointError(ValueError):
    """One line: what, where, how to mend it."""


class Damaged(CheckpointError):
    """A step that the disk did not keep, as against one of another model."""


def _dots(table: Mapping[str, Any]) -> Table:
    return {path.replace("/", "."): leaf for path, leaf in table.items()}


def _slashes(table: Mapping[str, Any]) -> Table:
    return {path.replace(".", "/"): leaf for path, leaf in table.items()}


def _shapes(table: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(table)
    return {"/".join(str(k.key) for k in path).replace(".", "/"): tuple(leaf.shape) for path, leaf in leaves}


# What the bytes of a file system that is not a disk say instead of an error number.
STATUS = {
    "RESOURCE_EXHAUSTED": errno.ENOMEM,
    "PERMISSION_DENIED": errno.EACCES,
    "UNAUTHENTICATED": errno.EACCES,
    "UNAVAILABLE": errno.EAGAIN,
    "ABORTED": errno.EAGAIN,
    "DEADLINE_EXCEEDED": errno.ETIMEDOUT,
}


def _number(error: BaseException) -> int | None:
    """The system's number of an error, which TensorStore puts into words; None where it has none."""
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return int(found[1])
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if found := re.search(rf"\b({'|'.join(STATUS)})\b", str(error)):
        return STATUS[found[1]]
    return getattr(error, "errno", None)


def _refused(error: BaseException, where: str) -> OSError | None:
    """What the system would not do, in one line, which says nothing of the bytes that are there: a disk that does not
    answer, no right to read, no memory. None where bytes are missing or make no sense."""
    number = _number(error)
    if number in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return None
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return OSError(number, f"{os.strerror(number)} ({said}); the checkpoint is as it was", where)


@contextlib.contextmanager
def _writing(folder: Path) -> Generator[None]:
    """Says in one line what the system refused: Orbax writes in threads, and what they raise is long."""
    try:
        yield
    except (ValueError, OSError) as error:
        number = _number(error)
        if number is None:
            raise
        if number in hosts.TRANSIENT:
            raise OSError(number, f"{os.strerror(number)}; older checkpoints are whole", str(folder)) from error
        raise CheckpointError(
            f"{folder}: {os.strerror(number)}; older checkpoints are whole: mend this, and the same command goes on"
        ) from error


def _without_traceback(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of an error in its threads, often twice; the next call raises it anyway. And it warns of
    a step without a validation loss, which is meant."""
    return not record.exc_info and "did not provide metrics" not in record.getMessage()


class Run:
    """The Orbax steps of one training run; keeps the latest and the best (lowest `valid/loss`)."""

    def __init__(self, folder: Path | str, *, keep_latest: int = 2, keep_best: int = 1):
        best = lambda metrics: metrics["valid/loss"]  # noqa: E731
        self.folder = Path(folder).resolve() / "checkpoints"
        logging.getLogger("absl").addFilter(_without_traceback)
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(
                    [
                        LatestN(keep_latest),
                        BestN(get_metric_fn=best, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False),
                    ]
                ),
                best_fn=best,
                best_mode="min",
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_names=("params", "opt", "meta"),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """The newest first."""
        return sorted(self.manager.all_steps(), reverse=True)

    def set_aside(self, step: int) -> Path:
        """Moves a damaged step out of the way, and returns where it is. Of several hosts any may do it, and another may
        have done it already."""
        aside = self.folder.with_name("checkpoints.damaged") / str(step)
        aside.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / str(step)).stat()
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        self.manager.reload()
        return aside

    def best(self) -> int | None:
        return self.manager.best_step() or self.latest()

    def writing(self) -> bool:
        """Whether a step is still on its way to the disk."""
        return self.manager.is_saving_in_progress()

    def validated(self, step: int) -> bool:
        """Whether it was saved with a validation loss."""
        return self.manager.metrics(step) is not None

    def replace(self, step: int, *saved: Any) -> None:
        """`save` of a step that is there already."""
        self.manager.delete(step)
        self.save(step, *saved)

    def save(self, step: int, params: Table, opt: Any, meta: Mapping[str, Any], valid_loss: float | None) -> None:
        """Written in the background: an error of the disk is raised here or at the next `save` or `close`. Without a
        validation loss it is the latest step, never the best.

        Raises CheckpointError where the system cannot write, or when Orbax refuses the step (it exists already).
        """
        said = json.loads(json.dumps({**meta, "digests": digests({"params": params, "opt": opt})}))
        with _writing(self.folder):
            saved = self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(_dots(params)),
                    opt=ocp.args.StandardSave({"leaves": dict(enumerate_leaves(opt))}),
                    meta=ocp.args.JsonSave({**said, "sha256": _sha256(said)}),
                ),
                metrics=None if valid_loss is None else {"valid/loss": float(valid_loss)},
            )
        if not saved:
            raise CheckpointError(f"{self.folder}/{step} exists already: choose another run folder")

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved with a step.

        Raises Damaged where it is missing, or another, and OSError where it cannot be read just now.
        """
        return {key: value for key, value in self._meta(step).items() if key != "digests"}

    def _meta(self, step: int) -> dict[str, Any]:
        try:
            meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            if meta.pop("sha256", None) in (None, _sha256(meta)):  # those of older versions have none
                return meta
            error = None
        except (ValueError, KeyError, OSError, AttributeError) as found:
            if refused := _refused(found, f"{self.folder}/{step}"):
                raise refused from found
            error = found
        raise Damaged(f"{self.folder}/{step}: meta is missing or damaged; remove this step") from error

    def params(self, step: int, like: Table) -> Table:
        """Parameters in the shapes and shardings of `like` (arrays or ShapeDtypeStructs).

        Raises CheckpointError where they are of another model, Damaged where they are not what was saved, and OSError
        where they cannot be read just now.
        """
        return self._checked(step, "params", self._restore(step, "params", _dots(like), _slashes))

    def opt(self, step: int, like: Any) -> Any:
        leaves = dict(enumerate_leaves(like))
        back = self._restore(step, "opt", {"leaves": leaves}, lambda t: t["leaves"])
        return self._checked(step, "opt", jax.tree.unflatten(jax.tree.structure(like), [back[k] for k in leaves]))

    def _checked(self, step: int, item: str, table: Any) -> Any:
        """Raises Damaged where an array is not what was saved."""
        was = self._meta(step).get("digests", {}).get(item)
        now = digests({item: table})[item]
        if was is not None and was != now:
            which = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), 0)
            raise Damaged(f"{self.folder}/{step}: array {which} of {item} is not what was saved; remove this step")
        return table

    def _restore(self, step: int, item: str, like: Table, then) -> Any:
        try:
            out = self.manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))
        except Exception as error:  # what Orbax raises for bytes that cannot be read is no more special
            if refused := _refused(error, f"{self.folder}/{step}"):
                raise refused from error
            if isinstance(error, (RuntimeError, AssertionError)):  # of JAX, of other hosts: not of bytes
                raise
            if misfit := self._misfit(step, item, like):
                raise CheckpointError(
                    f"{self.folder}/{step}: {item} does not fit this model ({misfit}); "
                    "use the configuration that made the checkpoint, or another run folder"
                ) from error
            said = str(error).strip().splitlines()[0][:300]
            raise Damaged(f"{self.folder}/{step}: {item} cannot be read ({said}); remove this step") from error
        return then(out[item])

    def _misfit(self, step: int, item: str, like: Table) -> str | None:
        """The first array that differs: Orbax says that some do."""
        try:
            was, need = _shapes(self.manager.item_metadata(step)[item].tree), _shapes(like)
        except (ValueError, KeyError, AttributeError, FileNotFoundError):  # damaged, so that not even this can be read
            was = need = {}
        misfits = [
            f"{path} is {was.get(path, 'missing')} there, {need.get(path, 'missing')} in this model"
            for path in sorted(was | need)
            if was.get(path) != need.get(path)
        ]
        return misfits[0] if was and misfits else None

    def close(self) -> None:
        with _writing(self.folder):
            self.manager.wait_until_finished()
            self.manager.close()


def _sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def digests(items: Any) -> dict[str, list[int]]:
    """item -> a number of each of its arrays, in the order of its leaves: a sum of their bits, each times an odd number
    of its place. Of integers, so it is the same however the array lies on devices."""
    leaves = {name: [_words(x) for x in jax.tree.leaves(item)] for name, item in items.items()}
    return {name: [int(x) for x in jax.device_get(found)] for name, found in _sums(leaves).items()}


def _words(x: Any) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@jax.jit
def _sums(leaves: Any) -> Any:
    def total(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for dim in range(bits.ndim):
            place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(total, leaves)


def enumerate_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(f"{i:05d}", leaf) for i, leaf in enumerate(jax.tree.leaves(tree))]


# --- one file to ship -------------------------------------------------------------------------------------------------


def write_safetensors(path: Path | str, params: Table, meta: Mapping[str, Any], dtype: Any = None) -> None:
    """One file: arrays by path and JSON metadata; an array at a time, written aside, then renamed."""
    dtypes = {name: jnp.dtype(dtype or x.dtype) for name, x in params.items()}
    arrays = (cast(name, x, dtypes[name]) for name, x in params.items())
    shapes = {name: tuple(x.shape) for name, x in params.items()}
    stream_safetensors(path, shapes, dtypes, arrays, {"moe_jax": json.dumps(dict(meta))})


def describe_again(path: Path, meta: Mapping[str, Any]) -> None:
    """A file of `write_safetensors` with other metadata, its arrays copied as they are, in little memory."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header["__metadata__"]["moe_jax"] = json.dumps(dict(meta))
        with _aside(path) as out:
            out.write(_header(header))
            shutil.copyfileobj(file, out, 1 << 22)


def cast(name: str, x: Any, dtype: Any) -> np.ndarray:
    """Raises CheckpointError where that makes a number infinite."""
    x = np.asarray(x)
    with np.errstate(over="ignore"):
        y = x.astype(dtype, copy=False)
    if y.dtype != x.dtype and not np.isfinite(y).all() and np.isfinite(x).all():
        raise CheckpointError(f"{name} holds a number that {y.dtype} cannot hold; take --dtype bfloat16 or float32")
    return y


class Source(Mapping[str, jax.Array]):
    """The arrays of a safetensors file, or of a run folder's `model.safetensors`: each is read, as float32, when it is
    asked for. `meta` is its metadata.

    Raises CheckpointError for a file that is missing, torn or not ours.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
        try:
            self._file = safe_open(self.path, framework="flax")
            self.meta: dict[str, Any] = json.loads((self._file.metadata() or {}).get("moe_jax", "null"))
        except (OSError, SafetensorError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be read as safetensors ({error}); is the path right, the file whole?"
            ) from error
        if not isinstance(self.meta, dict):
            raise CheckpointError(f"{self.path}: has no moe_jax metadata; export it with `moe-jax export`")
        self._names = dict.fromkeys(self._file.keys())

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._names}

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        return dtypes(self._file)

    def slice(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        """Part `index` (of the leading dims) of an array, in its own dtype; nothing else of it is read."""
        return slice_of(self._file, name, index)

    def __getitem__(self, name: str) -> jax.Array:
        if name not in self._names:
            raise KeyError(name)
        return jnp.asarray(self._read(name), jnp.float32)

    def placed(self, name: str, where: Any) -> jax.Array:
        """`self[name]` laid out so; of it each device reads its own part, and no host more than its devices have."""
        part = lambda index: np.asarray(self._read(name, index), np.float32)  # noqa: E731
        return jax.make_array_from_callback(self.shapes[name], where, part)

    def _read(self, name: str, index: Any = None) -> jax.Array:
        try:
            return self._file.get_slice(name)[index] if index else self._file.get_tensor(name)
        except (SafetensorError, AttributeError) as error:  # a dtype that NumPy does not know
            raise CheckpointError(
                f"{self.path}: {name} cannot be read ({error}); export it in another dtype"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
}


def dtypes(file: Any) -> dict[str, np.dtype]:
    """name -> dtype of an opened safetensors file. Raises CheckpointError for one that no array here has."""
    found = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    for name, dtype in found.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{name} has the dtype {dtype}; known: {', '.join(DTYPES)}")
    return {name: jnp.dtype(DTYPES[dtype]) for name, dtype in found.items()}


def slice_of(file: Any, name: str, index: tuple[int, ...]) -> np.ndarray:
    """Part `index` (of the leading dims) of an array of an opened safetensors file."""
    with jax.enable_x64(True):  # else integers of 64 bits become 32
        return np.asarray(file.get_slice(name)[index] if index else file.get_tensor(name))


def stream_safetensors(
    path: Path | str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    parts: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file of arrays that are never all in memory: `parts` brings them in the order of `shapes`, each in
    as many pieces as it likes. Written aside, then renamed.

    Raises CheckpointError where the disk has no room, or `parts` brings less or more than `shapes` says.
    """
    path, names = Path(path), {np.dtype(jnp.dtype(ours)): theirs for theirs, ours in DTYPES.items()}
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, shape in shapes.items():
        offsets = [ends[name] - sizes[name], ends[name]]
        header[name] = {"dtype": names[dtypes[name]], "shape": list(shape), "data_offsets": offsets}
    text = _header(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    total, free = len(text) + sum(sizes.values()), shutil.disk_usage(path.parent).free
    if total > free:
        raise CheckpointError(f"{path}: needs {total / 1e9:.2f} GB, the disk has {free / 1e9:.2f}; make room")
    with _aside(path) as file:
        file.write(text)
        for part in parts:
            file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        if file.tell() != total:
            raise CheckpointError(f"{path}: {file.tell()} bytes were written where {total} belong")


def _header(header: Mapping[str, Any]) -> bytes:
    """What a safetensors file begins with."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that arrays of 8 bytes are aligned
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _aside(path: Path) -> Generator[BinaryIO]:
    """A file that takes the place of `path` once all is written. Raises CheckpointError where it cannot be."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
        os.replace(aside, path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; nothing was written") from None
    finally:
        aside.unlink(missing_ok=True)


def read_safetensors(path: Path | str) -> tuple[Table, dict[str, Any]]:
    """(float32 table, metadata) of a file or of a run folder. Raises CheckpointError as `Source` does."""
    source = Source(path)
    return dict(source), source.meta


# --- one model from another -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """Paths of the source that match `pattern` become `replacement`, changed by `op`:

    copy     as it is
    upcycle  repeated on a new expert axis (Komatsuzaki et al. 2022); `count` experts, each with Gaussian noise of
             `noise` times the standard deviation of its matrix (our choice; 0 is the paper's plain copy), by `seed`
    widen    the hidden dim repeated `count` times; with `down` scaled by 1 / count the function stays the same
    mix      one expert of each source, in their order, on a new expert axis (Sukhbaatar et al. 2024)
    average  the mean of all sources
    grow     more experts after those that there are: copies of the experts `like`

    times `factor`. With `layers`, the rule takes those of a stack of layers alone, and the next rule that matches has
    the others; with `more`, the next rule that matches has all of it too.
    """

    pattern: str
    replacement: str
    op: str = "copy"
    count: int = 1
    noise: float = 0.0
    seed: int = 0
    layers: tuple[int, ...] = ()
    factor: float = 1.0
    more: bool = False
    like: tuple[int, ...] = ()

    def __call__(self, path: str, sources: Sequence[jax.Array]) -> jax.Array:
        changed = self._changed(path, sources)
        return changed if self.factor == 1 else changed * self.factor

    def _changed(self, path: str, sources: Sequence[jax.Array]) -> jax.Array:
        if self.op == "mix":
            return jnp.stack(sources, axis=-3)
        if self.op == "average":
            mean = sources[0]
            for n, x in enumerate(sources[1:], 2):
                mean += (x - mean) / n  # of equal arrays this is each of them, to the bit
            return mean
        if len(sources) > 1:
            raise CheckpointError(f"{path}: the rule {self.op!r} takes one source, not {len(sources)}; mix or average")
        (x,) = sources
        if self.op == "copy":
            return x
        if self.op == "upcycle":
            y = jnp.repeat(x[..., None, :, :], self.count, axis=-3)
            if not self.noise:
                return y
            key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(path.encode()))
            size = self.noise * jnp.std(y, axis=(-2, -1), keepdims=True)
            return y + size * jax.random.normal(key, y.shape, y.dtype)
        if self.op == "widen":
            down = path.endswith("down")
            return jnp.concatenate([x / self.count if down else x] * self.count, axis=-2 if down else -1)
        if self.op == "grow":
            if not all(0 <= expert < x.shape[-3] for expert in self.like):
                raise CheckpointError(f"{path} has experts 0..{x.shape[-3] - 1}, not all of {[*self.like]}")
            return jnp.concatenate([x, x[..., np.array(self.like, int), :, :]], axis=-3)
        raise CheckpointError(f"unknown rule {self.op!r}; known: copy, upcycle, widen, mix, average, grow")


FFN, EXPERTS, SHARED = r"/ffn/(gate|up|down)$", r"/ffn/experts/\1", r"/ffn/shared/\1"
IN, OUT = r"/ffn/(gate|up)$", r"/ffn/(down)$"  # of its matrices those that read, and the one that writes


def upcycle(
    experts: int, noise: float = 0.0, seed: int = 0, dense_layers: Sequence[int] = (), shared: float | None = None
) -> tuple[Rule, ...]:
    """Dense -> MoE: every expert starts as the dense feed-forward layer (and `noise`), the router is fresh.

    Args:
      dense_layers: numbers of the layers that stay dense (as `Corrector.dense_layers` of the model has it).
      shared: of a layer with a shared expert (`MoeFfn.shared`), of as many units: it starts as the dense layer too, and
        gives this share of the dense layer's output (ours), the experts the rest.

    Raises ValueError for a share outside 0 to 1.
    """
    dense = [Rule(r"^blocks/", "dense_blocks/", layers=tuple(dense_layers))] if dense_layers else []
    made = Rule(FFN, EXPERTS, "upcycle", experts, noise, seed)
    if shared is None:
        return (*dense, made, Rule(r"^", "", "copy"))
    if not 0 <= shared <= 1:
        raise ValueError(f"the shared expert gives a share of 0 to 1 of the dense layer's output, not {shared}")
    beside = (Rule(IN, SHARED, more=True), Rule(OUT, SHARED, factor=shared, more=True))
    parted = (dataclasses.replace(made, pattern=IN), dataclasses.replace(made, pattern=OUT, factor=1 - shared))
    return (*dense, *beside, *parted, Rule(r"^", "", "copy"))


def widen(times: int) -> tuple[Rule, ...]:
    """Dense -> dense of `times` the hidden units: the control of equal active parameters for a top-`times` MoE."""
    return (Rule(r"(/ffn/(gate|up|down))$", r"\1", "widen", times), Rule(r"^", "", "copy"))


def grow(like: Sequence[int], pattern: str = r"/adapter/experts/") -> tuple[Rule, ...]:
    """Task adapters (or what else of experts `pattern` finds) for tasks that nobody thought of: after those that there
    are, copies of the adapters `like`, of the tasks that the new ones are nearest to (ours)."""
    return (Rule(f"({pattern})", r"\1", "grow", like=tuple(like)), Rule(r"^", "", "copy"))


def branch_train_mix() -> tuple[Rule, ...]:
    """Dense models -> MoE (BTX, Sukhbaatar et al. 2024): their feed-forward layers become its experts, in the order in
    which the models are named; all else is averaged; the router is fresh."""
    return (Rule(FFN, EXPERTS, "mix"), *average())


def average() -> tuple[Rule, ...]:
    """Models of one shape -> their mean: the merge of Branch-Train-Merge (Li et al. 2022), with equal weights (our
    choice; the paper also ensembles)."""
    return (Rule(r"^", "", "average"),)


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """How a leaf is made: of leaf `path` of each source (of its `layers` alone, if not None), by a rule."""

    path: str
    rule: Rule
    layers: np.ndarray | None
    dtype: Any

    def __call__(self, sources: Sequence[jax.Array]) -> jax.Array:
        parts = sources if self.layers is None else [x[self.layers] for x in sources]
        return self.rule(self.path, parts).astype(self.dtype)


def planned(
    target: Mapping[str, Any],
    sources: Sequence[Mapping[str, jax.Array]],
    rules: Sequence[Rule],
    fresh: Sequence[str] = (r"/router/",),
) -> dict[str, Move]:
    """How each leaf of `target` is made of the sources, of which no array is read: the work of `transplant`, that a
    caller can do a leaf at a time. Those that stay fresh have none. Raises CheckpointError as `transplant` does."""
    for i, other in enumerate(sources[1:], 2):
        if odd := sorted(set(other) ^ set(sources[0])):
            raise CheckpointError(f"source {i} and source 1 do not share {odd[0]}: they must be of one configuration")
    out: dict[str, Move] = {}
    origin: dict[str, str] = {}
    for path in sources[0]:
        if len(shapes := dict.fromkeys(map(functools.partial(_shape, path), sources))) > 1:
            raise CheckpointError(
                f"{path} is {' or '.join(map(str, shapes))} in the sources: they must be of one configuration"
            )
        (shape,) = shapes
        for rule, layers in _shares(path, shape, rules):
            name = re.sub(rule.pattern, rule.replacement, path, count=1)
            if (other := origin.setdefault(name, path)) != path:
                raise CheckpointError(f"{other} and {path} of the source both become {name}; mend the rules")
            if name not in target:
                raise CheckpointError(
                    f"{path} of the source becomes {name}, which this model does not have; mend the rules"
                )
            if name in out:
                raise CheckpointError(f"two rules make {name} of {path}; mend the rules")
            out[name] = Move(path, rule, layers, target[name].dtype)
            y = jax.eval_shape(out[name], [jax.ShapeDtypeStruct(shape, jnp.float32)] * len(sources))
            if y.shape != target[name].shape:
                raise CheckpointError(
                    f"{name}: the source gives {tuple(y.shape)}, this model needs {tuple(target[name].shape)}"
                )
    unfilled = [p for p in target if p not in out and not any(re.search(f, p) for f in fresh)]
    if unfilled:
        raise CheckpointError(f"nothing fills {unfilled[:5]}: add a rule, or name them in `fresh`")
    return {p: out[p] for p in target if p in out}


def transplant(
    target: Mapping[str, Any],
    sources: Sequence[Mapping[str, jax.Array]],
    rules: Sequence[Rule],
    fresh: Sequence[str] = (r"/router/",),
    where: Callable[[str, tuple[int, ...]], Any] | None = None,
) -> Table:
    """`target` with its arrays taken from one source or several, by the first rule that matches each of their paths.

    Every leaf is accounted for: raises CheckpointError for a source leaf that has no place of its own, a shape that
    differs, sources that differ from each other, or a target leaf that nothing filled and that does not match `fresh`
    (those keep their initial values; of the others only shape and dtype are looked at). All that is said before an
    array is read.

    Args:
      where: how an array of such a shape lies for a leaf of `target`. Then sources are files (`Source`), no device and
        no host reads more of them than its part, and what comes back is laid out so.
    """
    out: Table = {}
    for name, move in planned(target, sources, rules, fresh).items():
        if where is None:
            out[name] = move([source[move.path] for source in sources])
        else:
            shape = _shape(move.path, sources[0])
            parts = [s.placed(move.path, where(name, shape)) for s in sources if isinstance(s, Source)]
            out[name] = jax.jit(move, out_shardings=where(name, tuple(target[name].shape)))(parts)
    return {p: out.get(p, x) for p, x in target.items()}


def _shape(path: str, source: Mapping[str, Any]) -> tuple[int, ...]:
    return source.shapes[path] if isinstance(source, Source) else source[path].shape


def _shares(path: str, shape: tuple[int, ...], rules: Sequence[Rule]) -> Iterator[tuple[Rule, np.ndarray | None]]:
    """Which rule takes which layers of a leaf (None: all of it): the first that matches all, unless it is for some."""
    left: np.ndarray | None = None
    for rule in (*rules, Rule("^", "")):
        if not re.search(rule.pattern, path):
            continue
        if not rule.layers:
            yield rule, left
            if not rule.more:
                return
            continue
        left = np.arange(shape[0]) if left is None else left
        mine = np.isin(np.arange(len(left)), rule.layers)
        yield rule, left[mine]
        left = left[~mine]

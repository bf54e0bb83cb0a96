"""Prepared data: packed rows of tokens in a folder, read by memory map, without TensorFlow.

    meta.json        format, shapes, checksums, tokeniser, families, what was counted while preparing
    tokens.npy       [rows, length], uint16, or uint32 for a vocabulary of more than 65,536; 0 at padding
    roles.npy        uint8, 1 = read, 2 = write; 0 at padding
    tasks.npy        uint8, the family of each token; 0 at padding
    segments.npy     uint8, which example of the row, from 1; 0 at padding, and there alone
    tokeniser.model

A batch depends on (folder, seed, step, batch size) alone: a resumed run, or one on other machines, sees the
same rows.
"""

from __future__ import annotations

import abc
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import hosts
from moe_jax.packing import COLUMNS, Packable, Rows, pack, pack_sides, to_batch, to_pairs
from moe_jax.text.prompt import READ, WRITE
from moe_jax.text.tokeniser import Tokeniser
from moe_jax.types import Batch

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Dataset(abc.ABC):
    """A prepared folder, whatever it holds: what training, evaluation and merging read.

    Attributes:
      meta: its meta.json; at least rows, length, max_targets, families and tokeniser (a SHA-256).
      tokeniser: the one that made the ids.
    """

    folder: Path
    meta: Mapping[str, Any]
    tokeniser: Tokeniser

    @property
    def rows(self) -> int:
        return self.meta["rows"]

    @property
    def split(self) -> str | None:
        """What it was prepared of; None where that is not known."""
        return self.meta.get("split")

    @abc.abstractmethod
    def batch(self, step: int, *, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> Any:
        """This process's slice of the batch of `step`, a function of these arguments and the folder alone.

        Raises ValueError for a batch size that does not divide into the processes."""

    @abc.abstractmethod
    def rows_of(self, step: int, *, seed: int, batch_size: int) -> list[int]:
        """The rows of the whole batch of `step`: what it was, for whoever wants to look at it."""

    def sample(self, rows: int, batch_size: int) -> list[Any]:
        """The same batches at every call: of `rows` rows or of all there are, whole batches, at least one."""
        return [self.batch(i, seed=0, batch_size=batch_size) for i in range(Dataset.batches(self, rows, batch_size))]

    def batches(self, rows: int, batch_size: int) -> int:
        """How many batches validate: as many as `sample` has."""
        return max(1, min(rows, self.rows) // batch_size)


def misnumbered(families: Mapping[str, int], others: Mapping[str, int]) -> Iterator[str]:
    """Those of `others` that have another number in `families`, or whose number is another's there."""
    names = {number: name for name, number in families.items()}
    for name, number in others.items():
        if names.get(number, name) != name or families.get(name, number) != number:
            yield name


def share(batch_size: int, process_index: int, process_count: int) -> range:
    """The places in a batch that are this process's. Raises ValueError where they do not divide."""
    if batch_size % process_count:
        raise ValueError(f"batch size {batch_size} does not divide into {process_count} processes")
    own = batch_size // process_count
    return range(process_index * own, (process_index + 1) * own)


@dataclasses.dataclass(frozen=True)
class Prepared(Dataset):
    """Packed rows of tokens, checked and memory-mapped: `columns` are [rows, length]."""

    columns: Rows

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Prepared:
        """Raises ValueError, in one line, if anything is missing, damaged or of another version."""
        folder = Path(folder)
        meta = read_meta(folder, "prepared data", FORMAT, KINDS)
        tokeniser = read_tokeniser(folder, meta)
        shape = (meta["rows"], meta["length"])
        columns = {
            name: read_array(folder, name, dtype, shape, meta["sha256"].get(name, ""))
            for name, dtype in _dtypes(tokeniser).items()
        }
        return cls(folder, meta, tokeniser, columns)

    def batch(self, step: int, *, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """[batch_size / process_count, length] arrays.

        Steps walk through one permutation of the rows after another; a batch may span two of them.
        """
        own = share(batch_size, process_index, process_count)
        rows = self._at(step, seed, batch_size, own)
        return self.of({name: column[rows] for name, column in self.columns.items()})

    def rows_of(self, step: int, *, seed: int, batch_size: int) -> list[int]:
        return [int(row) for row in self._at(step, seed, batch_size, range(batch_size))]

    def _at(self, step: int, seed: int, batch_size: int, places: range) -> list[np.integer]:
        found = [divmod(step * batch_size + place, self.rows) for place in places]
        return [_permutation(self.rows, seed, epoch)[index] for epoch, index in found]

    def of(self, rows: Rows) -> Batch:
        """What a model reads of rows."""
        return to_batch(rows)


class Pairs(Prepared):
    """A prepared folder as an encoder and a decoder read it (`packing.to_pairs`)."""

    def of(self, rows: Rows) -> Batch:
        return to_pairs(rows, self._most_read, self.meta["max_targets"])

    @functools.cached_property
    def _most_read(self) -> int:
        """The most tokens that a row reads."""
        return int((self.columns["roles"] == READ).sum(1).max())


@functools.lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch. By raw Philox output, which numpy keeps the same over its versions."""
    return np.argsort(np.random.Philox(key=(seed, epoch)).random_raw(rows), kind="stable")


def write_prepared(
    folder: str | os.PathLike,
    examples: Iterable[Packable],
    *,
    length: int,
    tokeniser: Tokeniser,
    families: Mapping[str, int],
    skipped: Mapping[str, int] | None = None,
    sides: tuple[int, int] | None = None,
    **about: Any,
) -> Mapping[str, Any]:
    """Packs `examples` into a new prepared folder and returns its meta.

    Args:
      folder: must not exist; written aside and renamed when complete.
      examples: drawn once, packed as they come.
      length: tokens a row.
      tokeniser: the one that made the ids; a copy travels with the data.
      families: name -> id; every task id must be one of them.
      sides: tokens a row that are read and written, together `length`, where a row is for an encoder and a decoder.
      skipped: family -> examples left out, read after the last example (so a generator may count in it).
      about: more for `meta.json`, such as mixture, seed and layout.

    Raises ValueError if the folder exists, no example came, or an id is out of range.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder}: exists already; choose another folder, or remove this one")
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        tallies = {name: Counter(examples=0, tokens=0, read=0) for name in families}
        counted = _counted(examples, tokeniser.vocab_size, families, tallies)
        packed = pack_sides(counted, sides) if sides else pack(counted, length)
        rows, max_targets = _write_columns(aside, packed, _dtypes(tokeniser), length)
        if not rows:
            raise ValueError(f"{folder}: no example to write")
        for name, count in (skipped or {}).items():
            tallies[name]["skipped"] = count
        tokeniser.save(aside / "tokeniser.model")
        meta = {
            "format": FORMAT,
            "length": length,
            "rows": rows,
            "max_targets": max_targets,
            "longest_read": max(tally.pop("read") for tally in tallies.values()),
            "fill": sum(tally["tokens"] for tally in tallies.values()) / (rows * length),
            "tokeniser": tokeniser.sha256,
            "families": dict(families),
            "tasks": {name: dict(tally) for name, tally in tallies.items() if any(tally.values())},
            "sha256": {name: sha256(aside / f"{name}.npy") for name in COLUMNS},
            **({"sides": list(sides)} if sides else {}),
            **about,
        }
        (aside / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", "utf-8")
        _place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return meta


def _place(aside: Path, folder: Path) -> None:
    """Renames `aside`. Of two processes that made the same at once, the second finds it there.

    Raises ValueError where the other made something else.
    """
    try:
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        ours, theirs = (path / "meta.json" for path in (aside, folder))
        if not theirs.exists() or theirs.read_bytes() != ours.read_bytes():
            raise ValueError(f"{folder}: another process made something else there; choose another folder") from None


def _counted(
    examples: Iterable[Packable], vocab_size: int, families: Mapping[str, int], tallies: Mapping[str, Counter]
) -> Iterator[Packable]:
    """Passes examples on, checked and counted by family."""
    names = {number: name for name, number in families.items()}
    for example in examples:
        if example.task not in names:
            raise ValueError(f"unknown task id {example.task}; known: {dict(families)}")
        tokens = np.asarray(example.tokens)
        if not (tokens.size and tokens.min() >= 0 and tokens.max() < vocab_size):
            raise ValueError(f"token ids outside of [0, {vocab_size}) in an example of {names[example.task]}")
        tally = tallies[names[example.task]]
        tally["examples"] += 1
        tally["tokens"] += tokens.size
        tally["read"] = max(tally["read"], example.sides[0])
        yield example


def _dtypes(tokeniser: Tokeniser) -> dict[str, type[np.unsignedinteger]]:
    """The dtype of each column on disk."""
    return COLUMNS | {"tokens": np.uint16 if tokeniser.vocab_size <= 1 << 16 else np.uint32}


def _write_columns(
    folder: Path, rows: Iterable[Rows], dtypes: Mapping[str, type[np.unsignedinteger]], length: int
) -> tuple[int, int]:
    """Streams rows into `.npy` files. Returns the number of rows and the most targets in a row."""
    files = {name: (folder / f"{name}.npy").open("wb") for name in dtypes}
    count = max_targets = 0

    def write_headers() -> None:  # numpy pads headers so that the number of rows can grow in place
        for name, dtype in dtypes.items():
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": descr, "fortran_order": False, "shape": (count, length)}
            files[name].seek(0)
            np.lib.format.write_array_header_1_0(files[name], header)

    try:
        write_headers()
        for row in rows:
            for name, file in files.items():
                file.write(row[name].astype(dtypes[name]).tobytes())
            count += 1
            max_targets = max(max_targets, int((row["roles"] == WRITE).sum()))
        write_headers()
    finally:
        for file in files.values():
            file.close()
    return count, max_targets


def drawn(meta: Mapping[str, Any]) -> dict[str, float]:
    """family -> how often what there is of it was drawn, of those of which that is known."""
    sizes = meta.get("available") or {}
    tallies = meta.get("tasks", {}).items()
    return {name: (t["examples"] + t.get("skipped", 0)) / sizes[name] for name, t in tallies if sizes.get(name)}


def summary(meta: Mapping[str, Any]) -> str:
    """A table of what was drawn by family, and how often ("?" where it is not known how much there is)."""
    often = drawn(meta)
    total = sum(tally["examples"] for tally in meta["tasks"].values())
    width = max(10, *map(len, meta["tasks"]))
    lines = [f"{'task':{width}} {'examples':>9} {'share':>6} {'epochs':>7} {'tokens':>10} {'too long':>9}"]
    for family, tally in meta["tasks"].items():
        skipped = tally.get("skipped", 0)
        epochs = f"{often[family]:7.2f}" if family in often else f"{'?':>7}"
        share = tally["examples"] / total
        lines.append(
            f"{family:{width}} {tally['examples']:9,} {share:6.1%} {epochs} {tally['tokens']:10,} {skipped:9,}"
        )
    return "\n".join([*lines, f"{meta['rows']:,} rows of {meta['length']} tokens, {meta['fill']:.1%} full"])


KINDS = {"length": int, "rows": int, "max_targets": int, "tokeniser": str, "families": dict, "sha256": dict}


def read_meta(folder: Path, what: str, version: int, kinds: Mapping[str, type]) -> dict[str, Any]:
    """meta.json of a folder of `what`, which holds `kinds` (none of them 0 or empty).

    Raises ValueError, in one line, for what is missing, damaged or of another version.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror}); is this a prepared folder?") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON; prepare the folder again") from None
    if not isinstance(meta, dict) or meta.get("format") != version or meta.get("holds", what) != what:
        raise ValueError(f"{path}: not format {version} of {what}; prepare the folder again")
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind) or not meta[key] or (kind is int and meta[key] < 1):
            raise ValueError(f"{path}: not {what}: {key!r} is missing or wrong; prepare the folder again")
    return meta


def read_tokeniser(folder: Path, meta: Mapping[str, Any]) -> Tokeniser:
    """That of a folder. Raises ValueError where it is missing, or another one."""
    tokeniser = Tokeniser.load(folder / "tokeniser.model")
    if tokeniser.sha256 != meta["tokeniser"]:
        raise ValueError(f"{folder}/tokeniser.model: not the tokeniser that wrote this folder")
    return tokeniser


def read_array(
    folder: Path, name: str, dtype: type[np.generic], shape: tuple[int, ...], digest: str | None
) -> np.ndarray:
    """A memory map of `<name>.npy`; `digest` is its SHA-256, None where its size is all that is checked. Of several
    hosts, which share the folder, the first alone reads all of it for that.

    Raises ValueError, in one line, for what cannot be read or is not what meta.json says.
    """
    path = folder / f"{name}.npy"
    try:
        if digest is not None and hosts.first() and sha256(path) != digest:
            raise ValueError(f"{path}: damaged (not the checksum of meta.json); prepare the folder again")
        array = np.lib.format.open_memmap(path, mode="r")  # `.npy` alone: no archives, no pickles
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror})") from None
    except tokenize.TokenError:  # numpy lets it out for some broken headers
        raise ValueError(f"{path}: not a .npy file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path}: not {np.dtype(dtype)} {list(shape)} as meta.json says")
    return array


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

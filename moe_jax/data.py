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

import dataclasses
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

from moe_jax.packing import COLUMNS, Packable, Rows, pack, to_batch, to_pairs
from moe_jax.text.prompt import READ, WRITE
from moe_jax.text.tokeniser import Tokeniser
from moe_jax.types import Batch

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared folder, checked and memory-mapped: `columns` are [rows, length]."""

    folder: Path
    meta: Mapping[str, Any]
    columns: Rows
    tokeniser: Tokeniser

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Prepared:
        """Raises ValueError, in one line, if anything is missing, damaged or of another version."""
        folder = Path(folder)
        meta = _read_meta(folder)
        tokeniser = Tokeniser.load(folder / "tokeniser.model")
        if tokeniser.sha256 != meta["tokeniser"]:
            raise ValueError(f"{folder}/tokeniser.model: not the tokeniser that wrote this folder")
        shape = (meta["rows"], meta["length"])
        columns = {
            name: _read_column(folder, name, dtype, shape, meta["sha256"].get(name))
            for name, dtype in _dtypes(tokeniser).items()
        }
        return cls(folder, meta, columns, tokeniser)

    @property
    def rows(self) -> int:
        return self.meta["rows"]

    def batch(self, step: int, *, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's slice of the batch of `step`: [batch_size / process_count, length] arrays.

        Steps walk through one permutation of the rows after another; a batch may span two of them.
        """
        if batch_size % process_count:
            raise ValueError(f"batch size {batch_size} does not divide into {process_count} processes")
        share = batch_size // process_count
        first = step * batch_size + process_index * share
        places = [divmod(place, self.rows) for place in range(first, first + share)]
        rows = [_permutation(self.rows, seed, epoch)[index] for epoch, index in places]
        return self.of({name: column[rows] for name, column in self.columns.items()})

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
    **about: Any,
) -> Mapping[str, Any]:
    """Packs `examples` into a new prepared folder and returns its meta.

    Args:
      folder: must not exist; written aside and renamed when complete.
      examples: drawn once, packed as they come.
      length: tokens a row.
      tokeniser: the one that made the ids; a copy travels with the data.
      families: name -> id; every task id must be one of them.
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
        tallies = {name: Counter(examples=0, tokens=0) for name in families}
        counted = _counted(examples, tokeniser.vocab_size, families, tallies)
        rows, max_targets = _write_columns(aside, pack(counted, length), _dtypes(tokeniser), length)
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
            "fill": sum(tally["tokens"] for tally in tallies.values()) / (rows * length),
            "tokeniser": tokeniser.sha256,
            "families": dict(families),
            "tasks": {name: dict(tally) for name, tally in tallies.items() if any(tally.values())},
            "sha256": {name: _sha256(aside / f"{name}.npy") for name in COLUMNS},
            **about,
        }
        (aside / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", "utf-8")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return meta


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


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror}); is this a prepared folder?") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON; prepare the folder again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path}: not format {FORMAT} of prepared data; prepare the folder again")
    kinds = {
        "length": int,
        "rows": int,
        "max_targets": int,
        "tokeniser": str,
        "families": dict,
        "sha256": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind) or (kind is int and meta[key] < 1):
            raise ValueError(f"{path}: {key!r} is missing or wrong; prepare the folder again")
    return meta


def _read_column(
    folder: Path, name: str, dtype: type[np.unsignedinteger], shape: tuple[int, int], sha256: str | None
) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        if _sha256(path) != sha256:
            raise ValueError(f"{path}: damaged (not the checksum of meta.json); prepare the folder again")
        array = np.lib.format.open_memmap(path, mode="r")  # `.npy` alone: no archives, no pickles
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror})") from None
    except tokenize.TokenError:  # numpy lets it out for some broken headers
        raise ValueError(f"{path}: not a .npy file") from None
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path}: not {np.dtype(dtype)} {list(shape)} as meta.json says")
    return array


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Prepared speech: features and token ids in a folder, read by memory map.

    meta.json        format, counts, frontend (rate, mels, mean, scale), lengths of batches, checksums
    features.npy     [frames, mels] float16: log-mel frames of all utterances, one after another
    index.npy        [rows, versions, 2] int64: first frame and number of frames of an utterance at each speed
    tokens.npy       [rows, max_targets] int32: 0 at padding
    skipped.jsonl    what could not be used, and why
    tokeniser.model

A batch depends on (folder, seed, step, batch size) alone. Its utterances are of like length: few lengths, few programs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_jax.layers import subsample
from moe_jax.speech import features, manifest
from moe_jax.text.symbols import Symbols
from moe_jax.text.tokeniser import Tokeniser, train
from moe_jax.types import Utterances

FORMAT = 1
FAMILIES = {"asr": 1}
CHECKED = ("index", "tokens")  # by checksum on opening; features, which may be many, by their size


@dataclasses.dataclass(frozen=True)
class Speech:
    """A prepared folder, checked and memory-mapped; for `train.train.read`."""

    folder: Path
    meta: Mapping[str, Any]
    features_FxC: np.ndarray
    index_RxVx2: np.ndarray
    tokens_RxU: np.ndarray
    tokeniser: Tokeniser

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Speech:
        """Raises ValueError, in one line, if anything is missing, damaged or of another version."""
        folder = Path(folder)
        meta = _meta(folder)
        tokeniser = Tokeniser.load(folder / "tokeniser.model")
        if tokeniser.sha256 != meta["tokeniser"]:
            raise ValueError(f"{folder}/tokeniser.model: not the tokeniser that wrote this folder")
        rows, versions, mels = meta["rows"], len(meta["speeds"]), meta["frontend"]["mels"]
        shapes = {
            "features": ((meta["frames"], mels), np.float16),
            "index": ((rows, versions, 2), np.int64),
            "tokens": ((rows, meta["max_targets"]), np.int32),
        }
        arrays = [_array(folder, name, *shape, meta["sha256"].get(name)) for name, shape in shapes.items()]
        return cls(folder, meta, *arrays, tokeniser)

    @property
    def rows(self) -> int:
        return self.meta["rows"]

    @functools.cached_property
    def bucket_R(self) -> np.ndarray:
        """Of each row the shortest of the lengths that it fits, whatever its speed."""
        return np.searchsorted(self.meta["lengths"], self.index_RxVx2[:, :, 1].max(1))

    def batch(
        self, step: int, *, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Utterances:
        """This process's slice of the batch of `step`.

        In an epoch each utterance comes once, at a speed that is drawn, among others of its bucket; what is missing in
        a bucket's last batch is taken from its beginning. Buckets come in an order that is drawn.
        """
        if batch_size % process_count:
            raise ValueError(f"batch size {batch_size} does not divide into {process_count} processes")
        buckets = [np.flatnonzero(self.bucket_R == b) for b in range(len(self.meta["lengths"]))]
        batches = np.repeat(np.arange(len(buckets)), [-(-len(rows) // batch_size) for rows in buckets])
        epoch, place = divmod(step, len(batches))
        order = np.argsort(_drawn(seed, epoch, 0, len(batches)), kind="stable")
        bucket = batches[order[place]]
        turn = np.count_nonzero(batches[order[:place]] == bucket)
        rows = buckets[bucket]
        rows = rows[np.argsort(_drawn(seed, epoch, 1 + bucket, len(rows)), kind="stable")]
        share = batch_size // process_count
        first = turn * batch_size + process_index * share
        rows = rows[np.arange(first, first + share) % len(rows)]
        speeds = _drawn(seed, epoch, 1 + len(buckets), self.rows)[rows] % len(self.meta["speeds"])
        spans = self.index_RxVx2[rows, speeds.astype(np.int64)]
        x = np.zeros((share, self.meta["lengths"][bucket], self.features_FxC.shape[1]), np.float16)
        for row, (start, frames) in zip(x, spans, strict=True):
            row[:frames] = self.features_FxC[start : start + frames]
        family = np.full(share, FAMILIES["asr"], np.int32)
        batch: dict[str, Any] = {
            "features_BxTxC": x,
            "frames_B": spans[:, 1].astype(np.int32),
            "tokens_BxU": np.asarray(self.tokens_RxU[rows]),
            "task_B": family,
        }
        return Utterances(**batch)


def _drawn(seed: int, epoch: int, what: int, number: int) -> np.ndarray:
    """Numbers of (seed, epoch, what): raw Philox output, which numpy keeps the same over its versions."""
    return np.random.Philox(key=(seed, epoch), counter=(0, 0, 0, what)).random_raw(number)


def frontend(folder: str) -> dict[str, Any]:
    """What a model of this folder's features has to know: for `conformer.Conformer.frontend`."""
    return dict(_meta(Path(folder))["frontend"])


def prepare(
    folder: str,
    *,
    manifest: str,
    split: str | None = None,
    tokeniser: str | None = None,
    units: str | int = "characters",
    rate: int = 16_000,
    mels: int = features.MELS,
    speeds: Sequence[float] = (1.0,),
    lengths: int = 4,
) -> None:
    """Makes a prepared folder, unless it is there already; then it must be what was asked for.

    Args:
      manifest, split: a list of utterances, and which of them (`speech.manifest`).
      tokeniser: the file of one, or a folder of prepared speech that holds it: that of training, for validation.
        Default: made of the texts.
      units: then what of: "characters", "words", or a number of SentencePiece pieces (265 of which are fixed).
      rate, mels: of the features.
      speeds: each utterance is there at all of them; a batch takes one.
      lengths: how many lengths batches have.

    Raises ValueError where `folder` holds something else, or no utterance is left.
    """
    path, target = Path(manifest), Path(folder)
    stamp = path.stat().st_size if path.is_file() else None
    wanted = {
        "manifest": [str(path.absolute()), stamp, split],
        "asked": {"units": units, "rate": rate, "mels": mels, "speeds": list(speeds), "lengths": lengths},
    }
    if tokeniser and Path(tokeniser).is_dir():
        tokeniser = str(Path(tokeniser) / "tokeniser.model")
    if target.exists():
        there = _meta(target)
        differs = next((key for key, value in wanted.items() if there.get(key) != value), None)
        if differs or (tokeniser and Tokeniser.load(tokeniser).sha256 != there["tokeniser"]):
            raise ValueError(
                f"{target} was prepared with another {differs or 'tokeniser'}: remove it, or choose another"
            )
        return
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        meta: dict[str, Any] = _write(aside, path, split, tokeniser, units, rate, mels, tuple(speeds), lengths)
        meta |= wanted
        (aside / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", "utf-8")
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    hours, sizes = meta["seconds"] / 3600, ", ".join(map(str, meta["lengths"]))
    print(f"{target}: {meta['rows']} utterances, {hours:.2f} h, in batches of {sizes} frames")
    for reason, count in meta["skipped"].items():
        print(f"  skipped {count}: {reason}; see {target}/skipped.jsonl")


def _write(
    aside: Path,
    path: Path,
    split: str | None,
    tokeniser: str | None,
    units: str | int,
    rate: int,
    mels: int,
    speeds: tuple[float, ...],
    lengths: int,
) -> dict[str, Any]:
    found = list(manifest.read(path, split))
    texts = [u.text for u in found if isinstance(u, manifest.Utterance)]
    if not any(texts):
        raise ValueError(f"{path}: no utterance with a text{f' of the split {split!r}' if split else ''}")
    if tokeniser:
        vocabulary = Tokeniser.load(tokeniser)
    else:
        vocabulary = Symbols.of(texts, units) if isinstance(units, str) else train(texts, units)
    moments, index, tokens, skipped = features.Moments(), [], [], []
    with _Growing(aside / "features.npy", mels) as file:
        for one in tqdm(found, unit=" utterances", disable=None, mininterval=1):
            ready = one if isinstance(one, manifest.Skipped) else _featured(one, vocabulary, rate, mels, speeds)
            if isinstance(ready, manifest.Skipped):
                skipped.append(ready)
                continue
            ids, versions = ready
            for version in versions:
                moments.add(version)
            index.append([(file.append(v.astype(np.float16)), len(v)) for v in versions])
            tokens.append(ids)
    if not index:
        first = f": {skipped[0].where}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{path}: none of {len(found)} utterances can be used{first}")
    index_RxVx2 = np.array(index, np.int64)
    tokens_RxU = np.zeros((len(tokens), max(map(len, tokens))), np.int32)
    for row, ids in zip(tokens_RxU, tokens, strict=True):
        row[: len(ids)] = ids
    np.save(aside / "index.npy", index_RxVx2)
    np.save(aside / "tokens.npy", tokens_RxU)
    vocabulary.save(aside / "tokeniser.model")
    lines = (json.dumps(dataclasses.asdict(s), ensure_ascii=False) + "\n" for s in skipped)
    (aside / "skipped.jsonl").write_text("".join(lines), "utf-8")
    mean, scale = moments.mean_and_scale()
    frames_R = index_RxVx2[:, :, 1].max(1)
    return {
        "format": FORMAT,
        "rows": len(index),
        "frames": file.rows,
        "seconds": float(index_RxVx2[:, 0, 1].sum() * features.SHIFT),
        "lengths": _lengths(frames_R, lengths),
        "length": _lengths(frames_R, 1)[0],
        "max_targets": tokens_RxU.shape[1],
        "speeds": list(speeds),
        "skipped": dict(collections.Counter(s.reason.partition(": ")[0] for s in skipped)),
        "tokeniser": vocabulary.sha256,
        "families": FAMILIES,
        "frontend": {"rate": rate, "mels": mels, "mean": mean.tolist(), "scale": scale.tolist()},
        "sha256": {name: _sha256(aside / f"{name}.npy") for name in ("features", *CHECKED)},
    }


def _featured(
    one: manifest.Utterance, vocabulary: Tokeniser, rate: int, mels: int, speeds: Iterable[float]
) -> tuple[list[int], list[np.ndarray]] | manifest.Skipped:
    """(token ids, features at each speed), or why not."""
    try:
        ids = vocabulary.encode(one.text)
    except ValueError as error:
        return manifest.Skipped(one.where, f"text outside of the vocabulary: {error}")
    if not ids:
        return manifest.Skipped(one.where, "no text")
    try:
        samples = features.read(one.audio, rate, start=one.start, length=one.length)
    except features.AudioError as error:
        return manifest.Skipped(one.where, f"audio that cannot be read: {error}")
    versions = [features.fbank(features.speed(samples, factor), rate, mels) for factor in speeds]
    if min(map(len, versions)) < subsample.WINDOW:
        return manifest.Skipped(one.where, f"too short for one subsampled frame: {len(samples)} samples")
    return ids, versions


def _lengths(frames_R: np.ndarray, number: int) -> list[int]:
    """Those that leave the least padding, found among 200 quantiles by dynamic programming."""
    edges = np.unique(np.quantile(frames_R, np.linspace(0, 1, 201), method="inverted_cdf")).astype(int)
    upto = np.r_[0, np.searchsorted(np.sort(frames_R), edges, side="right")]
    # work_ij: of batches of utterances i to j, all as long as the longest
    work = (upto - upto[:, None]) * np.r_[0, edges]
    work = np.where(np.triu(np.ones(work.shape, bool), 1), work, np.inf)
    best, ways = np.r_[0, np.full(len(edges), np.inf)], []
    for _ in range(min(number, len(edges))):
        total = best[:, None] + work
        best, ways = total.min(0), [*ways, total.argmin(0)]
    found, end = [], len(edges)
    for way in reversed(ways):
        found.append(int(edges[end - 1]))
        end = way[end]
    return found[::-1]


class _Growing:
    """A .npy file of rows [., columns] that come one after another."""

    def __init__(self, path: Path, columns: int):
        self.file, self.columns, self.rows = path.open("wb"), columns, 0

    def _header(self) -> None:  # numpy pads it so that the number of rows can grow in place
        self.file.seek(0)
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (self.rows, self.columns)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def __enter__(self) -> _Growing:
        self._header()
        return self

    def append(self, rows: np.ndarray) -> int:
        """Returns the number of the first of them."""
        self.file.write(rows.tobytes())
        self.rows += len(rows)
        return self.rows - len(rows)

    def __exit__(self, *_: object) -> None:
        self._header()
        self.file.close()


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror}); is this a prepared folder?") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON; prepare the folder again") from None
    kinds = {
        "rows": int,
        "frames": int,
        "lengths": list,
        "max_targets": int,
        "speeds": list,
        "tokeniser": str,
        "frontend": dict,
        "sha256": dict,
    }
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or "frontend" not in meta:
        raise ValueError(f"{path}: not format {FORMAT} of prepared speech; prepare the folder again")
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind) or not meta[key]:
            raise ValueError(f"{path}: {key!r} is missing or wrong; prepare the folder again")
    return meta


def _array(folder: Path, name: str, shape: tuple[int, ...], dtype: type, sha256: str | None) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        if name in CHECKED and _sha256(path) != sha256:
            raise ValueError(f"{path}: damaged (not the checksum of meta.json); prepare the folder again")
        array = np.lib.format.open_memmap(path, mode="r")  # `.npy` alone: no archives, no pickles
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path}: not {np.dtype(dtype)} {list(shape)} as meta.json says")
    return array


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

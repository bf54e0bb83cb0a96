"""Prepared speech: features and token ids in a folder, read by memory map.

    meta.json        format, counts, frontend (rate, mels, mean, scale), lengths of batches and their texts, checksums
    features.npy     [frames, mels] float16: log-mel frames of all utterances, one after another
    index.npy        [rows, versions, 2] int64: first frame and number of frames of an utterance at each speed; those of
                     the slowest at a speed that leaves fewer frames than CTC needs for its text
    tokens.npy       [rows, max_targets] int32: 0 at padding
    skipped.jsonl    what could not be used, and why
    tokeniser.model

A batch depends on (folder, seed, step, batch size) alone. Its utterances are of like length: few lengths, few programs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_jax import hosts
from moe_jax.data import Dataset, read_array, read_meta, read_tokeniser, sha256, share
from moe_jax.formats import manifest as manifests
from moe_jax.formats.audio import LONGEST, AudioError
from moe_jax.formats.manifest import Recorded, Skipped, Utterance
from moe_jax.layers import subsample
from moe_jax.speech import features
from moe_jax.text.symbols import Symbols
from moe_jax.text.tokeniser import Tokeniser, train
from moe_jax.types import Utterances

FORMAT, HOLDS = 2, "prepared speech"
KINDS = {
    **dict.fromkeys(("rows", "frames", "max_targets"), int),
    **dict.fromkeys(("lengths", "targets", "speeds"), list),
    **dict.fromkeys(("frontend", "sha256"), dict),
    "tokeniser": str,
}
FAMILIES = {"asr": 1}
CHECKED = ("index", "tokens")  # by checksum on opening; features, which may be many, by their size


@dataclasses.dataclass(frozen=True)
class Speech(Dataset):
    """A prepared folder, checked and memory-mapped; for `train.train.read`."""

    features_FxC: np.ndarray
    index_RxVx2: np.ndarray
    tokens_RxU: np.ndarray

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Speech:
        """Raises ValueError, in one line, if anything is missing, damaged or of another version."""
        folder = Path(folder)
        meta = _meta(folder)
        tokeniser = read_tokeniser(folder, meta)
        rows, versions, mels = meta["rows"], len(meta["speeds"]), meta["frontend"]["mels"]
        shapes = {
            "features": ((meta["frames"], mels), np.float16),
            "index": ((rows, versions, 2), np.int64),
            "tokens": ((rows, meta["max_targets"]), np.int32),
        }
        sums = {name: meta["sha256"].get(name, "") if name in CHECKED else None for name in shapes}
        arrays = [read_array(folder, name, dtype, shape, sums[name]) for name, (shape, dtype) in shapes.items()]
        return cls(folder, meta, tokeniser, *arrays)

    @property
    def split(self) -> str | None:
        asked = self.meta.get("manifest")  # of what it was prepared, the split last
        return asked[-1] if isinstance(asked, list) and asked else None

    @functools.cached_property
    def bucket_R(self) -> np.ndarray:
        """Of each row the shortest of the lengths that it fits, whatever its speed."""
        return np.searchsorted(self.meta["lengths"], self.index_RxVx2[:, :, 1].max(1))

    def batch(
        self, step: int, *, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Utterances:
        """In an epoch each utterance comes once, at a speed that is drawn, among others of its bucket; what is missing
        in a bucket's last batch is taken from its beginning, and does not count in evaluation. Buckets come in an order
        that is drawn.
        """
        own = share(batch_size, process_index, process_count)
        epoch, bucket, rows, fresh = self._at(step, seed, batch_size, own)
        speeds = _drawn(seed, epoch, 1 + len(self.meta["lengths"]), self.rows)[rows] % len(self.meta["speeds"])
        spans = self.index_RxVx2[rows, speeds.astype(np.int64)]
        x = np.zeros((len(own), self.meta["lengths"][bucket], self.features_FxC.shape[1]), np.float16)
        for row, (start, frames) in zip(x, spans, strict=True):
            row[:frames] = self.features_FxC[start : start + frames]
        family = np.full(len(own), FAMILIES["asr"], np.int32)
        batch: dict[str, Any] = {
            "features_BxTxC": x,
            "frames_B": spans[:, 1].astype(np.int32),
            "tokens_BxU": np.asarray(self.tokens_RxU[rows, : self.meta["targets"][bucket]]),
            "task_B": family,
            "weight_B": fresh.astype(np.float32),
        }
        return Utterances(**batch)

    def rows_of(self, step: int, *, seed: int, batch_size: int) -> list[int]:
        return self._at(step, seed, batch_size, range(batch_size))[2].tolist()

    def batches(self, rows: int, batch_size: int) -> int:
        """All of an epoch, however few `rows`: some batches would be of some lengths alone, and of no fixed share."""
        return len(self._batches(batch_size))

    def _batches(self, batch_size: int) -> np.ndarray:
        """The bucket of each batch of an epoch, in the order of buckets."""
        return np.repeat(np.arange(len(self._buckets)), [-(-len(rows) // batch_size) for rows in self._buckets])

    @functools.cached_property
    def _buckets(self) -> list[np.ndarray]:
        """The rows of each."""
        return [np.flatnonzero(self.bucket_R == b) for b in range(len(self.meta["lengths"]))]

    def _at(self, step: int, seed: int, batch_size: int, places: range) -> tuple[int, int, np.ndarray, np.ndarray]:
        """(epoch, bucket, rows, which of them are not repeats) of places in the batch of `step`."""
        batches = self._batches(batch_size)
        epoch, place = divmod(step, len(batches))
        order = np.argsort(_drawn(seed, epoch, 0, len(batches)), kind="stable")
        bucket = int(batches[order[place]])
        turn = np.count_nonzero(batches[order[:place]] == bucket)
        rows = self._buckets[bucket]
        rows = rows[np.argsort(_drawn(seed, epoch, 1 + bucket, len(rows)), kind="stable")]
        at = turn * batch_size + np.array(places)
        return epoch, bucket, rows[at % len(rows)], at < len(rows)


def _drawn(seed: int, epoch: int, what: int, number: int) -> np.ndarray:
    """Numbers of (seed, epoch, what): raw Philox output, which numpy keeps the same over its versions."""
    return np.random.Philox(key=(seed, epoch), counter=(0, 0, 0, what)).random_raw(number)


def frontend(folder: str) -> dict[str, Any]:
    """What a model of this folder's features has to know: for `conformer.Conformer.frontend`."""
    return dict(_meta(Path(folder))["frontend"])


def _meta(folder: Path) -> dict[str, Any]:
    return read_meta(folder, HOLDS, FORMAT, KINDS)


@hosts.in_turn
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
    batch: int | None = None,
    longest: float | None = LONGEST,
) -> None:
    """Makes a prepared folder of a list of utterances (`formats.manifest`), unless it is there already; then it must be
    what was asked for. For the rest see `write`.

    Args:
      split: those alone whose "split" is this.

    Raises ValueError where `folder` holds something else, or no utterance is left.
    """
    path = Path(manifest)
    said = f"{path}{f', split {split!r}' if split else ''}"
    of = [str(path.absolute()), _size(manifests.listed(path, split)[0]), split]
    given: dict[str, Any] = dict(units=units, rate=rate, mels=mels, speeds=speeds, lengths=lengths, batch=batch)
    given["longest"] = longest
    write(folder, lambda: manifests.read(path, split), said, of, tokeniser=tokeniser, **given)


def _size(path: Path) -> int | None:
    """Bytes of a list, of Kaldi's three files together."""
    files = [path / name for name in ("wav.scp", "text", "segments")] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) or None


def write(
    folder: str,
    utterances: Callable[[], Iterable[Utterance | Recorded | Skipped]],
    said: str,
    of: Any,
    *,
    tokeniser: str | None = None,
    units: str | int = "characters",
    rate: int = 16_000,
    mels: int = features.MELS,
    speeds: Sequence[float] = (1.0,),
    lengths: int = 4,
    batch: int | None = None,
    longest: float | None = LONGEST,
) -> None:
    """Makes a prepared folder, unless it is there already; then it must be what was asked for.

    Args:
      utterances: asked for twice, for their texts and for their audio, if they are needed.
      said: what they are called in messages.
      of: what says whether they are still the same ones, as JSON.
      tokeniser: the file of one, or a folder of prepared speech that holds it: that of training, for validation, whose
        shapes of batches serve here too, so that programs do. Default: made of the texts.
      units: then what of: "characters", "words", or a number of SentencePiece pieces (265 of which are fixed).
      rate, mels: of the features.
      speeds: each utterance is there at all of them; a batch takes one.
      lengths: how many lengths batches have, at most.
      batch: utterances a batch, for which the lengths are best; what is there already serves any.
      longest: seconds; utterances that are longer are left out and listed, as one sets a length of batches.

    Raises ValueError where `folder` holds something else, or no utterance is left.
    """
    target = Path(folder)
    asked = {"units": units, "rate": rate, "mels": mels, "speeds": list(speeds), "lengths": lengths, "longest": longest}
    wanted = {"manifest": of, "asked": asked}
    like = None
    if tokeniser and Path(tokeniser).is_dir():
        like = _meta(Path(tokeniser))
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
        meta: dict[str, Any] = _write(aside, utterances, said, tokeniser, asked, batch, like) | wanted
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
    utterances: Callable[[], Iterable[Utterance | Recorded | Skipped]],
    said: str,
    tokeniser: str | None,
    asked: Mapping[str, Any],
    batch: int | None,
    like: dict[str, Any] | None,
) -> dict[str, Any]:
    """The files in `aside` but for meta.json, which it returns. `asked`, `batch`: as of `write`."""
    names = ("units", "rate", "mels", "speeds", "lengths", "longest")
    units, rate, mels, speeds, lengths, longest = (asked[name] for name in names)
    texts = [u.text for u in utterances() if not isinstance(u, Skipped)]
    if not any(texts):
        raise ValueError(f"{said}: no utterance with a text")
    if tokeniser:
        vocabulary = Tokeniser.load(tokeniser)
    else:
        vocabulary = Symbols.of(texts, units) if isinstance(units, str) else train(texts, units)
    moments, index, tokens, skipped = features.Moments(), [], [], []
    with _Growing(aside / "features.npy", mels) as file:
        for one in tqdm(utterances(), total=len(texts), unit=" utterances", disable=None, mininterval=1):
            ready = one if isinstance(one, Skipped) else _featured(one, vocabulary, rate, mels, speeds, longest)
            if isinstance(ready, Skipped):
                skipped.append(ready)
                continue
            ids, versions = ready
            for version in versions:
                if version is not None:
                    moments.add(version)
            spans = [None if v is None else (file.append(v.astype(np.float16)), len(v)) for v in versions]
            slowest = max((span for span in spans if span), key=lambda span: span[1])
            index.append([span or slowest for span in spans])
            tokens.append(ids)
    if not index:
        first = f": {skipped[0].where}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{said}: none of {len(skipped)} utterances can be used{first}")
    index_RxVx2 = np.array(index, np.int64)
    frames_R, sizes_R = index_RxVx2[:, :, 1].max(1), np.array(list(map(len, tokens)))
    lengths_found, targets = _shapes(frames_R, sizes_R, lengths, batch, like)
    tokens_RxU = np.zeros((len(tokens), max(targets)), np.int32)
    for row, ids in zip(tokens_RxU, tokens, strict=True):
        row[: len(ids)] = ids
    np.save(aside / "index.npy", index_RxVx2)
    np.save(aside / "tokens.npy", tokens_RxU)
    vocabulary.save(aside / "tokeniser.model")
    lines = (json.dumps(dataclasses.asdict(s), ensure_ascii=False) + "\n" for s in skipped)
    (aside / "skipped.jsonl").write_text("".join(lines), "utf-8")
    mean, scale = moments.mean_and_scale()
    return {
        "format": FORMAT,
        "holds": HOLDS,
        "rows": len(index),
        "frames": file.rows,
        "seconds": float(index_RxVx2[:, 0, 1].sum() * features.SHIFT),
        "lengths": lengths_found,
        "targets": targets,
        "length": _lengths(frames_R, 1)[0],
        "max_targets": tokens_RxU.shape[1],
        "speeds": list(speeds),
        "skipped": dict(collections.Counter(s.reason.partition(": ")[0] for s in skipped)),
        "tokeniser": vocabulary.sha256,
        "families": FAMILIES,
        "frontend": {"rate": rate, "mels": mels, "mean": mean.tolist(), "scale": scale.tolist()},
        "sha256": {name: sha256(aside / f"{name}.npy") for name in ("features", *CHECKED)},
    }


def _featured(
    one: Utterance | Recorded,
    vocabulary: Tokeniser,
    rate: int,
    mels: int,
    speeds: Iterable[float],
    longest: float | None,
) -> tuple[list[int], list[np.ndarray | None]] | Skipped:
    """(token ids, features at each speed, None where CTC has too few frames for them), or why not."""
    try:
        ids = vocabulary.encode(one.text)
    except ValueError as error:
        return Skipped(one.where, f"text outside of the vocabulary: {error}")
    if not ids:
        return Skipped(one.where, "no text")
    try:
        if longest is not None and (seconds := one.seconds) > longest:
            return Skipped(one.where, manifests.too_long(longest, seconds))
        samples = one.samples(rate)
    except AudioError as error:
        return Skipped(one.where, f"audio that cannot be read: {error}")
    own = subsample.length(features.num_frames(len(samples), rate))
    if not own:
        return Skipped(one.where, f"too short for one subsampled frame: {len(samples)} samples")
    needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))  # a blank between two that are the same
    versions = [features.fbank(features.speed(samples, factor), rate, mels) for factor in speeds]
    fitting = [v if subsample.length(len(v)) >= needed else None for v in versions]
    if own < needed or all(v is None for v in fitting):
        return Skipped(one.where, f"more text than CTC can align: {needed} tokens and repeats in {own} frames of 40 ms")
    return ids, fitting


def _lengths(frames_R: np.ndarray, number: int, batch: int | None = None) -> list[int]:
    """At most so many, with which an epoch has the fewest frames, found among 200 quantiles by dynamic programming: of
    utterances alone, or of whole batches of `batch`.
    """
    edges = np.unique(np.quantile(frames_R, np.linspace(0, 1, 201), method="inverted_cdf")).astype(int)
    upto = np.r_[0, np.searchsorted(np.sort(frames_R), edges, side="right")]
    # work_ij: of batches of utterances i to j, all as long as the longest; the last is filled
    work = -(-(upto - upto[:, None]) // (batch or 1)) * (batch or 1) * np.r_[0, edges]
    work = np.where(np.triu(np.ones(work.shape, bool), 1), work, np.inf)
    best, ways, least, used = np.r_[0, np.full(len(edges), np.inf)], [], np.inf, 0
    for _ in range(min(number, len(edges))):
        total = best[:, None] + work
        best, ways = total.min(0), [*ways, total.argmin(0)]
        if best[-1] < least:  # one more length may fill one more batch
            least, used = best[-1], len(ways)
    found, end = [], len(edges)
    for way in reversed(ways[:used]):
        found.append(int(edges[end - 1]))
        end = way[end]
    return found[::-1]


def _shapes(
    frames_R: np.ndarray, sizes_R: np.ndarray, number: int, batch: int | None, like: Mapping[str, Any] | None
) -> tuple[list[int], list[int]]:
    """(lengths of batches in frames, the widest text of each): where texts go with audio, most are narrower than the
    widest of all. Those of `like` that are needed, and larger ones where something is larger than all.
    """
    if like is None:
        lengths = _lengths(frames_R, number, batch)
        known = dict.fromkeys(lengths, 0)
    else:
        used = np.unique(np.searchsorted(like["lengths"], frames_R))
        lengths = [like["lengths"][i] if i < len(like["lengths"]) else int(frames_R.max()) for i in used]
        known = dict(zip(like["lengths"], like["targets"], strict=True))
    bucket_R = np.searchsorted(lengths, frames_R)
    return lengths, [max(known.get(n, 0), int(sizes_R[bucket_R == i].max())) for i, n in enumerate(lengths)]


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

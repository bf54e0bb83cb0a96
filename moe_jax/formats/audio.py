"""Audio files -> samples at the rate that is wanted: whole, in part, or block by block."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

SCALE = 1 << 15  # of samples: floats in the range of 16-bit integers, as Kaldi and WeNet have them
BEHIND = 0.1  # seconds that a part may end behind its file: lists round, and count an encoder's padding

PAGE = 27 + 255 + 255 * 255  # bytes of Ogg's largest page
CONTAINERS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3"}  # what files of each begin with


class Bytes(Protocol):
    """What comes: `read1` hands on what is there, and waits where nothing is."""

    def read(self, size: int, /) -> bytes: ...

    def read1(self, size: int, /) -> bytes: ...


class AudioError(ValueError):
    """One line: which file, and what is wrong with it."""


def read(
    path: str | os.PathLike, rate: int, *, start: int | float = 0, length: int | float | None = None
) -> np.ndarray:
    """Samples [S] of an audio file (what libsndfile reads: wav, flac, ogg, opus, mp3, ...), channels mixed to one.

    Args:
      rate: samples a second that are wanted; a file of another rate is resampled, and a line on standard error says so
        once.
      start, length: a part of the file (default: to its end), in samples at its own rate if integers, else in seconds,
        which may end up to `BEHIND` behind it.

    Raises AudioError for a file that is missing, empty, torn, not audio, or whose samples are not finite.
    """
    with _opened(path) as file:
        first, wanted = _part(file, path, start, length)
        own_rate = file.samplerate
        found = _samples(file, path, first, wanted)
    if len(found) < wanted:
        raise AudioError(f"{path}: torn: {len(found)} of {wanted} samples can be read")
    return resampled(found, own_rate, rate)


def rate(path: str | os.PathLike) -> int:
    """Samples a second of a file. Raises AudioError as `read` does."""
    with _opened(path) as file:
        return file.samplerate


def seconds(path: str | os.PathLike, *, start: int | float = 0, length: int | float | None = None) -> float:
    """How long a file, or a part of it, is: from its header alone. Raises AudioError as `read` does."""
    with _opened(path) as file:
        return _part(file, path, start, length)[1] / file.samplerate


def blocks(path: str | os.PathLike, rate: int, seconds: float) -> Iterator[np.ndarray]:
    """Samples of a file, so many seconds at a time: one block of it is held, however long it is.

    Raises AudioError as `read` does.
    """
    size = max(1, round(seconds * rate))
    with _opened(path) as file:
        _part(file, path, 0, None)
        step = max(1, round(seconds * file.samplerate))

        def parts() -> Iterator[np.ndarray]:
            for start in range(0, file.frames, step):
                found = _samples(file, path, start, step)
                if len(found) < min(step, file.frames - start):
                    raise AudioError(f"{path}: torn: {start + len(found)} of {file.frames} samples can be read")
                yield found

        yield from _portions(_resampled_parts(parts(), file.samplerate, rate), size)


def pcm(file: Bytes, own_rate: int, rate: int, seconds: float) -> Iterator[np.ndarray]:
    """As `blocks`, of 16-bit little-endian samples of one channel as they come; of half a sample at the end a line on
    standard error says that it is left out.

    Raises AudioError where nothing comes, or a file of audio does.
    """
    size = 2 * max(1, round(seconds * own_rate))

    def parts() -> Iterator[np.ndarray]:
        held = file.read(4)
        kind = next((name for begin, name in CONTAINERS.items() if held.startswith(begin)), None)
        if kind:
            raise AudioError(f"standard input: a {kind} file, not samples of 16 bits: give its path in place of -")
        if not held:
            raise AudioError("standard input: no samples")
        while True:
            data = file.read1(size)
            held += data
            if whole := len(held) // 2 * 2:
                yield np.frombuffer(held[:whole], "<i2").astype(np.float32)
            held = held[whole:]
            if not data:
                break
        if held:
            say_once("warning: standard input: half a sample of 16 bits at its end is left out")

    yield from _portions(_resampled_parts(parts(), own_rate, rate), max(1, round(seconds * rate)))


def _portions(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples, `size` at a time."""
    left = np.zeros(0, np.float32)
    for part in parts:
        left = np.concatenate([left, part])
        while len(left) >= size:
            yield left[:size]
            left = left[size:]
    if len(left):
        yield left


def _resampled_parts(parts: Iterable[np.ndarray], own_rate: int, rate: int) -> Iterator[np.ndarray]:
    """What `resampled` makes of all of them, a part at a time: each is resampled among the samples on both sides of it
    that its filter sees."""
    if own_rate == rate:
        yield from parts
        return
    up, down = _ratio(own_rate, rate)
    margin = -(-(10 * max(up, down) // up + 1) // down) * down  # scipy's filter has 10 zero crossings on each side
    held, before = np.zeros(0, np.float32), 0  # of `held`, so many are out already
    for part in itertools.chain(parts, [None]):
        held = held if part is None else np.concatenate([held, part])
        ready = len(held) if part is None else max(before, (len(held) - margin) // down * down)
        if ready > before:
            made = resampled(held[: ready + margin], own_rate, rate)
            yield made[before * up // down : None if part is None else ready * up // down]
            first = max(0, ready - margin)
            held, before = held[first:], ready - first


def _opened(path: str | os.PathLike):
    try:
        import soundfile
    except ImportError as error:
        raise ModuleNotFoundError("reading audio needs soundfile: pip install 'moe_jax[speech]'") from error
    try:
        if not Path(path).is_file():
            raise AudioError(f"{path}: no such file")
        file = soundfile.SoundFile(os.fspath(path))
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: raw data want to be told their format
        raise AudioError(f"{path}: not audio that can be read ({_reason(error)})") from None
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise AudioError(f"{path}: cannot be read ({error.strerror})") from None
    if "(should be" in file.extra_info:  # its header promises more
        file.close()
        raise AudioError(f"{path}: torn: shorter than its header says")
    if file.format == "OGG" and not _ended(Path(path)):  # libsndfile takes what it finds for the whole
        file.close()
        raise AudioError(f"{path}: torn: its last page is missing")
    return file


def _part(file, path: str | os.PathLike, start: int | float, length: int | float | None) -> tuple[int, int]:
    """(first, number of samples) of a part as `read` takes it."""
    first = round(start * file.samplerate) if isinstance(start, float) else start
    wanted = left = int(file.frames - first)
    if length is not None:
        wanted = round(length * file.samplerate) if isinstance(length, float) else length
        if isinstance(length, float) and left < wanted <= left + BEHIND * file.samplerate:
            wanted = left
    if not 0 <= first < first + wanted <= file.frames:
        said = "no samples" if not file.frames else f"{file.frames} samples, not {first} to {first + wanted}"
        raise AudioError(f"{path}: {said}")
    return first, wanted


def _ended(path: Path) -> bool:
    """Whether an Ogg file's last page is whole, and says that the stream ends."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - PAGE))
        _, _, page = file.read().rpartition(b"OggS")
    segments = page[23 : 23 + page[22]] if len(page) > 22 else b""  # `page` is without its four letters
    return len(page) > 22 and len(page) >= 23 + len(segments) + sum(segments) and bool(page[1] & 4)


def _samples(file, path: str | os.PathLike, start: int, count: int) -> np.ndarray:
    import soundfile

    try:
        file.seek(start)
        found = file.read(count, dtype="float32", always_2d=True).mean(axis=1) * SCALE
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: torn: {_reason(error)}") from None
    if not np.isfinite(found).all():
        raise AudioError(f"{path}: samples that are not finite")
    return found


def _reason(error: Exception) -> str:
    return str(error).rpartition(": ")[2].strip(" .")


def resampled(samples_S: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    """Samples of another rate; a line on standard error says so once."""
    if own_rate == rate:
        return samples_S
    from scipy.signal import resample_poly  # takes a second to import, which many commands have no use for

    say_once(f"warning: audio of {own_rate} Hz is resampled to {rate} Hz")
    return resample_poly(samples_S, *_ratio(own_rate, rate)).astype(np.float32)


@functools.cache
def say_once(said: str) -> None:
    """On standard error, in one line (`warnings` adds one of source code)."""
    print(said, file=sys.stderr)


def _ratio(own_rate: int, rate: int) -> tuple[int, int]:
    """(up, down): rate / own_rate."""
    divisor = math.gcd(own_rate, rate)
    return rate // divisor, own_rate // divisor

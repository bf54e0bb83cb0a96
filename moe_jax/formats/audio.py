"""Audio files -> samples at the rate that is wanted: whole, in part, or block by block."""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SCALE = 1 << 15  # of samples: floats in the range of 16-bit integers, as Kaldi and WeNet have them
RATES = (1_000, 384_000)  # of samples; beyond, a header is damaged
LOUDEST = 1e15  # of samples: their squares and sums are finite in float32
LONGEST = 60  # seconds of a recording that is read at once, where nothing else is asked for
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
        # A frame of MP3 needs some of those before it, which are not read where one begins in the middle.
        before = min(first, own_rate if file.format in ("MP3", "MPEG") else 0)
        found = _samples(file, path, before + wanted, first - before)[before:]
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
    with _opened(path, forward=True) as file:
        _part(file, path, 0, None)
        step = max(1, round(seconds * file.samplerate))

        def parts() -> Iterator[np.ndarray]:
            for start in range(0, file.frames, step):
                found = _samples(file, path, step)
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


def _opened(path: str | os.PathLike, forward: bool = False):
    """A soundfile.SoundFile. `forward`: to be read from its beginning on; else soundfile seeks after each read to where
    it is, which an MP3 does not survive."""
    try:
        import soundfile
    except ImportError as error:
        raise ModuleNotFoundError("reading audio needs soundfile: pip install 'moe_jax[speech]'") from error

    class Forward(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    name: Any = os.fsencode(path) if os.name == "posix" else os.fspath(path)  # a name need not be UTF-8
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file; samples of 16 bits may come as -"
            raise AudioError(f"{path}: is {what}")
        with open(path, "rb"):  # of one that may not be read libsndfile says nothing of use
            file = (Forward if forward else soundfile.SoundFile)(name)
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file") from None
    except AudioError:
        raise
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: raw data want to be told their format
        raise AudioError(f"{path}: not audio that can be read ({_reason(error)})") from None
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise AudioError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # a NUL in the name
        raise AudioError(f"{path!r}: no such file") from None
    if not RATES[0] <= file.samplerate <= RATES[1]:
        file.close()
        raise AudioError(f"{path}: {file.samplerate} samples a second, not from {RATES[0]} to {RATES[1]}: damaged?")
    if promised := _promised(file.extra_info):
        if promised < UNKNOWN:
            file.close()
            raise AudioError(f"{path}: torn: shorter than its header says")
        say_once(f"warning: {path}: its header says no length, as of what was written to a pipe: all of it is read")
    if file.format == "OGG" and not _ended(Path(path)):  # libsndfile takes what it finds for the whole
        file.close()
        raise AudioError(f"{path}: torn: its last page is missing")
    return file


# How libsndfile says that less is there than a header promises: of a file's samples, or of W64 and RF64 as a whole.
# Other slips of a header (bytes a second, the size of RIFF around it) do no harm.
_SIZE = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
UNKNOWN = 0x7FFFF000  # and beyond: what programs write that could not go back to write the length


def _promised(said: str) -> int:
    """The bytes that a header promises beside fewer that are there; 0 if they are. A few are of padding."""
    sizes = [(int(promised), int(there)) for promised, there in _SIZE.findall(said)]
    return max((promised for promised, there in sizes if promised > there + 16), default=0)


def _part(file, path: str | os.PathLike, start: int | float, length: int | float | None) -> tuple[int, int]:
    """(first, number of samples) of a part as `read` takes it."""
    first = round(start * file.samplerate) if isinstance(start, float) else start
    wanted = left = int(file.frames - first)
    if length is not None:
        wanted = round(length * file.samplerate) if isinstance(length, float) else length
        if isinstance(length, float) and left < wanted <= left + BEHIND * file.samplerate:
            wanted = left
    if not 0 <= first < first + wanted <= file.frames:
        size, scale = f"{file.frames} samples", 1
        if isinstance(start, float) or isinstance(length, float):
            size, scale = f"{file.frames / file.samplerate:.2f} s", file.samplerate
        said = f"{size}, not {first / scale:.10g} to {(first + wanted) / scale:.10g}" if file.frames else "no samples"
        raise AudioError(f"{path}: {said}")
    return first, wanted


def _ended(path: Path) -> bool:
    """Whether an Ogg file's last page is whole, and says that the stream ends."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - PAGE))
        _, _, page = file.read().rpartition(b"OggS")
    segments = page[23 : 23 + page[22]] if len(page) > 22 else b""  # `page` is without its four letters
    return len(page) > 22 and len(page) >= 23 + len(segments) + sum(segments) and bool(page[1] & 4)


def _samples(file, path: str | os.PathLike, count: int, start: int | None = None) -> np.ndarray:
    """From `start` on (None: the next ones). Raises AudioError."""
    import soundfile

    try:
        if start is not None:
            file.seek(start)
        with np.errstate(over="ignore", invalid="ignore"):
            found = file.read(count, dtype="float32", always_2d=True).mean(axis=1) * SCALE
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: torn: {_reason(error)}") from None
    check_finite(path, found)
    return found


def check_finite(where: object, samples_S: np.ndarray) -> None:
    """Raises AudioError for samples that are not finite, or so large that their features would not be."""
    if not (np.abs(samples_S) < LOUDEST).all():
        raise AudioError(f"{where}: samples that are not finite, or beyond any scale")


def _reason(error: Exception) -> str:
    return str(error).rpartition(": ")[2].strip(" .")


def resampled(samples_S: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    """Samples of another rate; a line on standard error says so once."""
    if own_rate == rate:
        return samples_S
    from scipy.signal import resample_poly  # takes a second to import, which many commands have no use for

    say_once(f"warning: audio of {own_rate} Hz is resampled to {rate} Hz")
    up, down = _ratio(own_rate, rate)
    return resample_poly(samples_S, up, down, window=_taps(max(up, down))).astype(np.float32)


@functools.lru_cache(maxsize=2)
def _taps(most: int) -> np.ndarray:
    """Of the filter that `resample_poly` would design at each call; `most`: the larger of up and down."""
    from scipy.signal import firwin

    return firwin(20 * most + 1, 1 / most, window=("kaiser", 5.0)).astype(np.float32)


@functools.cache
def say_once(said: str) -> None:
    """On standard error, in one line (`warnings` adds one of source code)."""
    print(said, file=sys.stderr)


def _ratio(own_rate: int, rate: int) -> tuple[int, int]:
    """(up, down): rate / own_rate."""
    divisor = math.gcd(own_rate, rate)
    return rate // divisor, own_rate // divisor

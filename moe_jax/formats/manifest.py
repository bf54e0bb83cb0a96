"""Lists of utterances: lines of JSON (ours and NeMo's), and Kaldi's folders.

    {"audio": "a.flac", "text": "one two", "start": 0, "frames": 8000, "split": "train"}    start and frames in samples
    {"audio": "b.ogg", "text": "uno dos", "lang": "es"}                                     scored by language
    {"audio_filepath": "a.wav", "text": "one two", "offset": 0.0, "duration": 1.5}          NeMo, in seconds
    folder/wav.scp, folder/text, folder/segments if there are any                           Kaldi

Lines of one file say their split; or a folder has a list of each: train.jsonl or train.json, or Kaldi's in train/.
Paths are relative to the list's own folder. Nothing in a list is run: an entry of wav.scp that is a command is skipped.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.formats import audio
from moe_jax.formats.objects import encodable

PIPE = "a command, which is not run: write its audio to a file"
UNREADABLE = "not UTF-8"


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Attributes:
    where: the list and the line, or the list and the id.
    start, length: of the part of the file, as `audio.read` takes them.
    lang: its language, or whatever else its scores are to be grouped by; "" if the list does not say.
    """

    where: str
    audio: Path
    text: str
    start: int | float = 0
    length: int | float | None = None
    lang: str = ""

    @property
    def seconds(self) -> float:
        """How long it is, without reading it. Raises AudioError."""
        return audio.seconds(self.audio, start=self.start, length=self.length)

    def samples(self, rate: int) -> np.ndarray:
        """As `audio.read`. Raises AudioError."""
        return audio.read(self.audio, rate, start=self.start, length=self.length)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An utterance that is in memory: `samples_S` of `rate` in the range of 16-bit integers."""

    where: str
    samples_S: np.ndarray
    rate: int
    text: str
    lang: str = ""

    @property
    def seconds(self) -> float:
        return len(self.samples_S) / self.rate

    def samples(self, rate: int) -> np.ndarray:
        """Raises AudioError for samples that are none, or not finite."""
        if not len(self.samples_S):
            raise audio.AudioError(f"{self.where}: no samples")
        audio.check_finite(self.where, self.samples_S)
        return audio.resampled(self.samples_S, self.rate, rate)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What cannot be used, where it stands, and why."""

    where: str
    reason: str


def too_long(longest: float, seconds: float) -> str:
    """Why an utterance is left out."""
    return f"longer than {longest:g} s: {seconds:.1f} s"


def read(path: str | os.PathLike, split: str | None = None) -> Iterator[Utterance | Skipped]:
    """The utterances of a list, in order.

    Args:
      path: a file of JSON lines, or a Kaldi folder; with a split also a folder of lists (`listed`).
      split: those alone of this split.

    Raises ValueError, in one line, if there is no such list, or a split is asked for and no line says one.
    """
    path, split = listed(path, split)
    try:
        if path.is_dir():
            yield from _kaldi(path)
        else:
            with path.open("rb") as file:
                yield from _json_lines(path, file, split)
    except OSError as error:
        raise ValueError(f"{error.filename or path}: cannot read ({error.strerror})") from None


def listed(path: str | os.PathLike, split: str | None) -> tuple[Path, str | None]:
    """(the file or Kaldi folder that lists a split, the split that its lines must say). None: all of them.

    Raises ValueError for a folder without a list of that split.
    """
    path = Path(path)
    if split is None or not path.is_dir():
        return path, split
    lists = [path / f"{split}.jsonl", path / f"{split}.json", path / split]
    for found in lists:
        if found.exists():
            return found, None
    names = f"{split}.jsonl, {split}.json or Kaldi's {split}/wav.scp and {split}/text"
    raise ValueError(f"{path}: lists no split {split!r}; a folder has one in {names}")


def _json_lines(path: Path, lines: Iterable[bytes], split: str | None) -> Iterator[Utterance | Skipped]:
    objects = with_split = 0
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            said = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield Skipped(where, UNREADABLE)
            continue
        except (ValueError, RecursionError):
            yield Skipped(where, "not JSON")
            continue
        if not isinstance(said, dict):
            yield Skipped(where, "not a JSON object")
            continue
        objects, with_split = objects + 1, with_split + ("split" in said)
        if split is None or said.get("split") == split:
            yield _of_object(path, where, said)
    if split is not None and objects and not with_split:
        raise ValueError(
            f'{path}: no line says its "split"; or give a folder that has {split}.jsonl and a list of each other split'
        )


def _of_object(path: Path, where: str, said: dict[str, Any]) -> Utterance | Skipped:
    audio, text = said.get("audio", said.get("audio_filepath")), said.get("text")
    if not isinstance(audio, str) or not isinstance(text, str):
        return Skipped(where, 'no "audio" (or "audio_filepath") and "text" that are strings')
    in_samples = "start" in said or "frames" in said
    keys, kinds = (("start", "frames"), (int,)) if in_samples else (("offset", "duration"), (int, float))
    start, length = said.get(keys[0], 0), said.get(keys[1])
    if type(start) not in kinds or (length is not None and type(length) not in kinds):
        return Skipped(where, f"its {keys[0]} and {keys[1]} are not numbers{' of samples' if in_samples else ''}")
    if not in_samples:
        if not _sane(start, length or 0):
            return Skipped(where, f"its {keys[0]} and {keys[1]} are not finite numbers of seconds")
        start, length = float(start), None if length is None else float(length)
    lang = said.get("lang", "")
    if not isinstance(lang, str):
        return Skipped(where, 'its "lang" is not a string')
    if not all(map(encodable, (audio, text, lang))):
        return Skipped(where, "a lone surrogate escape such as \\ud800 is not text")
    return Utterance(where, path.parent / audio, text.strip(), start, length, lang)


def _kaldi(folder: Path) -> Iterator[Utterance | Skipped]:
    """Also what `text` does not ask for: it may be a text that was lost."""
    paths = {name: folder / name for name in ("wav.scp", "text", "segments")}
    tables: dict[str, dict[str, str]] = {}
    for name, path in paths.items():
        if name != "segments" or path.exists():
            tables[name], bad = _table(path)
            yield from bad
    audio, texts, segments = tables["wav.scp"], tables["text"], tables.get("segments")
    for key, text in texts.items():
        where, part = f"{paths['text']}: {key}", (0, None)
        recording = key
        if segments is not None:
            try:
                recording, begin, end = segments[key].split()
                part = (float(begin), float(end) - float(begin))
                if not _sane(*part):
                    raise ValueError
            except (KeyError, ValueError):
                yield Skipped(where, "no segment of a recording with two times in segments")
                continue
        if recording not in audio:
            yield Skipped(where, f"its recording is not in wav.scp: {recording}")
        elif audio[recording].endswith("|"):
            yield Skipped(where, PIPE)
        else:
            yield Utterance(where, folder / audio[recording], text, *part)
    used, unused = set(texts), "a recording without a text"
    if segments is not None:
        used = {word for line in segments.values() for word in line.split()[:1]}
        unused = "a recording without a segment"
        lost = [key for key in segments if key not in texts]
        yield from (Skipped(f"{paths['segments']}: {key}", "a segment without a text") for key in lost)
    yield from (Skipped(f"{paths['wav.scp']}: {key}", unused) for key in audio if key not in used)


def _sane(*seconds: float) -> bool:
    """JSON as Python reads it, and float(), know NaN and Infinity."""
    return all(abs(x) < 1e12 for x in seconds)


def _table(path: Path) -> tuple[dict[str, str], list[Skipped]]:
    """(id -> the rest of its line, lines that cannot be used). As in Kaldi, white space of ASCII alone separates, and a
    line ends at "\\n"."""
    table: dict[str, str] = {}
    bad = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            key, value, *_ = *(part.decode().strip() for part in line.split(None, 1)), "", ""
        except UnicodeDecodeError:
            bad.append(Skipped(f"{path}:{number}", UNREADABLE))
            continue
        if key in table:
            bad.append(Skipped(f"{path}:{number}", f"an id that is there already: {key}"))
        elif key:
            table[key] = value
    return table, bad

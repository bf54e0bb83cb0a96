"""`moe-jax transcribe`: audio files to n-best lists as HyPoradise has them, which `moe-jax correct` reads."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from moe_jax import partfile
from moe_jax.formats import audio
from moe_jax.formats.audio import LONGEST
from moe_jax.speech.recognise import FRAME, WAYS, Recogniser, Text

PORTION = 0.16  # seconds of audio that a stream is given at once
STREAMED = ("greedy", "ctc", "rescored")  # ways that read a stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "audio files (wav, flac, ogg, opus, mp3, ...); - is standard input, 16-bit samples of one channel"
    parser.add_argument("audio", nargs="+", help=what)
    parser.add_argument("--pcm-rate", type=int, help="of standard input, in samples a second (default: the model's)")
    parser.add_argument("--checkpoint", required=True, help="a run folder, or a safetensors file")
    parser.add_argument("--output", metavar="JSON", help='write a list of {"input": [n-best], "audio": ...}')
    parser.add_argument("--overwrite", action="store_true", help="replace --output where it is there already")
    parser.add_argument("--nbest", type=int, default=5, help="how many texts a recording (default: 5)")
    parser.add_argument("--beam", type=int, default=10, help="prefixes that the search keeps (default: 10)")
    what = "ctc and rescored have an n-best; attention reads whole recordings alone (default: rescored)"
    parser.add_argument("--decode", choices=WAYS, default="rescored", help=what)
    parser.add_argument("--ctc-weight", type=float, help="of rescoring: CTC's beside the decoders' (default: 0.3)")
    what = "of rescoring: the decoder from right to left (default: 0.5, or 0 if the model trained without it)"
    parser.add_argument("--reverse-weight", type=float, help=what)
    parser.add_argument("--chunk", type=int, help="frames of 40 ms read at once (default: all; with --stream 16)")
    parser.add_argument("--left", type=int, default=-1, help="chunks seen before it (default: all)")
    parser.add_argument("--stream", action="store_true", help="read as if it were being spoken, and show partial texts")


def main(args: argparse.Namespace) -> int:
    """The exit code: 1 where some audio could not be read; what could is written, also of a command that fails later.

    Raises ValueError (also CheckpointError) in one line before anything is read.
    """
    if not 1 <= args.nbest <= args.beam:
        raise ValueError(f"--nbest {args.nbest} must be from 1 to --beam {args.beam}")
    most = round(LONGEST / FRAME)
    if args.chunk is not None and not 1 <= args.chunk <= most:
        raise ValueError(f"--chunk {args.chunk} must be from 1 to {most} frames, which are {LONGEST} s")
    if args.stream and args.decode not in STREAMED:
        raise ValueError(f"--stream reads by greedy, ctc or rescored, not by --decode {args.decode}")
    if args.left >= 0 and args.chunk is None and not args.stream:
        raise ValueError(f"--left {args.left} is of chunks: give --chunk too, or --stream")
    weights = {name: x for name in ("ctc_weight", "reverse_weight") if (x := getattr(args, name)) is not None}
    if weights and args.decode != "rescored":
        raise ValueError(f"--ctc-weight and --reverse-weight are of --decode rescored, not of {args.decode}")
    low, high = audio.RATES
    if args.pcm_rate is not None and not low <= args.pcm_rate <= high:
        raise ValueError(f"--pcm-rate {args.pcm_rate} must be from {low} to {high}")
    inputs = [path for path in args.audio if path != "-"]
    if args.output and (said := partfile.unfit(Path(args.output), args.overwrite, inputs)):
        raise ValueError(said)
    seen = dict(chunk=args.chunk, left=args.left)
    by = Recogniser.load(args.checkpoint, way=args.decode, beam=args.beam, **seen, **weights)

    @functools.cache
    def ready() -> None:
        print("compiling what reads a stream", file=sys.stderr)
        by.compile()

    records: list[dict[str, Any]] = []
    failed = done = 0
    stopped = None
    try:
        with _terminated():
            for path in args.audio:
                of_path, name = 0, f"{_utf8(path).decode()}: " if len(args.audio) > 1 else ""
                try:
                    for one in _records(by, ready, path, args):
                        records.append(one)
                        of_path += 1
                        if not _said(name + one["input"][0]) and not args.output:
                            return 1
                except audio.AudioError as error:
                    kept = f"; the {of_path} texts before it are kept" if of_path else ""
                    print(f"{error}{kept}", file=sys.stderr)
                    failed += 1
                done += 1
    except KeyboardInterrupt as error:
        if not args.output or not records:
            raise
        stopped = error
    finally:
        if args.output and records:
            text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
            partfile.write_bytes(Path(args.output), _utf8(text))
    if stopped:
        print(f"interrupted after {done} of {len(args.audio)}; {args.output} has what was recognised", file=sys.stderr)
        return 143 if isinstance(stopped, _Terminated) else 130
    if failed:
        print(f"{failed} of {len(args.audio)} could not be read", file=sys.stderr)
    return 1 if failed else 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def _terminated() -> Generator[None]:
    """Within it SIGTERM ends the work as Ctrl-C does, so that nothing is lost."""

    def stop(signum: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _utf8(text: str) -> bytes:
    """Bytes of a file's name that are not UTF-8 are lone surrogates in Python, and escapes here as in JSON."""
    return text.encode("utf-8", "backslashreplace")


def _said(text: str) -> bool:
    """Prints a line at once; False where nobody reads any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        partfile.nobody_reads()
        return False
    return True


def _records(
    by: Recogniser, ready: Callable[[], None], path: str, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One of a recording; one a text of what is streamed, with the seconds where it begins and ends, as it comes.
    `ready` comes before the first that is heard as if it were being spoken."""
    if path != "-":
        if (seconds := audio.seconds(path)) > LONGEST or args.stream:
            said = f"{path}: {seconds:.1f} s"
            yield from _in_turn(by, ready, path, audio.blocks(path, by.rate, PORTION), said, args)
            return
        samples = audio.read(path, by.rate)
    else:
        if sys.stdin is None:
            raise audio.AudioError("standard input: is closed")
        if args.stream:
            ready()
            print("listening", file=sys.stderr)
        live = _Live(cast(io.BufferedReader, sys.stdin.buffer))
        with live:
            blocks = audio.pcm(live, args.pcm_rate or by.rate, by.rate, PORTION)
            held = [] if args.stream else _ahead(blocks, LONGEST * by.rate)
            if args.stream or sum(map(len, held)) > LONGEST * by.rate:
                said = f"standard input: more than {LONGEST} s"
                yield from _in_turn(by, ready, path, itertools.chain(held, blocks), said, args)
                return
        samples = np.concatenate([*held, np.zeros(0, np.float32)])
    _say_if_short(by, path, len(samples))
    yield {**record(by(samples), args.nbest), "audio": path}


def _say_if_short(by: Recogniser, path: str, samples: int) -> None:
    if not by.frames(samples):
        print(f"{path}: too short for one frame of text: {samples} samples", file=sys.stderr)


def _ahead(blocks: Iterator[np.ndarray], samples: int) -> list[np.ndarray]:
    """Those with more samples than that, or all there are."""
    out, found = [], 0
    while found <= samples and (block := next(blocks, None)) is not None:
        out.append(block)
        found += len(block)
    return out


def _in_turn(
    by: Recogniser,
    ready: Callable[[], None],
    path: str,
    blocks: Iterator[np.ndarray],
    length: str,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """What is long (`length` says of what, and how), or as if it were being spoken."""
    if by.way not in STREAMED:
        said = f"{length}, and {by.way} reads no more than {LONGEST} s at once"
        raise audio.AudioError(f"{said}: choose another --decode, or cut it")
    if args.stream:
        ready()
    else:
        audio.say_once(f"what is longer than {LONGEST} s is read as with --stream, a record a text")
    yield from _streamed(by, path, blocks, args)


class _Ended(Exception):
    """The user ended what was being heard."""


class _Live(partfile.Signals):
    """Standard input. Within it Ctrl-C or SIGTERM is its end, so that what was heard is read out; Ctrl-C after that
    stops at once.
    """

    def __init__(self, file: audio.Bytes) -> None:
        super().__init__()
        self._file, self._waiting = file, False

    def _catch(self, signum: int, frame: Any) -> None:
        if self.caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = signum
        if self._waiting:  # a read goes on after a signal, unless its handler raises
            self._waiting = False
            raise _Ended

    def read(self, size: int) -> bytes:
        return self._until_caught(self._file.read, size)

    def read1(self, size: int) -> bytes:
        return self._until_caught(self._file.read1, size)

    def _until_caught(self, function: Callable[[int], bytes], size: int) -> bytes:
        if self.caught:
            return b""
        try:
            self._waiting = True
            data = function(size)
            self._waiting = False
        except _Ended:
            return b""
        return data


def record(texts: Sequence[Text], nbest: int) -> dict[str, Any]:
    """HyPoradise's "input", and beside it scores and times; a recording without a text has an empty one."""
    texts = texts[:nbest] or [Text("", 0.0, ())]
    return {
        "input": [t.text for t in texts],
        "scores": [round(t.score, 3) for t in texts],
        "times": [round(x, 2) for x in texts[0].times],
    }


def _streamed(
    by: Recogniser, path: str, blocks: Iterable[np.ndarray], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Shows what is understood while it is heard, on a terminal in one line that changes, and hands on what is final.
    Silence is no text, unless it is all."""
    watched = sys.stderr.isatty()
    begin, end = ("\r\033[K", "") if watched else ("", "\n")
    finals, total, until, shown, took = 0, 0.0, 0.0, "", []
    for update in by.stream(blocks):
        total += update.took
        if update.final or update.until > until:  # the others wait for a chunk to fill
            took.append(update.took)
        until = update.until
        best = update.texts[0].text if update.texts else ""
        if update.texts and (update.final or (best != shown and (args.stream or watched))):
            print(f"{begin}{update.end:8.2f} s  {best}", end="\n" if update.final else end, file=sys.stderr)
        shown = "" if update.final else best
        if update.final and best:
            finals += 1
            times = {"start": round(update.start, 2), "end": round(update.until, 2)}
            yield {**record(update.texts, args.nbest), "audio": path, **times}
    if not finals:
        _say_if_short(by, path, round(update.end * by.rate))
        yield {**record([], args.nbest), "audio": path, "start": 0.0, "end": round(update.end, 2)}
    p50, p95, most = np.percentile(took, (50, 95, 100))
    times = f"a portion's p50 {p50:.3f} s, p95 {p95:.3f} s, max {most:.3f} s"
    included = "" if args.stream else ", compiling included"
    speed = f"real-time factor {total / max(update.end, 1e-9):.3f}"
    print(f"{path}: {update.end:.1f} s, {speed}, {times}{included}", file=sys.stderr)

"""`moe-jax transcribe`: audio files to n-best lists as HyPoradise has them, which `moe-jax correct` reads."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import partfile
from moe_jax.formats import audio
from moe_jax.speech.recognise import WAYS, Recogniser, Text

PORTION = 0.16  # seconds of audio that a stream is given at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "audio files (wav, flac, ogg, opus, mp3, ...); - is standard input, 16-bit samples of one channel"
    parser.add_argument("audio", nargs="+", help=what)
    parser.add_argument("--pcm-rate", type=int, help="of standard input, in samples a second (default: the model's)")
    parser.add_argument("--checkpoint", required=True, help="a run folder, or a safetensors file")
    parser.add_argument("--output", metavar="JSON", help='write a list of {"input": [n-best], "audio": ...}')
    parser.add_argument("--nbest", type=int, default=5, help="how many texts a recording (default: 5)")
    parser.add_argument("--beam", type=int, default=10, help="prefixes that the search keeps (default: 10)")
    what = "ctc and rescored have an n-best; attention reads whole recordings alone (default: rescored)"
    parser.add_argument("--decode", choices=WAYS, default="rescored", help=what)
    parser.add_argument("--chunk", type=int, help="frames of 40 ms read at once (default: all; with --stream 16)")
    parser.add_argument("--left", type=int, default=-1, help="chunks seen before it (default: all)")
    parser.add_argument("--stream", action="store_true", help="read as if it were being spoken, and show partial texts")


def main(args: argparse.Namespace) -> int:
    """Raises ValueError (also CheckpointError, AudioError) in one line; then nothing is written."""
    if args.nbest > args.beam or args.nbest < 1 or (args.chunk is not None and args.chunk < 1):
        raise ValueError(f"--nbest {args.nbest} must be from 1 to --beam {args.beam}, and --chunk 1 or more")
    if args.stream and args.decode not in ("ctc", "rescored"):
        raise ValueError(f"--stream reads by ctc or rescored, not by --decode {args.decode}")
    by = Recogniser.load(args.checkpoint, way=args.decode, beam=args.beam, chunk=args.chunk, left=args.left)
    records = []
    for path in args.audio:
        blocks = functools.partial(_blocks, path, by.rate, args.pcm_rate or by.rate)
        if args.stream:
            texts = _streamed(by, path, blocks())
        else:
            texts = by(np.concatenate([*blocks()]) if path == "-" else audio.read(path, by.rate))
        records.append({**record(texts, args.nbest), "audio": path})
        print(texts[0].text if texts else "", flush=True)
    if args.output:
        partfile.write_text(Path(args.output), json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return 0


def record(texts: Sequence[Text], nbest: int) -> dict[str, Any]:
    """HyPoradise's "input", and beside it scores and times; a recording without a text has an empty one."""
    texts = texts[:nbest] or [Text("", 0.0, ())]
    return {
        "input": [t.text for t in texts],
        "scores": [round(t.score, 3) for t in texts],
        "times": [round(x, 2) for x in texts[0].times],
    }


def _blocks(path: str, rate: int, own_rate: int) -> Iterator[np.ndarray]:
    if path == "-":
        return audio.pcm(sys.stdin.buffer, own_rate, rate, PORTION)
    return audio.blocks(path, rate, PORTION)


def _streamed(by: Recogniser, path: str, blocks: Iterable[np.ndarray]) -> list[Text]:
    """Shows what is understood while it is heard."""
    list(by.stream([np.zeros(by.rate, np.float32)]))  # compiles
    finals, took, end, slowest = [], 0.0, 0.0, 0.0
    for update in by.stream(blocks):
        took, end, slowest = took + update.took, update.end, max(slowest, update.took)
        if update.texts and (update.final or sys.stderr.isatty()):
            print(f"\r{update.end:8.2f} s  {update.texts[0].text}", end="\n" if update.final else "", file=sys.stderr)
        finals += [update.texts] if update.final and update.texts else []
    speed = f"real-time factor {took / max(end, 1e-9):.3f}, slowest portion {slowest:.3f} s"
    print(f"{path}: {end:.1f} s, {speed}", file=sys.stderr)
    return _joined(finals, by.beam)


def _joined(finals: Sequence[list[Text]], most: int) -> list[Text]:
    """The best ways to choose one text of each final."""
    found = [Text("", 0.0, ())]
    for texts in finals:
        ways = [Text(f"{a.text} {b.text}".strip(), a.score + b.score, a.times + b.times) for a in found for b in texts]
        found = sorted({way.text: way for way in reversed(ways)}.values(), key=lambda way: -way.score)[:most]
    return found if finals else []

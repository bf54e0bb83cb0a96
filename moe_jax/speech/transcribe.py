"""`moe-jax transcribe`: audio files to n-best lists as HyPoradise has them, which `moe-jax correct` reads. And the job
that scores a trained model on a list of utterances."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_jax import partfile
from moe_jax.metrics import errors
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.metrics.scoring import markdown
from moe_jax.speech import features, manifest
from moe_jax.speech.recognise import Recogniser, Text

PORTION = 0.16  # seconds of audio that a stream is given at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("audio", nargs="+", help="audio files (wav, flac, ogg, opus, mp3, ...)")
    parser.add_argument("--checkpoint", required=True, help="a run folder, or a safetensors file")
    parser.add_argument("--output", metavar="JSON", help='write a list of {"input": [n-best], "audio": ...}')
    parser.add_argument("--nbest", type=int, default=5, help="how many texts a recording (default: 5)")
    parser.add_argument("--beam", type=int, default=10, help="prefixes that the search keeps (default: 10)")
    parser.add_argument("--chunk", type=int, help="frames of 40 ms read at once (default: all; with --stream 16)")
    parser.add_argument("--left", type=int, default=-1, help="chunks seen before it (default: all)")
    parser.add_argument("--stream", action="store_true", help="read as if it were being spoken, and show partial texts")


def main(args: argparse.Namespace) -> int:
    """Raises ValueError (also CheckpointError, AudioError) in one line; then nothing is written."""
    if args.nbest > args.beam or args.nbest < 1 or (args.chunk is not None and args.chunk < 1):
        raise ValueError(f"--nbest {args.nbest} must be from 1 to --beam {args.beam}, and --chunk 1 or more")
    by = Recogniser.load(args.checkpoint, beam=args.beam, chunk=args.chunk, left=args.left)
    records = []
    for path in args.audio:
        texts = _streamed(by, path) if args.stream else by(features.read(path, by.rate))
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


def _streamed(by: Recogniser, path: str) -> list[Text]:
    """Shows what is understood while it is heard."""
    list(by.stream([np.zeros(by.rate, np.float32)]))  # compiles
    finals, took, end, slowest = [], 0.0, 0.0, 0.0
    for update in by.stream(features.blocks(path, by.rate, PORTION)):
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


def evaluate(
    run_dir: str, *, manifest: str, split: str | None = "test", chunk: int = 16, beam: int = 10, nbest: int = 5
) -> None:
    """Word error rates of a run's best model on a list of utterances: whole recordings by CTC alone, after rescoring,
    and in chunks of `chunk` frames with rescoring; in `run_dir`/wer.md, and the n-best of whole recordings with their
    references as HyPoradise has them in `run_dir`/nbest.json.

    Raises ValueError where no utterance can be read.
    """
    by = Recogniser.load(run_dir, beam=beam)
    ways = {
        "whole, CTC": (by, False),
        "whole, rescored": (by, True),
        f"chunks of {chunk}, rescored": (dataclasses.replace(by, chunk=chunk), True),
    }
    texts: dict[str, list[str]] = {name: [] for name in ways}
    references, records, skipped, took, seconds = [], [], 0, 0.0, 0.0
    for samples, reference in tqdm(_read(manifest, split, by.rate), unit=" utterances", disable=None):
        if samples is None:
            skipped += 1
            continue
        references.append(reference)
        for name, (way, rescore) in ways.items():
            began = time.perf_counter()
            found = way(samples, rescore=rescore)
            if name == "whole, rescored":
                took, seconds = took + time.perf_counter() - began, seconds + len(samples) / by.rate
                records.append({**record(found, nbest), "output": reference})
            texts[name].append(found[0].text if found else "")
    if not references:
        raise ValueError(f"{manifest}: no utterance of the split {split!r} can be read")
    normaliser = family_normaliser("asr")
    table = [("", "WER %", "errors", "words"), ("---", "--:", "--:", "--:")]
    for name, hypotheses in texts.items():
        counts = errors.wer(references, hypotheses, normaliser)
        table.append((name, f"{100 * counts.rate:.2f}", str(counts.errors), str(counts.reference_length)))
    about = f"{len(references)} utterances ({skipped} could not be read), real-time factor {took / seconds:.3f}"
    text = f"{markdown(table)}\n{about}, compiling included; words as {normaliser.signature} has them.\n"
    partfile.write_text(Path(run_dir) / "wer.md", text)
    partfile.write_text(Path(run_dir) / "nbest.json", json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    print(text)


def _read(path: str, split: str | None, rate: int):
    """(samples, or None where they cannot be read; reference) of each utterance."""
    for one in list(manifest.read(path, split)):
        if isinstance(one, manifest.Skipped):
            yield None, ""
            continue
        try:
            yield features.read(one.audio, rate, start=one.start, length=one.length), one.text
        except features.AudioError:
            yield None, one.text

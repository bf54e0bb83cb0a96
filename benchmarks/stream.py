"""An hour of speech streamed: how long each portion takes, and whether memory grows.

    python -m benchmarks.stream --checkpoint runs/u2pp/prompts-moe-0 --minutes 60

The audio is the recordings that are shipped, one after another with half a second between them, again and again. Each
portion of 160 ms is handed over when the one before is done; "ours" is what the machine took for one in which the
encoder ran (the others only wait for a chunk to fill; of finals: for the second pass, too) and the rival the 160 ms
that it lasts: a ratio below 1 keeps up with a speaker. All programs are compiled before. Memory is the most that the
process held after the first tenth, against the most within it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.measure import machine, markdown, row
from moe_jax import launch, main, partfile
from moe_jax.formats import manifest
from moe_jax.speech.recognise import Recogniser, Update
from moe_jax.speech.transcribe import PORTION

ROOT = Path(__file__).resolve().parents[1]


def speech(rate: int, path: str, minutes: float) -> Iterator[np.ndarray]:
    """Portions of the utterances of a list."""
    size, left = round(PORTION * rate), round(minutes * 60 / PORTION)
    said = (u.samples(rate) for u in itertools.cycle(list(manifest.read(path))) if isinstance(u, manifest.Utterance))
    held = np.zeros(0, np.float32)
    while left:
        while len(held) < size:
            held = np.concatenate([held, next(said), np.zeros(rate // 2, np.float32)])
        yield held[:size]
        held, left = held[size:], left - 1


def memory() -> float:
    """MB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def timed(updates: Iterable[Update], minutes: float) -> list[dict[str, Any]]:
    """The rows of a stream of so many minutes, timed and weighed while it is heard."""
    ran, finals, total, until, early, late = [], [], 0.0, 0.0, 0.0, 0.0
    for update in updates:
        total += update.took
        if update.final:
            finals.append(update.took)
        elif update.until > until:
            ran.append(update.took)
        until = update.until
        if update.end <= minutes * 60 / 10:
            early = max(early, memory())
        else:
            late = max(late, memory())
    columns = {"unit": "s", "number": len(ran)}
    rows = [row(f"portion, p{p}", float(np.percentile(ran, p)), PORTION, 1.0, **columns) for p in (50, 95, 99, 100)]
    columns = {"unit": "s", "number": len(finals)}
    rows += [row(f"final, p{p}", float(np.percentile(finals, p)), PORTION, None, **columns) for p in (50, 95, 99)]
    rows.append(row("real-time factor", total / (minutes * 60), 1.0, 1.0, unit="", number=1))
    return [*rows, row("memory", late, early, 1.02, unit="MB", number=1)]


def run() -> None:
    launch.command()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--manifest", default=main.prompts())
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--chunk", type=int, default=16, help="frames of 40 ms")
    args = parser.parse_args()
    by = Recogniser.load(args.checkpoint, chunk=args.chunk)
    by.compile()
    heard = by.stream(speech(by.rate, args.manifest, args.minutes))
    rows = timed(tqdm(heard, total=round(args.minutes * 60 / PORTION), unit=" portions"), args.minutes)
    command = f"python -m benchmarks.stream --checkpoint {args.checkpoint} --minutes {args.minutes:g}"
    made = {"command": command, "date": datetime.date.today().isoformat(), "machine": machine(), "rows": rows}
    partfile.write_text(ROOT / "results" / "speed" / "stream.json", json.dumps(made, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    run()

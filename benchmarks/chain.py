"""Speech -> n-best -> correction with models of this project alone; leaves results/chain/table.json.

    python -m benchmarks.chain --seeds 0 1 2

A recogniser (`benchmarks.u2pp`, arm `moe`, on the shipped prompts or those of --list) hears every split; runs/own.gin
trains a corrector on the n-best lists of the training audio, tunes its guard on those of the validation audio, and
scores those of the held-out audio: word error rates before and after, and the oracles. The recogniser knows its
training audio too well, so that is heard twice, whole and in chunks, which it reads worse. What is finished
(results/chain/runs) is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import arms, kept, u2pp
from benchmarks.launch import ROOT, launch
from moe_jax import partfile
from moe_jax.formats.manifest import Skipped
from moe_jax.speech import evaluate
from moe_jax.speech.recognise import Recogniser

EXPERIMENT, CORPUS, ARM = "chain", "prompts", "moe"
CHUNK, NBEST = 16, 5


def lists(readers: Sequence[Recogniser], path: str, split: str) -> list[dict[str, Any]]:
    """The n-best of every utterance by every reader (all of one rate), with its reference. What cannot be used
    (`evaluate.read`) is listed and counted."""
    out, skipped = [], []
    for utterance in tqdm(evaluate.read(path, split, readers[0].rate), f"hearing {split}", disable=None):
        if isinstance(utterance, Skipped):
            skipped.append(f"  {utterance.where}: {utterance.reason}")
            continue
        samples, one = utterance
        for by in readers:
            found = [t.text for t in by(samples)[:NBEST]]
            out.append({"hypotheses": found or [""], "reference": one.text})
    if skipped:
        print(f"{split}: {len(skipped)} utterances are left out:", *skipped, sep="\n")
    return out


def heard(folder: Path, run: Path, path: str) -> None:
    """Writes {train,valid,test}.jsonl of lists where they are not."""
    whole = Recogniser.load(run)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        file = folder / f"{split}.jsonl"
        readers = [whole, dataclasses.replace(whole, chunk=CHUNK)] if split == "train" else [whole]
        if not file.exists():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in lists(readers, path, split))
            partfile.write_text(file, "".join(lines))


def made(path: str, seed: int) -> dict[str, Any]:
    """What the table needs (`arms.of_run`) of a corrector of a recogniser, both trained where they are not."""
    folder, run = ROOT / "prepared" / f"chain-{seed}", Path("runs/chain") / f"{CORPUS}-{seed}"
    for at in (folder, ROOT / run):
        kept.claim(at, kept.digest(path))
    heard(folder, u2pp.made(CORPUS, path, ARM, seed), path)
    about: dict[str, Any] = {"RUN_DIR": run, "SEED": seed, "FOLDER": folder, "FAMILY": "asr"}
    about |= {"DATA": f"prepared/chain-{seed}.rows", "VALID_DATA": f"prepared/chain-{seed}.valid"}
    launch(["runs/own.gin"], about)
    return arms.of_run(ROOT / run)


def table(runs: dict[int, dict[str, Any]], command: str) -> dict[str, Any]:
    """The evidence table: each seed has a recogniser, and so a first pass, of its own."""
    rows: list[dict[str, Any]] = []
    for seed, found in runs.items():
        rows += [row | {"seed": seed} for row in arms.references_of(found["scores"])]
        rows += arms.rows_of("corrected", seed, found["scores"])
    meta = {"split": "test", "date": max(found["scores"]["meta"]["date"] for found in runs.values())}
    return {"experiment": EXPERIMENT, "meta": meta | {"command": command}, "rows": rows}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", default="", help="utterances (default: the shipped prompts)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    args = parser.parse_args()
    names = {seed: f"{CORPUS}-{seed}" for seed in args.seeds}
    if not args.collect:
        try:
            path = u2pp.list_of(args.list)
        except ValueError as error:
            parser.error(str(error))
        for seed, name in names.items():
            kept.once(EXPERIMENT, name, lambda seed=seed: made(path, seed), kept.digest(path))
    runs = {seed: found for seed, name in names.items() if (found := kept.read(EXPERIMENT, name))}
    seeds, listed = " ".join(map(str, args.seeds)), f" --list {Path(args.list).name}" if args.list else ""
    command = f"python -m benchmarks.chain{listed} --seeds {seeds}"
    out = ROOT / "results" / EXPERIMENT / "table.json"
    partfile.write_text(out, json.dumps(table(runs, command), indent=1) + "\n")


if __name__ == "__main__":
    run()

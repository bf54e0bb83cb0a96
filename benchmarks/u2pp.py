"""Train the arms of gin/experiments/u2pp on several corpora and seeds, and leave results/u2pp/table.json.

    python -m benchmarks.u2pp --corpora digits=fsdd.jsonl speaker=fsdd.speaker.jsonl prompts --seeds 0 1 2

A corpus is NAME=LIST, a list of utterances that has train, valid and test; digits and speaker are those of 8 kHz that
gin/runs/digits.gin is for, all others get the sizes of gin/data/prompts.gin, and "prompts" without a list are the
English ones that are shipped. `--hold-out SPEAKER LIST` writes LIST's twin whose test split is that speaker alone. Word
and character error rates of every decoding, whole and in chunks; each arm against `dense` on the same utterances.
What is finished (results/u2pp/runs) is not run
again, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kept
from benchmarks.launch import launch
from moe_jax import checkpoint, main, partfile
from moe_jax.metrics import significance
from moe_jax.speech import evaluate

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("dense", "moe", "wide")  # wide: dense, with as many parameters in all as moe
DIGITS = ("digits", "speaker")


def run(corpus: str, path: str, arm: str, seed: int, extra: list[str]) -> None:
    """Trains and scores the arm if it is not kept."""
    folder = Path("runs/u2pp") / f"{corpus}-{arm}-{seed}"

    def make() -> dict[str, Any]:
        print(f"--- {corpus}, {arm}, seed {seed} -> {folder}", flush=True)
        sizes = [] if corpus in DIGITS else ["data/prompts.gin"]
        about = {"RUN_DIR": folder, "SEED": seed, "MANIFEST": path}
        about |= {"DATA": f"prepared/{corpus}", "VALID_DATA": f"prepared/{corpus}.valid"}
        launch([f"experiments/u2pp/{arm}.gin", *sizes], about, extra)
        return of_run(ROOT / folder)

    kept.once("u2pp", f"{corpus}-{arm}-{seed}", make)


def of_run(folder: Path) -> dict[str, Any]:
    """What the table needs of a run folder: {"scores", "said": a line each utterance, "parameters", "date"}."""
    scores = json.loads((folder / "scores.json").read_text("utf-8"))["rows"]
    said = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text("utf-8").splitlines()]
    table, _ = checkpoint.read_safetensors(str(folder / "model.safetensors"))
    size = sum(x.size for x in table.values())
    return {"scores": scores, "said": said, "parameters": size, "date": datetime.date.today().isoformat()}


def rows_of(
    corpus: str, arm: str, seed: int, found: dict[str, Any], dense: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The run's scores (`of_run`), each decoding against the dense arm's of the same seed."""
    rows: list[dict[str, Any]] = []
    for row in found["scores"]:
        about = {"arm": arm, "seed": seed, "task": corpus, "set": row["set"], "decoding": row["decoding"]}
        about |= {
            "metric": row["metric"],
            "value": row["value"],
            "value_ci95": row["value_ci95"],
            "lines": row["lines"],
        }
        change: dict[str, Any] = {"relative_change": None, "ci95": None, "p_value": None}
        if dense:
            before, after = (
                evaluate.counted(
                    [one for one in said if row["set"] in (evaluate.ALL, one["lang"])], row["decoding"], row["metric"]
                )
                for said in (dense["said"], found["said"])
            )
            test = significance.compare(before, after)
            change = {"relative_change": test.relative_change, "ci95": test.ci95, "p_value": test.p_value}
            change = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in change.items()}
        rows.append(about | change)
    nothing = {"ci95": None, "p_value": None}
    about = {"arm": arm, "seed": seed, "task": corpus, "set": evaluate.ALL, "metric": "parameters"}
    return [*rows, about | {"value": found["parameters"]} | nothing]


def hold_out(speaker: str, path: Path) -> Path:
    """A list beside `path` whose test split is one speaker, and whose other splits are without. Returns it."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not any(line.get("speaker") == speaker for line in lines):
        known = sorted({str(line.get("speaker")) for line in lines})
        raise ValueError(f"{path}: has no speaker {speaker!r}; it has {', '.join(known)}")
    own = [{**line, "split": "test"} for line in lines if line["speaker"] == speaker]
    rest = [{**line, "split": "train" if line["split"] == "test" else line["split"]} for line in lines]
    made = [*own, *(line for line in rest if line["speaker"] != speaker)]
    made = [{**line, "audio": str((path.parent / line["audio"]).absolute())} for line in made]
    out = ROOT / "prepared" / f"{path.stem}.{speaker}.jsonl"
    out.parent.mkdir(exist_ok=True)
    partfile.write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in made))
    return out


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpora", nargs="+", default=["prompts"], metavar="NAME=LIST")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    parser.add_argument("--hold-out", nargs=2, metavar=("SPEAKER", "LIST"), help="write such a list, and end")
    args, extra = parser.parse_known_args()
    if args.hold_out:
        print(hold_out(args.hold_out[0], Path(args.hold_out[1])))
        return
    corpora = {name: path or main.prompts() for name, _, path in map(_parted, args.corpora)}
    for seed in args.seeds if not args.collect else ():  # seed by seed, so that every arm has one first
        for corpus, path in corpora.items():
            for arm in args.arms:
                run(corpus, str(Path(path).absolute()), arm, seed, extra)
    _write(args, list(corpora))


def _parted(given: str) -> tuple[str, str, str]:
    return given.partition("=")


def _write(args: argparse.Namespace, corpora: list[str]) -> None:
    """The table of what was asked for and is finished."""
    rows: list[dict[str, Any]] = []
    dates = [""]
    for seed, corpus in itertools.product(args.seeds, corpora):
        runs = {arm: kept.read("u2pp", f"{corpus}-{arm}-{seed}") for arm in args.arms}
        for arm, found in runs.items():
            if found:
                dates.append(found["date"])
                rows += rows_of(corpus, arm, seed, found, runs.get("dense") if arm != "dense" else None)
    given, seeds = " ".join(corpora), " ".join(map(str, args.seeds))
    meta = {"split": "test", "date": max(dates)}
    meta["command"] = f"python -m benchmarks.u2pp --corpora {given} --seeds {seeds}"
    output = ROOT / "results" / "u2pp" / "table.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(output, json.dumps({"experiment": "u2pp", "meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_all()

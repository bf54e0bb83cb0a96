"""Train the arms of gin/experiments/u2pp on several corpora and seeds, and leave results/u2pp/table.json.

    python -m benchmarks.u2pp --corpora digits=fsdd.jsonl speaker=fsdd.speaker.jsonl prompts five=all.jsonl

A corpus is NAME=LIST, a list of utterances that has train, valid and test; digits and speaker are those of 8 kHz that
gin/runs/digits.gin is for, all others get the sizes of gin/data/prompts.gin, "five" (prompts in five languages) more
steps, and "prompts" without a list are the English ones that are shipped. `--hold-out SPEAKER LIST` writes LIST's twin
whose test split is that speaker alone. Word and character error rates of every decoding, whole and in chunks; each arm
against `dense` on the same utterances. What is finished (results/u2pp/runs) is not run again, what was interrupted goes
on.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kept
from benchmarks.launch import launch
from moe_jax import checkpoint, main, partfile
from moe_jax.metrics import significance
from moe_jax.metrics.scoring import finite
from moe_jax.speech import evaluate

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("dense", "moe", "wide")  # wide: dense, with as many parameters in all as moe
DIGITS = ("digits", "speaker")
STEPS = {"five": 2000}  # where they are not those of the gin file
NO_CHANGE: dict[str, Any] = {"relative_change": None, "ci95": None, "p_value": None}


def run(corpus: str, path: str, arm: str, seed: int, extra: list[str]) -> None:
    """Trains and scores the arm if it is not kept."""
    make = lambda: of_run(made(corpus, path, arm, seed, extra))  # noqa: E731
    kept.once("u2pp", f"{corpus}-{arm}-{seed}", make, kept.digest(path, *extra))


def made(corpus: str, path: str, arm: str, seed: int, extra: Sequence[str] = ()) -> Path:
    """The arm's run folder, trained and scored where it is not."""
    folder = Path("runs/u2pp") / f"{corpus}-{arm}-{seed}"
    kept.claim(ROOT / folder, kept.digest(path, *extra))
    if not (ROOT / folder / "scores.json").exists():
        print(f"--- {corpus}, {arm}, seed {seed} -> {folder}", flush=True)
        sizes = [] if corpus in DIGITS else ["data/prompts.gin"]
        about = {"RUN_DIR": folder, "SEED": seed, "MANIFEST": path}
        about |= {"DATA": f"prepared/{corpus}", "VALID_DATA": f"prepared/{corpus}.valid"}
        about |= {"STEPS": STEPS[corpus]} if corpus in STEPS else {}
        launch([f"experiments/u2pp/{arm}.gin", *sizes], about, extra)
    return ROOT / folder


def of_run(folder: Path) -> dict[str, Any]:
    """What the table needs of a run folder: {"scores", "said": a line each utterance, "parameters", "minutes" of
    training, compiling and validating included, "date"}."""
    scores = json.loads((folder / "scores.json").read_text("utf-8"))["rows"]
    said = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text("utf-8").splitlines()]
    table, _ = checkpoint.read_safetensors(str(folder / "model.safetensors"))
    size = sum(x.size for x in table.values())
    spent = json.loads((folder / "goodput.json").read_text("utf-8"))["seconds"]
    minutes = sum(x for kind, x in spent.items() if kind != "down") / 60
    about = {"parameters": size, "minutes": round(minutes, 2), "date": datetime.date.today().isoformat()}
    return {"scores": scores, "said": said, **about}


def rows_of(
    corpus: str, arm: str, seed: int, found: dict[str, Any], dense: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The run's scores (`of_run`), each decoding against the dense arm's of the same seed."""
    rows: list[dict[str, Any]] = []
    for row in found["scores"]:
        values = {name: row[name] for name in ("value", "value_ci95", "lines")}
        change = _change(_counts(dense, row), _counts(found, row)) if dense else NO_CHANGE
        rows.append(_about(corpus, arm, seed, row) | values | change)
    nothing = {"ci95": None, "p_value": None}
    about = {"arm": arm, "seed": seed, "task": corpus, "set": evaluate.ALL}
    sizes = [name for name in ("parameters", "minutes") if name in found]  # older runs say no minutes
    return [*rows, *(about | {"metric": name, "value": found[name]} | nothing for name in sizes)]


def over_seeds(
    corpus: str, arm: str, runs: Sequence[dict[str, Any]], dense: Sequence[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Rows of seed None: the errors of an utterance are summed over the runs, and over the dense arm's of the same
    seeds, so that interval and p are those of all of them.
    """
    rows = []
    for row in runs[0]["scores"]:
        after = np.sum([_counts(found, row) for found in runs], axis=0)
        ci95 = significance.compare(after, after).corrected_ci95
        rate = float(significance.error_rate(after.sum(0, keepdims=True))[0])
        values = {"value": rate, "value_ci95": [finite(end) for end in ci95], "lines": len(after)}
        before = np.sum([_counts(found, row) for found in dense or []], axis=0)
        change = _change(before, after) if dense else NO_CHANGE
        rows.append(_about(corpus, arm, None, row) | values | change)
    return rows


def _about(corpus: str, arm: str, seed: int | None, row: dict[str, Any]) -> dict[str, Any]:
    names = ("set", "decoding", "metric")
    return {"arm": arm, "seed": seed, "task": corpus, **{name: row[name] for name in names}}


def _counts(found: dict[str, Any], row: dict[str, Any]) -> np.ndarray:
    """Nx2: errors and length of each utterance of the row's set."""
    said = [one for one in found["said"] if row["set"] in (evaluate.ALL, one["lang"])]
    return evaluate.counted(said, row["decoding"], row["metric"])


def _change(before_Nx2: np.ndarray, after_Nx2: np.ndarray) -> dict[str, Any]:
    test = significance.compare(before_Nx2, after_Nx2)
    change = {"relative_change": test.relative_change, "ci95": test.ci95, "p_value": test.p_value}
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in change.items()}


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


def list_of(path: str) -> str:
    """The whole path of a list of utterances, or of the shipped prompts. Raises ValueError for what is not a file."""
    if path and not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "not there"
        raise ValueError(f"{path} is {what}: give a file, whose lines say audio, text and split (train, valid, test)")
    return str(Path(path or main.prompts()).absolute())


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpora", nargs="+", default=["prompts"], metavar="NAME=LIST")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    parser.add_argument("--hold-out", nargs=2, metavar=("SPEAKER", "LIST"), help="write such a list, and end")
    args, extra = parser.parse_known_args()
    try:
        if args.hold_out:
            print(hold_out(args.hold_out[0], Path(list_of(args.hold_out[1]))))
            return
        given = {name: path for name, _, path in map(_parted, args.corpora)}
        corpora = given if args.collect else {name: list_of(path) for name, path in given.items()}
    except ValueError as error:
        parser.error(str(error))
    for seed in args.seeds if not args.collect else ():  # seed by seed, so that every arm has one first
        for corpus, path in corpora.items():
            for arm in args.arms:
                run(corpus, path, arm, seed, extra)
    _write(args, list(corpora), extra)


def _parted(given: str) -> tuple[str, str, str]:
    return given.partition("=")


def _write(args: argparse.Namespace, corpora: list[str], extra: Sequence[str] = ()) -> None:
    """The table of what was asked for and is finished."""
    rows: list[dict[str, Any]] = []
    dates = [""]
    for seed, corpus in itertools.product(args.seeds, corpora):
        runs = {arm: kept.read("u2pp", f"{corpus}-{arm}-{seed}") for arm in args.arms}
        for arm, found in runs.items():
            if found:
                dates.append(found["date"])
                rows += rows_of(corpus, arm, seed, found, runs.get("dense") if arm != "dense" else None)
    for corpus, arm in itertools.product(corpora, args.arms):
        pairs = [[kept.read("u2pp", f"{corpus}-{name}-{seed}") for name in (arm, "dense")] for seed in args.seeds]
        pairs = [(found, dense) for found, dense in pairs if found]
        if len(pairs) > 1:
            dense = [dense for _, dense in pairs if dense]
            whole = arm != "dense" and len(dense) == len(pairs)
            rows += over_seeds(corpus, arm, [found for found, _ in pairs], dense if whole else None)
    given, seeds = " ".join(args.corpora), " ".join(map(str, args.seeds))
    more = ([f"--arms {' '.join(args.arms)}"] if args.arms != list(ARMS) else []) + list(extra)
    meta = {"split": "test", "date": max(dates)}
    meta["command"] = " ".join([f"python -m benchmarks.u2pp --corpora {given} --seeds {seeds}", *more])
    output = ROOT / "results" / "u2pp" / "table.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(output, json.dumps({"experiment": "u2pp", "meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_all()

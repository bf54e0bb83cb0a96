"""Score corrections of test sets, ours beside those of any other system: `moe-jax score`.

A file of records with references is a set. The model is a callable, and another system is what it wrote, in a file.
Everything is read and checked before a model is loaded, and written once all of it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import formats
from moe_jax.formats import Bad, FormatError, Record, objects
from moe_jax.metrics import errors, oracles
from moe_jax.metrics.errors import ErrorCounts
from moe_jax.metrics.normalisers import FAMILY_NORMALISER, HYPO2TRANS, NORMALISERS, Normaliser, family_normaliser
from moe_jax.metrics.scoring import ALL, finite, markdown, percent
from moe_jax.metrics.significance import Score, compare, error_rate

Row = dict[str, Any]
Sets = Mapping[str, Sequence[Record]]
Texts = Mapping[str, Sequence[str]]  # set -> one text a record
System = tuple[str, int | None]  # name, and seed where a model was trained several times
Correct = Callable[[Sequence[Record]], Sequence[tuple[str, str]]]  # one (guarded, unguarded) text a record

FIRST = "first pass"
ORACLES = {"oracle n-best": oracles.n_best, "oracle compositional": oracles.compositional}
AVERAGE = "average"
"""The `set` of the plain mean over sets, as papers report it; `ALL` is that of their lines together."""
DISTINCT = "distinct hypotheses: "
"""Begins the `set` of those of all lines whose lists hold so many."""

KEYS = ("corrected", "prediction")  # of predictions in JSON, the first that a record has


def read_sets(paths: Sequence[str | Path], family: str) -> dict[str, list[Record]]:
    """The records of each file, by the file's name without extensions.

    Raises ValueError, in one line, for a file that cannot be read, a record without a reference or of another family,
    and two files of one name.
    """
    sets: dict[str, list[Record]] = {}
    for path in map(Path, paths):
        name = set_name(path)
        if name in sets or name in (AVERAGE, ALL):
            raise ValueError(f"{path}: a set called {name!r} would stand in the table twice; rename the file")
        sets[name] = list(formats.read(path))
        for record in sets[name]:
            if record.reference is None:
                fix = 'scoring needs the right text under "output" or "reference"'
                raise FormatError(path, record.line, "the record has no reference", fix)
            if record.task not in (None, family):
                fix = f"score it apart, with --family {record.task}"
                raise FormatError(path, record.line, f"its task is {record.task!r}, not {family!r}", fix)
        if not sets[name]:
            raise FormatError(path, None, "holds no records", "give a set with some")
    return sets


def set_name(path: Path) -> str:
    """`ls_clean` of `ls_clean.json.xz`."""
    return (path.with_suffix("") if path.suffix.lower() in formats.OPENERS else path).stem


def read_predictions(path: str | Path, lines: int, keys: Sequence[str] = KEYS) -> list[str]:
    """What another system wrote for each of `lines` records, in their order.

    Plain text has one prediction a line; a record of JSON or JSONL has it under one of `keys`, and there an empty
    string says that the system wrote nothing, which plain text cannot.

    Raises FormatError, in one line that names the record, where a prediction is missing or not text, or where there
    are more or fewer than `lines`.
    """
    fmt = formats.detect(path)
    if fmt == "tsv":
        raise FormatError(path, None, "predictions in columns are not read", "give text, JSON or JSONL")
    texts: list[str] = []
    for part in formats.parts(path, fmt):
        if not isinstance(part, str):
            texts.append(_written(part, len(texts) + 1, path, fmt, keys))
    if len(texts) != lines:
        first = f"record {min(len(texts), lines) + 1} has no {'prediction' if len(texts) < lines else 'counterpart'}"
        fix = "give one a record, in the order of the set"
        raise FormatError(path, None, f"{len(texts)} predictions for {lines} records: {first}", fix)
    return texts


def _written(part: Record | Bad, number: int, path: str | Path, fmt: str, keys: Sequence[str]) -> str:
    missing = f"no prediction for record {number}"
    if fmt == "text":
        if isinstance(part, Bad):
            raise part.error
        if part.line != number:  # blank lines are no records
            fix = f'write one, or give JSONL with {{"{keys[0]}": ""}} where the system wrote nothing'
            raise FormatError(path, number, missing, fix)
        return part.hypotheses[0]
    try:  # a prediction need not stand beside hypotheses: what is bad for want of them is good here
        part.raw.encode()
        value = objects.DECODER.decode(part.raw)
    except (ValueError, RecursionError):
        assert isinstance(part, Bad)
        raise part.error from None
    found = [value[key] for key in keys if key in value] if isinstance(value, dict) else []
    if not found or not isinstance(found[0], str):
        line = part.error.line if isinstance(part, Bad) else part.line
        raise FormatError(path, line, missing, f"give it a text under {' or '.join(map(json.dumps, keys))}")
    return found[0]


def score(
    sets: Sets,
    systems: Mapping[System, Texts],
    *,
    family: str,
    normaliser: Normaliser,
    resamples: int = 2000,
) -> list[Row]:
    """First pass, oracles and systems on each set, on the average over sets, on all lines, and on the lines of each
    number of distinct hypotheses.

    Args:
      sets: name -> records, all with references.
      systems: (name, seed) -> set -> texts.
      family: of the records.
      normaliser: what is forgiven. Under `hypo2trans` a rate is the mean of the lines' own, as that code has it;
        under all others it is the errors of all lines over their length.
      resamples: of the intervals and p-values; see `significance`.

    Returns:
      JSON-safe rows with keys arm, seed, task, set, metric (`wer` or `mean_line_wer`), normaliser, lines; value, a
      fraction, and value_ci95; and, of a system against the first pass, relative_change, its ci95 and p_value, and
      how many lines it fixed and broke. What is not defined is null.
    """
    records = [record for name in sets for record in sets[name]]
    wanted = [errors.words(normaliser(str(r.reference))) for r in records]
    heard = [[errors.words(normaliser(h)) for h in r.hypotheses] for r in records]

    def counted(texts: Iterable[str]) -> list[ErrorCounts]:
        return [errors.count(w, errors.words(normaliser(t))) for w, t in zip(wanted, texts, strict=True)]

    counts: dict[System, list[ErrorCounts]] = {(FIRST, None): counted(r.hypotheses[0] for r in records)}
    counts |= {(name, None): [of(*lists) for lists in zip(wanted, heard, strict=True)] for name, of in ORACLES.items()}
    counts |= {key: counted(text for name in sets for text in texts[name]) for key, texts in systems.items()}
    statistics = {key: _statistics(lines, normaliser) for key, lines in counts.items()}
    metric = "mean_line_wer" if normaliser is HYPO2TRANS else "wer"
    return [
        {
            "arm": arm,
            "seed": seed,
            "task": family,
            "set": name,
            "metric": metric,
            "normaliser": normaliser.signature,
            **_compared(arm, of_lines(statistics[FIRST, None]), of_lines(mine), total, resamples),
        }
        for name, of_lines, total in _groups(sets)
        for (arm, seed), mine in statistics.items()
    ]


def _statistics(lines: Sequence[ErrorCounts], normaliser: Normaliser) -> np.ndarray:
    """Nx2: errors and length of each line, or its rate and 1 where lines weigh alike."""
    if normaliser is HYPO2TRANS:
        return np.array([(line.rate, 1) for line in lines])
    return np.array([(line.errors, line.reference_length) for line in lines])


Choice = Callable[[np.ndarray], np.ndarray]  # statistics of all lines Nx2 -> those of a row of the table, MxK


def _groups(sets: Sets) -> Iterable[tuple[str, Choice, Score]]:
    """(name, which statistics, how their sum becomes a score) of each row of the table."""
    of_set_N = np.repeat(np.arange(len(sets)), [len(records) for records in sets.values()])
    yield from ((name, _chosen(of_set_N == s), error_rate) for s, name in enumerate(sets))
    if len(sets) > 1:
        onehot_NxS = np.eye(len(sets))[of_set_N]
        yield AVERAGE, lambda x_Nx2: (onehot_NxS[..., None] * x_Nx2[:, None]).reshape(len(x_Nx2), -1), _mean_of_sets
        yield ALL, lambda x_Nx2: x_Nx2, error_rate
    distinct_N = np.array([len(set(r.hypotheses)) for records in sets.values() for r in records])
    numbers = np.unique(distinct_N).tolist()
    if len(numbers) > 1:
        yield from ((f"{DISTINCT}{n}", _chosen(distinct_N == n), error_rate) for n in numbers)


def _chosen(mask_N: np.ndarray) -> Choice:
    return lambda x_Nx2: x_Nx2[mask_N]


def _mean_of_sets(sums_Rx2S: np.ndarray) -> np.ndarray:
    return error_rate(sums_Rx2S.reshape(-1, 2)).reshape(len(sums_Rx2S), -1).mean(1)


def _compared(arm: str, first_NxK: np.ndarray, mine_NxK: np.ndarray, total: Score, resamples: int) -> Row:
    found = compare(first_NxK, mine_NxK, total, resamples=resamples)
    gain_N = (first_NxK - mine_NxK)[:, ::2].sum(1)  # every second column is a length
    system = arm not in (FIRST, *ORACLES)
    return {
        "value": float(total(mine_NxK.sum(0, keepdims=True))[0]),
        "value_ci95": [finite(end) for end in found.corrected_ci95],
        "relative_change": finite(found.relative_change) if system else None,
        "ci95": [finite(end) for end in found.ci95] if system else None,
        "p_value": found.p_value if system else None,
        "fixed": int((gain_N > 0).sum()) if system else None,
        "broken": int((gain_N < 0).sum()) if system else None,
        "lines": len(mine_NxK),
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def to_markdown(rows: Sequence[Row]) -> str:
    """Two tables of the rows of one normaliser, in percent: a set a row, then the systems' intervals on whole sets."""
    what = {"wer": "WER", "mean_line_wer": "mean WER of lines"}[rows[0]["metric"]]
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["set"], row["arm"]), []).append(row)
    sets, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("set", "arm"))
    titles = [_title(cells[sets[0], arm]) for arm in arms]
    out = [("set", "lines", *titles), ("---", *["--:"] * (1 + len(arms)))]
    for name in sets:
        lines = f"{cells[name, FIRST][0]['lines']:,}"
        out.append((name, lines, *(_value(cells[name, arm]) for arm in arms)))
    text = f"{what}, %, under `{rows[0]['normaliser']}`; in brackets the change against the first pass, * p < 0.05.\n\n"
    text += markdown(out)
    systems = [arm for arm in arms if arm not in (FIRST, *ORACLES)]
    if systems:
        head = ("set", "system", what, "95 % interval", "change", "95 % interval", "p", "fixed / broken")
        details = [
            _detail(cells[name, arm]) for name in sets if not name.startswith(DISTINCT) for arm in (FIRST, *systems)
        ]
        text += "\n" + markdown([head, ("---", "---", *["--:"] * 6), *details])
    return text


def _title(rows: Sequence[Row]) -> str:
    return f"{rows[0]['arm']} ({len(rows)} seeds)" if len(rows) > 1 else rows[0]["arm"]


def _value(rows: Sequence[Row]) -> str:
    sure = all(row["p_value"] is not None and row["p_value"] < 0.05 for row in rows)
    change = _change(rows)
    return _mean(rows) + (f" ({change}{'*' if sure else ''})" if change else "")


def _detail(rows: Sequence[Row]) -> tuple[str, ...]:
    """The mean over seeds, and of the first seed what is of one run."""
    first = rows[0]
    cells = [first["set"], _title(rows), _mean(rows), _interval(first["value_ci95"]), _change(rows)]
    if first["p_value"] is None:
        return (*cells, "", "", "")
    return (
        *cells,
        _interval(first["ci95"], "+", 1),
        f"{first['p_value']:.4f}",
        f"{first['fixed']} / {first['broken']}",
    )


def _mean(rows: Sequence[Row]) -> str:
    return percent(float(np.mean([row["value"] for row in rows])))


def _change(rows: Sequence[Row]) -> str:
    changes = [row["relative_change"] for row in rows if row["relative_change"] is not None]
    return percent(float(np.mean(changes)), sign="+", digits=1) + " %" if changes else ""


def _interval(ends: Sequence[float | None], sign: str = "", digits: int = 2) -> str:
    return " to ".join(percent(end, sign=sign, digits=digits) for end in ends)


# --- command line -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-jax score`."""
    add = parser.add_argument
    what = "records with references, such as HyPoradise JSON; each file is a set"
    add("--input", nargs="+", required=True, metavar="FILE", help=what)
    add(
        "--checkpoint",
        metavar="DIR",
        help="a run's folder or a safetensors file: corrects and is scored, guarded or not",
    )
    what = (
        "what another system wrote, a line a record (or JSON with corrected or prediction); NAME again for the next set"
    )
    add("--predictions", nargs="+", action="extend", default=[], metavar="NAME=FILE", help=what)
    add("--family", choices=FAMILY_NORMALISER, default="asr", help="of all records (default: asr)")
    add("--normaliser", choices=NORMALISERS, help="what is forgiven (default: the family's; speech for asr)")
    what = "a new folder for table.json, table.md and, with --checkpoint, the corrections of each set"
    add("--output", metavar="DIR", help=what)


def main(args: argparse.Namespace, load: Callable[[str], Correct]) -> int:
    """Runs `moe-jax score`; `load` makes the model of a checkpoint, once the files have been looked at.

    Returns the exit code: 0, or 130 after Ctrl-C. Raises ValueError, in one line, for what must be mended.
    """
    try:
        output = Path(args.output) if args.output else None
        if output:
            _check_free(output)
        sets = read_sets(args.input, args.family)
        systems = predictions(args.predictions, sets)
        files = {}
        if args.checkpoint:
            mine = (Path(args.checkpoint).resolve().name, None)
            joined(systems, ours(mine, {}, {}))  # a name given twice shows before the work
            guarded, free = corrected(load(args.checkpoint), sets)
            systems = joined(ours(mine, guarded, free), systems)
            files = {f"{s}.jsonl": to_jsonl(sets[s], guarded[s], free[s]) for s in sets}
        normaliser = NORMALISERS[args.normaliser] if args.normaliser else family_normaliser(args.family)
        rows = score(sets, systems, family=args.family, normaliser=normaliser)
        files |= {"table.json": json.dumps({"rows": rows}, indent=1) + "\n", "table.md": to_markdown(rows)}
        if output:
            _write(output, files)
        print(files["table.md"], end="")
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def predictions(given: Sequence[str], sets: Sets) -> dict[System, Texts]:
    """The systems of `NAME=FILE` arguments; the files of a name belong to the sets in their order."""
    files: dict[str, list[str]] = {}
    for argument in given:
        name, _, file = argument.partition("=")
        if not name.strip() or not name.isprintable() or not file or name in (FIRST, *ORACLES):
            raise ValueError(
                f"--predictions {argument!r}: write NAME=FILE, with a name that the table does not have yet"
            )
        files.setdefault(name, []).append(file)
    for name, paths in files.items():
        if len(paths) != len(sets):
            fix = f"give {name}=FILE once a set, in the order of --input"
            raise ValueError(f"--predictions: {len(paths)} files of {name!r} for {len(sets)} sets; {fix}")
    return {
        (name, None): {s: read_predictions(path, len(sets[s])) for s, path in zip(sets, paths, strict=True)}
        for name, paths in files.items()
    }


def ours(system: System, guarded: Texts, free: Texts) -> dict[System, Texts]:
    """A checkpoint as two systems: with its guard, and without."""
    return {system: guarded, (f"{system[0]}, unguarded", system[1]): free}


def joined(*systems: Mapping[System, Texts]) -> dict[System, Texts]:
    """Raises ValueError where two have the same name and seed."""
    out: dict[System, Texts] = {}
    for some in systems:
        for (name, seed), texts in some.items():
            if (name, seed) in out:
                which = name if seed is None else f"{name}, seed {seed}"
                raise ValueError(f"two systems are called {which!r}; rename one")
            out[name, seed] = texts
    return out


def corrected(correct: Correct, sets: Sets) -> tuple[Texts, Texts]:
    """What a model makes of each set: (guarded, unguarded) texts."""
    guarded, free = {}, {}
    for name, records in sets.items():
        print(f"{name}: {len(records):,} lines", file=sys.stderr)
        guarded[name], free[name] = map(list, zip(*correct(records), strict=True))
    return guarded, free


def to_jsonl(records: Sequence[Record], guarded: Sequence[str], free: Sequence[str]) -> str:
    """A set with its corrections, which `read_predictions` reads."""
    rows = (
        {"hypotheses": r.hypotheses, "reference": r.reference, "corrected": text, "unguarded": other}
        for r, text, other in zip(records, guarded, free, strict=True)
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _check_free(output: Path) -> None:
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise ValueError(f"{output.parent}: no folder to write to; create it, or give another --output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: is there already; give another --output")


def _write(output: Path, files: Mapping[str, str]) -> None:
    """The whole folder or nothing: filled aside, then renamed."""
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as aside:
        folder = Path(aside) / output.name
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
        os.replace(folder, output)

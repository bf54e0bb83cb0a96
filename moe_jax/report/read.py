"""Read the files of a run folder that the report shows; every complaint is one line that names the place."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Kinds = dict[str, type]  # key -> the type of its value

METRICS = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF", "f0.5": "F0.5"}

_ROW: Kinds = {"task": str, "set": str, "lines": int, "metric": str, "first_pass": float, "corrected": float}
_ROW_MAY: Kinds = {
    **dict.fromkeys(("oracle_nb", "oracle_cp", "relative_change", "p_value"), float),
    **dict.fromkeys(("fixed", "broken", "untouched", "substitutions", "deletions", "insertions"), int),
    **dict.fromkeys(("normaliser", "signature"), str),
    "ci95": list,
}
_EXAMPLE: Kinds = {
    **dict.fromkeys(("task", "set", "correction", "reference"), str),
    **dict.fromkeys(("errors_before", "errors_after"), int),
    "hypotheses": list,
}
_KINDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds; an absent file is None.

    Attributes:
      rows: score rows; every optional key is there, None where the file lacks it or says NaN.
      meta: facts about the run, text to text.
      routing: the object of `routing.json`.
      log: step -> {name: value}, in order of steps; a resumed run's later line replaces the earlier one.
      examples: the lines of `examples.jsonl`.
    """

    rows: list[dict[str, Any]]
    meta: dict[str, str]
    routing: dict[str, Any] | None
    log: dict[int, dict[str, float]] | None
    examples: list[dict[str, Any]] | None


def read_run(run_dir: Path) -> Run:
    """Read a run folder. Raises ValueError, one line, for a missing `scores.json` or any malformed file."""
    scores = run_dir / "scores.json"
    if not scores.is_file():
        raise ValueError(f"{scores}: not found; evaluate the run first, the report is drawn from its scores")
    rows, meta = _scores(scores)
    routing, log, examples = (run_dir / name for name in ("routing.json", "metrics.jsonl", "examples.jsonl"))
    return Run(
        rows,
        meta,
        routing=_routing(routing) if routing.is_file() else None,
        log=read_log(log) if log.is_file() else None,
        examples=_examples(examples) if examples.is_file() else None,
    )


def _scores(path: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    whole = _object(path.read_bytes(), str(path))
    rows = whole.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{path}: "rows" must be a list with at least one score')
    checked = []
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        row = _checked(row, _ROW, _ROW_MAY, where)
        if row["metric"] not in METRICS:
            raise ValueError(f"{where}: unknown metric {row['metric']!r}; known: {', '.join(METRICS)}")
        if row["ci95"] is not None:
            low_high = [_plain_number(v) for v in row["ci95"]]
            if len(low_high) != 2:
                raise ValueError(f'{where}: "ci95" must be [low, high], is {json.dumps(row["ci95"])[:40]}')
            row["ci95"] = None if None in low_high else low_high
        if sum(row[key] or 0 for key in ("fixed", "broken", "untouched")) > row["lines"]:
            raise ValueError(f"{where}: fixed + broken + untouched is more than the {row['lines']} lines")
        checked.append(row)
    meta = whole.get("meta", {})
    if not isinstance(meta, dict):
        raise ValueError(f'{path}: "meta" must be an object of name: text')
    return checked, {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in meta.items()}


def _routing(path: Path) -> dict[str, Any]:
    whole = _checked(
        _object(path.read_bytes(), str(path)),
        {"experts": list, "tasks": list, "load": list},
        {"entropy": list},
        str(path),
    )
    experts, tasks = ([str(name) for name in whole[key]] for key in ("experts", "tasks"))
    layers = whole["load"]
    for depth, layer in enumerate(layers):
        where = f"{path}: load, layer {depth}"
        if not isinstance(layer, list) or len(layer) != len(tasks):
            raise ValueError(f"{where}: must hold one list for each of the {len(tasks)} tasks")
        for task, row in zip(tasks, layer, strict=True):
            found = [_plain_number(v) for v in row] if isinstance(row, list) else []
            shares = [v for v in found if v is not None and v >= 0]
            if len(shares) != len(experts) or len(found) != len(experts):
                raise ValueError(f"{where}, task {task}: must hold {len(experts)} numbers from 0 to 1")
            if any(shares) and abs(sum(shares) - 1) > 0.02:
                raise ValueError(f"{where}, task {task}: the shares add up to {sum(shares):.3g}, not 1")
    entropy = whole["entropy"]
    if entropy is not None and (len(entropy) != len(layers) or None in map(_plain_number, entropy)):
        raise ValueError(f"{path}: entropy must hold one number for each of the {len(layers)} layers")
    for key, kind in (("mapped", list), ("agreement", float)):
        table = whole.get(key)
        if table is None:
            whole[key] = {}
        elif not isinstance(table, dict):
            raise ValueError(f"{path}: {key} must be an object of task: {_KINDS[kind]}")
        else:
            table = {t: [v] if kind is list and isinstance(v, int) else v for t, v in table.items()}  # one, or several
            whole[key] = _checked(table, dict.fromkeys(table, kind), {}, f"{path}: {key}")
    for task, mapped in whole["mapped"].items():
        if not all(type(e) is int and 0 <= e < len(experts) for e in mapped):
            raise ValueError(f"{path}: mapped, task {task}: there are only experts 0 to {len(experts) - 1}")
    return {**whole, "experts": experts, "tasks": tasks}


def read_log(path: Path, live: bool = False) -> dict[int, dict[str, float]]:
    """step -> metrics of a metrics.jsonl; numbers that are not finite are NaN. Of a `live` run the last line may be
    without its end: it is being written."""
    steps: dict[int, dict[str, float]] = {}
    for where, row in _lines(path, whole=not live):
        step = _checked(row, {"step": int}, {}, where)["step"]
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        # Training and validation may each write a line for a step; a resumed run writes a step again.
        steps.setdefault(step, {}).update(
            {k: math.nan if _plain_number(v) is None else float(v) for k, v in numbers.items() if k != "step"}
        )
    return dict(sorted(steps.items()))


def _examples(path: Path) -> list[dict[str, Any]]:
    examples = []
    for where, row in _lines(path):
        row = _checked(row, _EXAMPLE, {"kept": bool}, where)
        if not row["hypotheses"] or not all(isinstance(h, str) for h in row["hypotheses"]):
            raise ValueError(f"{where}: hypotheses must be a list of at least one text")
        examples.append(row)
    return examples


def read_object(path: Path) -> dict[str, Any]:
    """What a file of JSON holds. Raises ValueError, in one line."""
    try:
        return _object(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(path: Path, whole: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines if whole else lines[:-1], 1):
        if line.strip():
            yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: not UTF-8 text (byte {e.start}); write the file again") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not whole JSON ({e}); cut off or damaged? write it again") from e
    if not isinstance(found, dict):
        raise ValueError(f"{where}: must be a JSON object, is {type(found).__name__}")
    return found


def _plain_number(value: object) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _checked(row: Any, must: Kinds, may: Kinds, where: str) -> dict[str, Any]:
    """A copy of `row` with its values checked; optional ones that are absent, null or not finite are None."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object, is {type(row).__name__}")
    row = dict(row)
    for key, kind in (must | may).items():
        value: Any = row.get(key)
        if kind is float and isinstance(value, int | float):
            value = _plain_number(value)
        if value is None and key not in must:
            row[key] = None
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f'{where}: "{key}" must be {_KINDS[kind]}, is {json.dumps(row.get(key))[:40]}')
        elif kind is int and isinstance(value, int) and not 0 <= value < 2**63:
            raise ValueError(f'{where}: "{key}" must be from 0 to 2^63, is {json.dumps(row.get(key))[:40]}')
        else:
            row[key] = value
    return row

"""Evaluation: tune the guard on validation text, correct the test text once, score it, and draw what the experts do."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moe_jax import checkpoint, formats, hosts, sharding
from moe_jax.data import Prepared
from moe_jax.formats import Record
from moe_jax.metrics import errors, scoring
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.moe.task_routers import TaskMapped
from moe_jax.partfile import write_text
from moe_jax.pipeline import Guard, Pipeline, Proposal
from moe_jax.report import write_report

Rows = list[dict[str, Any]]
THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 1e9)


def read_rows(paths: Sequence[str], family: str | None = None, lines: int | None = None) -> tuple[list[Record], Rows]:
    """Labelled rows of corpus files, as records and as mappings with `task, source_set, hypotheses, reference`.

    Args:
      family: the task of the rows that do not say theirs.
      lines: of each set of a file at most so many, chosen by a hash of their text; None takes all.

    Raises FormatError for a bad record, ValueError for one without a reference or a task.
    """
    found: list[tuple[tuple[str, str, str], Record]] = []
    for path in paths:
        for record in formats.read(path):
            task = record.task or family
            if record.reference is None or task is None:
                raise ValueError(f'{path}:{record.line}: evaluation needs "reference" and "task"; add them')
            found.append(((path, task, json.loads(record.raw).get("source_set", "unnamed")), record))
    if lines is not None:
        sets: dict[tuple[str, str, str], list[Record]] = {}
        for of, record in found:
            sets.setdefault(of, []).append(record)
        kept = {id(record) for records in sets.values() for record in formats.sample(records, lines)}
        found = [pair for pair in found if id(pair[1]) in kept]
    rows = [
        {"task": task, "source_set": name, "hypotheses": list(record.hypotheses), "reference": record.reference}
        for (_, task, name), record in found
    ]
    return [record for _, record in found], rows


def propose(pipeline: Pipeline, records: Sequence[Record], progress: bool = True) -> list[Proposal]:
    """`Pipeline.propose` in long stretches, with a progress bar."""
    out: list[Proposal] = []
    size = 8 * pipeline.batch_size
    for start in tqdm(range(0, len(records), size), "correcting", unit="batch", disable=None if progress else True):
        out += pipeline.propose(records[start : start + size])
    return out


def line_errors(rows: Rows, texts: Sequence[str]) -> np.ndarray:
    """errors_R: word errors of each text under its family's normaliser."""
    out = np.zeros(len(rows))
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        counts = errors.wer([row["reference"]], [text], family_normaliser(row["task"]))
        out[i] = counts.errors
    return out


def tune_guard(rows: Rows, proposals: Sequence[Proposal]) -> Guard:
    """The thresholds with the lowest mean over families of (word errors / first-pass word errors) on validation rows.

    Ties go to the higher threshold: a correction that does not help is not made.
    """
    tasks = np.array([r["task"] for r in rows])
    first = line_errors(rows, [p.first for p in proposals])
    model = line_errors(rows, [p.guarded(-np.inf).text for p in proposals])
    margin = np.array([p.margin for p in proposals])
    several = np.array([p.several for p in proposals])
    share = 1 / np.array([max(first[tasks == t].sum(), 1) for t in tasks])  # families count alike

    def best(those: np.ndarray) -> float:
        gain = ((first - model) * share)[those]
        return max(reversed(THRESHOLDS), key=lambda threshold: round(gain[margin[those] >= threshold].sum(), 9))

    return Guard(single=best(~several), several=best(several))


def atlas(pipeline: Pipeline, valid_data: str, batches: int = 16, batch_size: int = 16) -> dict[str, Any] | None:
    """Where free routing sends each family, over prepared validation rows: the data of the report's heat maps.

    With a task map, `mapped` lists the experts of each family, and `agreement` is the share of its tokens for which
    free routing chooses at least one of them, the mean over layers.

    Returns None for a dense model.
    """
    data, model = Prepared.open(valid_data), jax.tree.map(lambda leaf: leaf, pipeline.model)
    batch_size = sharding.full(batch_size, pipeline.mesh)
    router = getattr(model.ffn, "router", None)
    if isinstance(router, TaskMapped):
        router.inference = "free"  # of this copy: the rows say their task
    step = jax.jit(lambda m, b: jax.tree.map(sharding.whole, m(b.tokens_BxL, b.info)[2]))
    total: Any = None
    for batch in data.sample(batches * batch_size, batch_size):
        with sharding.use(pipeline.mesh):
            stats = jax.device_get(step(model, batch))
        if stats is None:
            return None
        total = stats if total is None else jax.tree.map(np.add, total, stats)
    names = {i: n for n, i in data.meta["families"].items()}
    load = total.task_load_TxE
    present = [t for t in range(load.shape[1]) if load[:, t].sum() > 0]
    share = load[:, present] / np.maximum(load[:, present].sum(-1, keepdims=True), 1)
    out: dict[str, Any] = {
        "experts": [str(e) for e in range(load.shape[2])],
        "tasks": [names.get(t, "unknown") for t in present],
        "load": share.tolist(),
        "entropy": (total.entropy / np.maximum(total.count, 1)).tolist(),
    }
    if isinstance(router, TaskMapped):
        asked, found = total.target_T, total.found_T
        mapped = [t for t in present if asked[:, t].any()]
        out["mapped"] = {names.get(t, "unknown"): list(router.experts[t]) for t in mapped}
        out["agreement"] = {names.get(t, "unknown"): float((found[:, t] / asked[:, t]).mean()) for t in mapped}
    return out


def evaluate(
    run_dir: str,
    *,
    valid: Sequence[str],
    test: Sequence[str],
    valid_data: str,
    family: str | None = None,
    lines: int | None = None,
    beams: int = 1,
    title: str = "moe_jax",
    seed: int = 0,
    mesh: Callable[[], sharding.Mesh] | None = None,
    about: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Rows:
    """Tunes the guard on `valid`, scores `test` once, and writes into the run folder: scores.json, scores.md,
    examples.jsonl, routing.json, report.html, and the guard into model.safetensors. Returns the score rows. Of several
    hosts each must ask for it; the first one writes.

    Args:
      valid, test: corpus files with references (`formats`); disjoint.
      valid_data: the prepared validation rows, for the routing atlas.
      family: of the rows that do not say theirs.
      lines: of each set of a file at most so many, chosen by a hash of their text.
      beams: width of the search.
      mesh: makes that which the model and its batches are divided over, as in training; None: one device.
    """
    folder = Path(run_dir)
    progress = progress and hosts.first()
    pipeline = Pipeline.load(folder, beams=beams, mesh=sharding.several(mesh))
    records, rows = read_rows(valid, family, lines)
    guard = tune_guard(rows, propose(pipeline, records, progress))
    records, rows = read_rows(test, family, lines)
    proposals = propose(pipeline, records, progress)
    corrections = [guard(p) for p in proposals]
    references = pipeline.score(records, [r["reference"] for r in rows])
    scores = scoring.score(rows, [c.text for c in corrections], seed=seed)
    before = line_errors(rows, [p.first for p in proposals])
    after = line_errors(rows, [c.text for c in corrections])
    routing = atlas(pipeline, valid_data)
    model = checkpoint.Source(folder)
    hosts.alone(checkpoint.describe_again)(model.path, model.meta | {"guard": dataclasses.asdict(guard)})
    described = {
        "step": str(model.meta.get("step")),
        "seed": str(model.meta.get("seed")),
        "guard": str(guard),
        "beams": str(beams),
        "split": ", ".join(Path(t).name for t in test),
        "date": datetime.date.today().isoformat(),
        **(about or {}),
    }
    examples = (
        {
            "task": row["task"],
            "set": row["source_set"],
            "hypotheses": row["hypotheses"],
            "correction": c.text,
            "reference": row["reference"],
            "kept": c.kept,
            "errors_before": int(b),
            "errors_after": int(a),
            "reference_nll": r and -r.total,
            "reference_tokens": r and len(r.tokens),
        }
        for row, c, b, a, r in zip(rows, corrections, before, after, references, strict=True)
    )
    _write(folder, scores, described, examples, routing, title)
    return scores


@hosts.alone
def _write(
    folder: Path,
    scores: Rows,
    described: Mapping[str, str],
    examples: Iterable[Mapping[str, Any]],
    routing: Mapping[str, Any] | None,
    title: str,
) -> None:
    write_text(folder / "scores.json", json.dumps({"rows": scores, "meta": described}, indent=1))
    write_text(folder / "scores.md", scoring.to_markdown(scores))
    write_text(folder / "examples.jsonl", "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples))
    if routing is not None:
        write_text(folder / "routing.json", json.dumps(routing))
    report = write_report(folder, title=title)
    print(scoring.to_markdown(scores))
    print(f"guard: {described['guard']}, tuned on validation; scores: {folder}/scores.json; report: {report}")

"""Train every arm of gin/experiments/task_moe for several seeds, and leave results/task_moe/table.json.

    python -m benchmarks.task_moe --seeds 0 1 2

The arms are an interpretation of Task-Based MoE (arXiv 2308.15772), of which only the abstract is known to us.

BLEU and chrF by direction (sacreBLEU, signatures in the runs' scores.json), their means over groups of directions, and
the share of outputs in another language than asked. Then the new language: its directions trained with their static
adapters alone, with their rows of the dynamic adapters' gates alone, and with everything; and what became of old
directions. What is finished (results/task_moe/runs) is not run again, what was interrupted goes on.

Arms are compared on the same lines: what a line has is summed over the seeds, the score is the mean over directions of
each one's corpus score, and test rows are drawn whole, with all their directions. Pictures of who uses which experts
are in routing.svg.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kept
from benchmarks.launch import launch
from moe_jax import checkpoint, describe, main, partfile, train, tree
from moe_jax.metrics import significance, translation
from moe_jax.report.heatmap import heat_maps
from moe_jax.tasks.translation import NEW as NEW_DIRECTIONS
from moe_jax.tasks.translation import ZERO_SHOT, languages, trained

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("dense", "top_k", "task_token", "task_gated", "task_level", "static_adapters", "dynamic_adapters")
NEW = {"new_static": "static_adapters", "new_dynamic": "dynamic_adapters", "new_full": "static_adapters"}  # and of what
# Group of directions -> (arms, what they are compared with).
COMPARED = {
    "trained": (ARMS, ("dense", "top_k")),
    "zero-shot": (ARMS, ("dense", "top_k")),
    "new": (NEW, ("new_full",)),
}
DRAWN = ("top_k", "task_level", "dynamic_adapters")  # whose routing is drawn


def run(arm: str, seed: int) -> dict[str, Any]:
    """What the table needs of the arm, trained and scored if it is not kept."""
    folder = Path("runs/task_moe") / f"{arm}-{seed}"

    def make() -> dict[str, Any]:
        print(f"--- {arm}, seed {seed} -> {folder}", flush=True)
        about: dict[str, Any] = {"RUN_DIR": folder, "SEED": seed}
        if arm in NEW:
            about["BASE"] = f"runs/task_moe/{NEW[arm]}-{seed}"
        launch([f"experiments/task_moe/{arm}.gin"], about)
        return of_run(arm, seed, ROOT / folder)

    return kept.once("task_moe", f"{arm}-{seed}", make)


def of_run(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """{"rows", "date", "routing", "lines": direction -> {"row": which of the test rows each line is of, "chrf", "bleu":
    what they are made of, a list a line}}."""
    return {
        "rows": rows_of(arm, seed, folder),
        "date": datetime.date.today().isoformat(),
        "routing": json.loads((folder / "routing.json").read_text("utf-8")),
        "lines": {direction: of_lines(direction, lines) for direction, lines in translated(folder).items()},
    }


def translated(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    """direction -> (source, translation, reference) of each line of a run's translations.jsonl."""
    out: dict[str, list[tuple[str, str, str]]] = {}
    for line in (folder / "translations.jsonl").read_text("utf-8").splitlines():
        direction, *texts = json.loads(line)
        out.setdefault(direction, []).append(tuple(texts))
    return out


def of_lines(direction: str, lines: Sequence[tuple[str, str, str]]) -> dict[str, list[Any]]:
    _, written, references = zip(*lines, strict=True)
    measures = (translation.chrf(), translation.bleu())
    found = {m.name: m.statistics(written, references).astype(int).tolist() for m in measures}
    return {"row": [test_rows()[(*languages(direction), line[0], line[2])] for line in lines], **found}


@functools.cache
def test_rows() -> dict[tuple[str, str, str, str], int]:
    """(source language, target language, sentence, its reference) -> the first test row that has them."""
    out: dict[tuple[str, str, str, str], int] = {}
    for number, row in enumerate(main.multiparallel("test")):
        for a, b in itertools.permutations(row.keys() - {"set"}, 2):
            out.setdefault((a, b, row[a], row[b]), number)
    return out


def groups(direction: str) -> list[str]:
    """Those over which a direction's scores are averaged."""
    source, target = languages(direction)
    if direction in ZERO_SHOT:
        return ["zero-shot"]
    if direction in NEW_DIRECTIONS:
        return ["new"]
    kind = "en-xx" if source == "en" else "xx-en" if target == "en" else "xx-yy"
    return [kind, "low-resource" if direction in low_resource() else "high-resource", "trained"]


@functools.cache
def low_resource() -> frozenset[str]:
    """The half of the trained directions with the fewer sentences to learn from."""
    sentences = {d: len(pairs) for d, pairs in main.parallel("train", trained()).items()}
    return frozenset(sorted(sentences, key=lambda d: sentences[d])[: len(sentences) // 2])


def rows_of(arm: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """By direction, and the means of groups."""
    found = json.loads((folder / "scores.json").read_text("utf-8"))["rows"]
    nothing = {"ci95": None, "p_value": None}
    about = {"arm": arm, "seed": seed, "set": "test"}
    rows = [{**about, "task": r["task"], "metric": r["metric"], "value": r["value"], **nothing} for r in found]
    for metric in ("bleu", "chrf", "off-target", "references off-target"):
        mine = [
            (name, r["value"])
            for r in found
            if r["metric"] == metric and r["value"] is not None
            for name in groups(r["task"])
        ]
        for name in dict.fromkeys(g for g, _ in mine):
            mean = float(np.mean([v for g, v in mine if g == name]))
            rows.append({**about, "task": name, "metric": metric, "value": mean, **nothing})
    if arm not in NEW:
        rows += [{**about, "task": "all", "metric": m, "value": x, **nothing} for m, x in sizes_of(folder).items()]
    else:
        base = folder.with_name(f"{NEW[arm]}-{seed}")
        added = {("new", "trained parameters"): moved(folder, base)} | {("old", m): v for m, v in kept_of(folder, base)}
        rows += [{**about, "task": t, "metric": m, "value": v, **nothing} for (t, m), v in added.items()]
    return rows


def sizes_of(folder: Path) -> dict[str, int]:
    """The parameters of a run's model, and those that a token meets."""
    model = describe.abstract(checkpoint.Source(str(folder / "model.safetensors")).meta["model"])
    return {"parameters": tree.count(tree.flatten(model)), "active parameters": train.active_params(model)}


def moved(folder: Path, base: Path) -> int:
    """How many numbers differ from the base's: of a leaf that trained, rows may have stood still."""
    file = next(f for f in (folder / "adapters.safetensors", folder / "model.safetensors") if f.exists())
    before = checkpoint.read_safetensors(str(base / "model.safetensors"))[0]
    after = checkpoint.read_safetensors(str(file))[0]
    return sum(int((x != before[path]).sum()) if path in before else x.size for path, x in after.items())


def kept_of(folder: Path, base: Path) -> list[tuple[str, float]]:
    """Of the old directions that were scored again: their lines, how many differ from those of the base, and chrF, the
    mean over directions, before and after."""
    after, before = translated(folder), translated(base)
    old = [direction for direction in after if direction in before]
    lines = [pair for direction in old for pair in zip(before[direction], after[direction], strict=True)]
    if any((a[0], a[2]) != (b[0], b[2]) for a, b in lines):
        raise ValueError(f"{folder} and {base} were scored on different lines: score both again")
    changed = sum(a[1] != b[1] for a, b in lines)
    chrf = [("chrf before", base), ("chrf", folder)]
    return [("lines", len(lines)), ("lines changed", changed), *((name, of_old(run, old)) for name, run in chrf)]


def of_old(folder: Path, directions: Sequence[str]) -> float:
    """The mean of their chrF."""
    found = json.loads((folder / "scores.json").read_text("utf-8"))["rows"]
    return float(np.mean([r["value"] for r in found if r["metric"] == "chrf" and r["task"] in directions]))


def comparisons(runs: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Each arm against those of `COMPARED`, of those that have all seeds: chrF and BLEU of a group's directions.

    Raises ValueError for arms that were not scored on the same lines."""
    done = [arm for arm in dict.fromkeys(arm for arm, _ in runs) if all((arm, seed) in runs for seed in seeds)]
    out = []
    for (group, (arms, others)), metric in itertools.product(
        COMPARED.items(), (translation.chrf(), translation.bleu())
    ):
        found = {
            arm: summed([runs[arm, seed]["lines"] for seed in seeds], group, metric.name) for arm in arms if arm in done
        }
        for against, arm in itertools.product(others, found):
            if arm == against or against not in found or not (found[arm] or found[against]):
                continue
            (places, before), (others_places, after) = (laid_out(found[a]) for a in (against, arm))
            if places != others_places:
                raise ValueError(f"{arm} and {against} were scored on different {group} lines: score both again")
            row_N, direction_N = np.transpose(places)
            number = int(direction_N.max()) + 1
            first, corrected = (significance.by_cluster(x, row_N, direction_N, number) for x in (before, after))
            change = significance.compare(first, corrected, significance.mean_of_groups(metric.score, number))
            about = {"arm": arm, "against": against, "seeds": list(seeds), "task": group, "metric": metric.name}
            numbers = {"relative_change": change.relative_change, "ci95": change.ci95, "p_value": change.p_value}
            out.append(about | numbers)
    return out


Lines = dict[str, tuple[list[int], np.ndarray]]  # direction -> test rows, statistics_NxK


def summed(seeds: Sequence[dict[str, Any]], group: str, metric: str) -> Lines:
    """What the lines of a group's directions have, over all seeds.

    Raises ValueError where seeds were scored on different lines."""
    mine = [{d: found for d, found in lines.items() if group in groups(d)} for lines in seeds]
    rows = [{d: found["row"] for d, found in lines.items()} for lines in mine]
    if any(other != rows[0] for other in rows):
        raise ValueError("seeds were scored on different lines: score all of them again")
    return {d: (row, np.sum([lines[d][metric] for lines in mine], 0)) for d, row in rows[0].items()}


def laid_out(lines: Lines) -> tuple[list[tuple[int, int]], np.ndarray]:
    """((test row, place of the direction in order of names) of each line, statistics_NxK)."""
    order = sorted(lines)
    places = [(row, place) for place, direction in enumerate(order) for row in lines[direction][0]]
    return places, np.concatenate([lines[direction][1] for direction in order] or [np.zeros((0, 0))])


def picture(runs: dict[tuple[str, int], dict[str, Any]], seed: int) -> str | None:
    """An SVG of who uses which experts and adapters. None without mixtures."""
    found = {arm: runs[arm, seed]["routing"] for arm in DRAWN if (arm, seed) in runs}
    parts = {f"{arm}, {part}": use for arm, routing in found.items() for part, use in routing.items()}
    return heat_maps(parts) if parts else None


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *NEW], help="some of them (default: all)")
    parser.add_argument("--collect", action="store_true", help="only make the table, of what is finished")
    args = parser.parse_args()
    names = list(itertools.product(args.seeds, args.arms or [*ARMS, *NEW]))
    runs = {
        (arm, seed): kept.read("task_moe", f"{arm}-{seed}") if args.collect else run(arm, seed) for seed, arm in names
    }
    runs = {key: found for key, found in runs.items() if found}
    meta = {"split": "test", "date": max((found["date"] for found in runs.values()), default="")}
    some = f" --arms {' '.join(args.arms)}" if args.arms else ""
    meta["command"] = f"python -m benchmarks.task_moe --seeds {' '.join(map(str, args.seeds))}{some}"
    rows = [row for found in runs.values() for row in found["rows"]]
    table = {"experiment": "task_moe", "meta": meta, "rows": rows, "comparisons": comparisons(runs, args.seeds)}
    output = ROOT / "results" / "task_moe" / "table.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(output, json.dumps(table, indent=1) + "\n")
    if drawn := picture(runs, args.seeds[0]):
        partfile.write_text(output.with_name("routing.svg"), drawn)


if __name__ == "__main__":
    run_all()

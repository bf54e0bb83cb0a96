"""Train every arm of gin/experiments/task_moe for several seeds, and leave results/task_moe/table.json.

    python -m benchmarks.task_moe --seeds 0 1 2

The arms are an interpretation of Task-Based MoE (arXiv 2308.15772), of which only the abstract is known to us.

BLEU and chrF by direction (sacreBLEU, signatures in the runs' scores.json), their means over groups of directions, and
the share of outputs in another language than asked. Then what comes later, a new language and new directions between
known ones: trained with their static adapters alone, with their rows of the dynamic adapters' gates alone, and with
everything; and what became of old directions. What is finished (results/task_moe/runs) is not run again, what was
interrupted goes on.

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
from typing import Any, NamedTuple

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


class Later(NamedTuple):
    """An arm that goes on from a trained one."""

    base: str
    before: str  # the arm that shows what it began with
    gin: tuple[str, ...]
    about: dict[str, Any]


def _later(kind: str, base: str, before: str, *gin: str, **about: Any) -> Later:
    return Later(base, before, (f"experiments/task_moe/new_{kind}.gin", *gin), about)


STATIC, DYNAMIC, BETWEEN = "static_adapters", "dynamic_adapters", "data/new_directions.gin"
NEW = {
    "language_before_static": _later("static", STATIC, "language_before_static", STEPS=0),
    "language_before_dynamic": _later("dynamic", DYNAMIC, "language_before_dynamic", STEPS=0),
    "language_static": _later("static", STATIC, "language_before_static"),
    "language_dynamic": _later("dynamic", DYNAMIC, "language_before_dynamic"),
    "language_full": _later("full", STATIC, "language_before_static"),
    "direction_static": _later("static", STATIC, STATIC, BETWEEN),
    "direction_dynamic": _later("dynamic", DYNAMIC, DYNAMIC, BETWEEN),
    "direction_full": _later("full", STATIC, STATIC, BETWEEN),
}
# (group of directions, what is compared with, arm)
COMPARED = [
    *itertools.product(("trained", "zero-shot"), ("dense", "top_k"), ARMS),
    *(
        ("new" if arm.startswith("language") else "zero-shot", against, arm)
        for arm, later in NEW.items()
        for against in (later.before, f"{arm.partition('_')[0]}_full")
        if later.before != arm
    ),
]
LOW, HIGH = 1000, 10_000  # sentences, of directions of low and high resource
RELATED = ({"de", "sv"}, {"es", "ca", "fr", "it"}, {"ru", "cs"})
DRAWN = ("top_k", "task_level", "dynamic_adapters")  # whose routing is drawn


def run(arm: str, seed: int, again: bool = False) -> dict[str, Any]:
    """What the table needs of the arm, trained and scored if it is not kept, or `again` if its folder is gone: others
    go on from there."""
    folder = Path("runs/task_moe") / f"{arm}-{seed}"

    def make() -> dict[str, Any]:
        print(f"--- {arm}, seed {seed} -> {folder}", flush=True)
        gin: Sequence[str] = [f"experiments/task_moe/{arm}.gin"]
        about: dict[str, Any] = {"RUN_DIR": folder, "SEED": seed}
        if arm in NEW:
            for name in dict.fromkeys((NEW[arm].base, NEW[arm].before)):
                if name != arm and not (ROOT / "runs/task_moe" / f"{name}-{seed}" / "translations.jsonl").exists():
                    run(name, seed, again=True)
            gin, about = NEW[arm].gin, about | {"BASE": f"runs/task_moe/{NEW[arm].base}-{seed}"} | NEW[arm].about
        launch(gin, about)
        return of_run(arm, seed, ROOT / folder)

    return make() if again else kept.once("task_moe", f"{arm}-{seed}", make)


def of_run(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """{"scores": by direction; of a model "sizes", of what comes later to one "later"; "date", "routing", "lines":
    direction -> {"row": which of the test rows each line is of, "chrf", "bleu": what they are made of, a list a line}}.
    """
    about = {"later": later_of(arm, seed, folder)} if arm in NEW else {"sizes": sizes_of(folder)}
    return {
        "scores": json.loads((folder / "scores.json").read_text("utf-8"))["rows"],
        **about,
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
    number = sentences()[direction]
    resource = "low-resource" if number < LOW else "high-resource" if number > HIGH else "middle"
    return [kind, resource, "trained"]


@functools.cache
def sentences() -> dict[str, int]:
    """How many each trained direction has to learn from."""
    return {d: len(pairs) for d, pairs in main.parallel("train", trained()).items()}


def rows_of(arm: str, seed: int, run: dict[str, Any]) -> list[dict[str, Any]]:
    """By direction, and the means of groups."""
    found = run["scores"]
    nothing = {"ci95": None, "p_value": None}
    about = {"arm": arm, "seed": seed, "set": "test"}
    rows = [about | {"task": r["task"], "metric": r["metric"], "value": r["value"]} | nothing for r in found]
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
    added = [("all", metric, value) for metric, value in run.get("sizes", {}).items()]
    added += [tuple(one) for one in run.get("later", ())] + shared(run["routing"])
    return rows + [{**about, "task": t, "metric": m, "value": v, **nothing} for t, m, v in added]


def shared(routing: dict[str, Any]) -> list[tuple[str, str, float]]:
    """How much of their experts, and of their adapters, two directions have in common that differ in one end, 0 to 1:
    the mean where the two languages are related, and where they are not."""
    out = []
    for part, use in routing.items():
        load_NxTxE = np.array(use["load"])
        found: dict[str, list[float]] = {"related": [], "unrelated": []}
        for (a, one), (b, other) in itertools.combinations(enumerate(use["tasks"]), 2):
            ends = [{x, y} for x, y in zip(languages(one), languages(other), strict=True) if x != y]
            if len(ends) == 1 and "en" not in ends[0]:
                related = any(ends[0] <= family for family in RELATED)
                common = np.minimum(load_NxTxE[:, a], load_NxTxE[:, b]).sum(-1).mean()
                found["related" if related else "unrelated"].append(float(common))
        out += [(name, f"{part} in common", float(np.mean(values))) for name, values in found.items() if values]
    return out


def later_of(arm: str, seed: int, folder: Path) -> list[tuple[str, str, float | None]]:
    """(what of, metric, value) of directions that came later, and of old ones."""
    base, before = (folder.with_name(f"{name}-{seed}") for name in (NEW[arm].base, NEW[arm].before))
    later = [direction for direction in translated(folder) if "trained" not in groups(direction)]
    out = [("later", "trained parameters", moved(folder, base)), ("later", "chrf before", of_some(before, later))]
    out += [("later", m, of_some(folder, later, m)) for m in ("chrf", "bleu", "off-target")]
    return out + [("old", m, v) for m, v in kept_of(folder, base)]


def sizes_of(folder: Path) -> dict[str, int]:
    """The parameters of a run's model, and those that a token meets."""
    model = describe.abstract(checkpoint.Source(str(folder / "model.safetensors")).meta["model"])
    return {"parameters": tree.count(tree.flatten(model)), "active parameters": train.active_params(model)}


def moved(folder: Path, base: Path) -> float:
    """How many numbers differ from the base's: of a leaf that trained, rows may have stood still."""
    file = next(f for f in (folder / "adapters.safetensors", folder / "model.safetensors") if f.exists())
    before = checkpoint.read_safetensors(str(base / "model.safetensors"))[0]
    after = checkpoint.read_safetensors(str(file))[0]
    return sum(int((x != before[path]).sum()) if path in before else x.size for path, x in after.items())


def kept_of(folder: Path, base: Path) -> list[tuple[str, float | None]]:
    """Of the old directions that were scored again: their lines, how many differ from those of the base, and chrF, the
    mean over directions, before and after."""
    after, before = translated(folder), translated(base)
    old = [direction for direction in after if direction in before and "trained" in groups(direction)]
    lines = [pair for direction in old for pair in zip(before[direction], after[direction], strict=True)]
    if any((a[0], a[2]) != (b[0], b[2]) for a, b in lines):
        raise ValueError(f"{folder} and {base} were scored on different lines: score both again")
    changed = sum(a[1] != b[1] for a, b in lines)
    chrf = [("chrf before", base), ("chrf", folder)]
    return [("lines", len(lines)), ("lines changed", changed), *((name, of_some(run, old)) for name, run in chrf)]


def of_some(folder: Path, directions: Sequence[str], metric: str = "chrf") -> float | None:
    """The mean over directions of a run's metric, where it has a value."""
    found = json.loads((folder / "scores.json").read_text("utf-8"))["rows"]
    values = [r["value"] for r in found if r["metric"] == metric and r["task"] in directions]
    return float(np.mean([v for v in values if v is not None])) if set(values) - {None} else None


def comparisons(runs: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Each arm against those of `COMPARED`, of those that have all seeds: chrF and BLEU of a group's directions.

    Raises ValueError for arms that were not scored on the same lines."""
    done = [arm for arm in dict.fromkeys(arm for arm, _ in runs) if all((arm, seed) in runs for seed in seeds)]
    out = []
    for metric, (group, against, arm) in itertools.product((translation.chrf(), translation.bleu()), COMPARED):
        if arm == against or not {arm, against} <= {*done}:
            continue
        found = [summed([runs[name, seed]["lines"] for seed in seeds], group, metric.name) for name in (against, arm)]
        if not any(found):
            continue
        (places, before), (others_places, after) = map(laid_out, found)
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
    said = [score for found in runs.values() for score in found["scores"] if score.get("signature")]
    meta["signatures"] = {score["metric"]: score["signature"] for score in said}
    counts = sorted(sentences().items(), key=lambda pair: pair[1])
    meta["low-resource"] = [f"{d} {n}" for d, n in counts if n < LOW]
    meta["high-resource"] = [f"{d} {n}" for d, n in counts if n > HIGH]
    rows = [row for (arm, seed), found in runs.items() for row in rows_of(arm, seed, found)]
    table = {"experiment": "task_moe", "meta": meta, "rows": rows, "comparisons": comparisons(runs, args.seeds)}
    output = ROOT / "results" / "task_moe" / "table.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(output, json.dumps(table, indent=1) + "\n")
    if drawn := picture(runs, args.seeds[0]):
        partfile.write_text(output.with_name("routing.svg"), drawn)


if __name__ == "__main__":
    run_all()

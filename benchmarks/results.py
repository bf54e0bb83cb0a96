"""RESULTS.md, and the tables of the README, from results/; `--check` says whether they agree, as CI does.

python -m benchmarks.results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import markdown
from moe_jax import partfile
from moe_jax.metrics.scoring import markdown as aligned
from moe_jax.score import to_markdown

ROOT = Path(__file__).resolve().parents[1]
HIGHER = ("bleu", "chrf", "f0.5", "agreement", "told apart")
PLAIN = ("mean absolute logit difference", "nll", "told apart")  # no percentage
HEAD = """# Results

Made by `python -m benchmarks.results` from the files in `results/`; CI checks that it agrees. Values are percentages.
An arm's value is the mean over its seeds, ± their standard deviation; the change is relative to the first pass; the
interval is the 95 % paired bootstrap over lines of the first seed, p its paired randomisation test. Thresholds were
tuned on validation text; test text was scored once a run, unless the notes say otherwise. `nll` is the model's own, in
nats a token of the references, without a guard; `agreement`: how often free routing chooses an expert that the task is
mapped to; `told apart`: from 0, all tasks use the experts alike, to 1, no two share one.
"""


def by_arm(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for arm in unique(r["arm"] for r in rows):
        yield arm, [r for r in rows if r["arm"] == arm]


def by_seed(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Where each seed has a first pass of its own."""
    for row in rows:
        yield f"{row['arm']}, seed {row['seed']}", [row]


def table(data: dict[str, Any], each: Callable[..., Iterator[tuple[str, list[dict[str, Any]]]]] = by_arm) -> str:
    """One experiment: the families, every metric, every arm."""
    rows = [r for r in data["rows"] if r["set"] == "all"]
    meta = data["meta"]
    out = [
        f"## {data['experiment']}\n",
        f"`{meta['command']}` · {meta['split']} · {meta['date']}\n",
    ]
    out.append("| task | metric | arm | value | seeds | change | 95 % interval | p | fixed / broken |")
    out.append("|---|---|---|--:|--:|--:|--:|--:|--:|")
    for task, metric in unique((r["task"], r["metric"]) for r in rows):
        mine = [r for r in rows if (r["task"], r["metric"]) == (task, metric)]
        for name, own in each(mine):
            out.append(line(task, metric, name, own))
    return "\n".join(out) + "\n" + compared(data.get("comparisons", []))


def compared(rows: list[dict[str, Any]]) -> str:
    """Arms against one of them, a table a metric."""
    out = []
    for metric, against in unique((r["metric"], r["against"]) for r in rows):
        mine = [r for r in rows if (r["metric"], r["against"]) == (metric, against)]
        tasks = unique(r["task"] for r in mine)
        out += [f"\nChange of {metric} against `{against}` on the same test lines, summed over seeds:\n"]
        out += [f"| arm | seeds | {' | '.join(tasks)} |", f"|---|--:|{'--:|' * len(tasks)}"]
        for arm in unique(r["arm"] for r in mine):
            row = {r["task"]: r for r in mine if r["arm"] == arm}
            seeds = len(row[tasks[0]]["seeds"])
            out.append(f"| {arm} | {seeds} | {' | '.join(_change(row[task]) for task in tasks)} |")
    if rows:
        out.append(COMPARED)
    return "\n".join(out)


COMPARED = """
In brackets the 95 % interval over lines; * p < 0.05, and in how many seeds the change has the same sign. `mean`:
families count alike.
"""


def _change(row: dict[str, Any]) -> str:
    low, high = (f"{100 * x:+.1f}" for x in row["ci95"])
    sure = f"* {row['alike']}/{len(row['seeds'])}" if row["p_value"] < 0.05 else ""
    return f"{100 * row['relative_change']:+.1f} %{sure} ({low} to {high})"


def line(task: str, metric: str, arm: str, rows: list[dict[str, Any]]) -> str:
    values = np.array([r["value"] for r in rows], float) * (1 if metric in PLAIN else 100)
    first = rows[0]
    changes = [r["relative_change"] for r in rows if r["relative_change"] is not None]
    change = f"{100 * np.mean(changes):+.1f} %" if changes else ""
    interval = (
        ""
        if not first["ci95"] or None in first["ci95"]
        else "{:+.1f} to {:+.1f}".format(*(100 * x for x in first["ci95"]))
    )
    p = "" if first["p_value"] is None else f"{first['p_value']:.4f}"
    counts = "" if first["fixed"] is None else f"{first['fixed']} / {first['broken']}"
    arrow = "↑" if metric in HIGHER else "↓"
    seeds = "" if first["seed"] is None else str(len(rows))
    cells = (
        task,
        f"{metric} {arrow}",
        arm,
        f"{values.mean():.{3 if metric in PLAIN else 2}f}{spread(values)}",
        seeds,
        change,
        interval,
        p,
        counts,
    )
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float] | np.ndarray, digits: int = 2) -> str:
    """What follows a mean over seeds: ± their standard deviation; of one seed nothing."""
    return f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


MERGED = """Scores of the text as the model wrote it (no guard): word errors of the corrector, character errors of the
recogniser (CTC's likeliest path), chrF of the translator; in brackets the relative change against `joint`, * where the
paired randomisation test has p < 0.05 with every seed. npf, the normalised performance (ours; the paper's formula is
not known): (nll of the base - nll of the merge) / (nll of the base - nll of the tasks' own models), nll a mean over
tasks. Interference: nll a token of the merge (of the recogniser: its loss an utterance) minus that of the task's own
model. Scales were chosen on validation data; "authors' settings" are theirs.
"""


def merging(data: dict[str, Any]) -> str:
    """Merged models beside what they are measured against: a line an arm, the best npf first."""
    rows, meta = data["rows"], data["meta"]
    tasks = [t for t in unique(r["task"] for r in rows) if t != "mean"]
    text = next(r["metric"] for r in rows if r["metric"] not in ("nll", "interference", "npf"))
    name = f"{text.upper() if text != 'chrf' else 'chrF'} {'↑' if text in HIGHER else '↓'}"
    out = [f"## {data['experiment']}\n", f"`{meta['command']}` · {meta['split']} · {meta['date']}\n", MERGED]
    columns = [*(f"{t} {name}" for t in tasks), "npf ↑", f"interference: {', '.join(tasks)} ↓"]
    out.append(f"| arm | seeds | {' | '.join(columns)} |")
    out.append("|---|--:|" + "--:|" * (len(tasks) + 2))

    def of(arm: str, metric: str, task: str | None = None) -> list[dict[str, Any]]:
        return [r for r in rows if (r["arm"], r["metric"]) == (arm, metric) and task in (None, r["task"])]

    def mean(found: list[dict[str, Any]]) -> float:
        return float(np.mean([r["value"] for r in found])) if found else -np.inf

    for arm in sorted(unique(r["arm"] for r in rows), key=lambda arm: -mean(of(arm, "npf", "mean"))):
        cells = []
        for task in tasks:
            found = of(arm, text, task)
            changes = [r["relative_change"] for r in found if r.get("relative_change") is not None and arm != "joint"]
            sure = all(r["p_value"] is not None and r["p_value"] < 0.05 for r in found)
            change = f" ({100 * np.mean(changes):+.1f} %{'*' if sure else ''})" if changes else ""
            cells.append(f"{100 * mean(found):.2f}{change}")
        npf = of(arm, "npf", "mean")
        more = ", ".join(f"{mean(of(arm, 'interference', task)):+.3f}" for task in tasks) if npf else ""
        cells += [f"{mean(npf):.2f}{spread([r['value'] for r in npf])}" if npf else "", more]
        out.append(f"| {arm} | {len(npf) or ''} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


ALIGN = """Means of two mixtures that one dense base became, each with a router of its own, trained on the same data:
with the experts as they are, in the first's order (`align`), and in one at random; `alone` is a mixture itself. Test
nll, nats a token of the references, the mean over pairs ± their standard deviation (pairs share models).
"""


def align(data: dict[str, Any]) -> str:
    """What the order of experts does to the mean of mixtures: a line an arm."""
    rows, meta = data["rows"], data["meta"]
    tasks = unique(r["task"] for r in rows if r["metric"] == "nll")
    out = [f"## {data['experiment']}\n", f"`{meta['command']}` · {meta['split']} · {meta['date']}\n", ALIGN]
    lines = []
    for arm in unique(r["arm"] for r in rows):
        found = [[r["value"] for r in rows if (r["arm"], r["metric"], r["task"]) == (arm, "nll", t)] for t in tasks]
        moved = [100 * r["value"] for r in rows if (r["arm"], r["metric"]) == (arm, "moved")]
        cells = (f"{np.mean(values):.3f}{spread(values, 3)}" for values in found)
        lines.append((arm, str(len(found[0])), *cells, f"{np.mean(moved):.0f}" if moved else ""))
    head = ("arm", "models", *(f"{task} ↓" for task in tasks), "experts moved, %")
    return "\n".join([*out, aligned([head, ("---", *["--:"] * (len(head) - 1)), *lines])]) + "\n"


TASK_MOE = """An interpretation of the paper, of which the abstract alone is known to us. chrF ({chrf})
and BLEU ({bleu}) are sacreBLEU's, means over directions.
Low-resource directions have fewer than 1,000 sentences to learn from ({low}), high-resource ones
more than 10,000 ({high}). Off-target is the share of outputs in another language than asked, by py3langid;
in brackets that of the references.
"""


TASK_MOE_SHARED = """How much of their experts, and of their adapters, directions have in common that differ in one
language: the mean of pairs whose two languages are related (Germanic, Romance, Slavic), and of pairs whose are not.
"""


TASK_MOE_LATER = """What comes later to a trained model, and what became of old directions: a new language (English and
Swedish, both ways; nothing of it was seen before), and new directions between known languages (French to Catalan,
German to Russian).
"""


SPELT = {"chrf": "chrF", "bleu": "BLEU"}


def task_moe(data: dict[str, Any]) -> str:
    """Translators: an arm a line, groups of directions; then what a new language costs."""
    rows, meta = data["rows"], data["meta"]

    def cell(arm: str, metric: str, task: str, digits: int = 2, factor: float = 1) -> str:
        found = [r["value"] * factor for r in rows if (r["arm"], r["metric"], r["task"]) == (arm, metric, task)]
        around = spread(found, digits) if np.any(np.diff(found)) else ""
        return f"{np.mean(found):,.{digits}f}{around}" if found else ""

    def seeds(arm: str) -> str:
        return str(len({r["seed"] for r in rows if r["arm"] == arm}))

    new = unique(r["arm"] for r in rows if r["task"] == "later")
    arms = [arm for arm in unique(r["arm"] for r in rows) if arm not in new]
    signed = {name: f"`{meta['signatures'].get(name, '')}`" for name in SPELT}
    ends = {name: ", ".join(meta[f"{name}-resource"]) for name in ("low", "high")}
    out = [f"## {data['experiment']}\n", f"`{meta['command']}` · {meta['split']} · {meta['date']}\n"]
    out.append(TASK_MOE.format(**signed, **ends))
    for metric in ("chrf", "bleu"):
        tasks = ("trained", "en-xx", "xx-en", "xx-yy", "low-resource", "high-resource", "zero-shot")
        sizes = ("parameters", "active parameters")
        head = (f"{metric} ↑", "seeds", *(f"{size}, M" for size in sizes), *tasks)
        lines = [
            (
                arm,
                seeds(arm),
                *(cell(arm, size, "all", 2, 1e-6) for size in sizes),
                *(cell(arm, metric, task, 2, 100) for task in tasks),
            )
            for arm in arms
        ]
        out.append(aligned([head, ("---", *["--:"] * (len(head) - 1)), *lines]))
    tasks = ("trained", "zero-shot")
    head = ("off-target, % ↓", *tasks)
    lines = []
    for arm in arms:
        cells = [[cell(arm, m, t, 1, 100) for m in ("off-target", "references off-target")] for t in tasks]
        lines.append((arm, *(f"{mine} ({theirs})" for mine, theirs in cells)))
    out.append(aligned([head, ("---", "--:", "--:"), *lines]))
    kinds = ("experts", "adapters")
    head = ("in common, %", *(f"{kind}, {related}" for kind in kinds for related in ("related", "unrelated")))
    cells = {a: [cell(a, f"{k} in common", r, 1, 100) for k in kinds for r in ("related", "unrelated")] for a in arms}
    out += [TASK_MOE_SHARED]
    out.append(aligned([head, ("---", *["--:"] * 4), *((a, *found) for a, found in cells.items() if any(found))]))
    out += ["Changes of the mean over directions, on the same lines, all seeds; test rows are drawn whole:\n"]
    lines = [
        (
            c["arm"],
            c["against"],
            c["task"],
            SPELT.get(c["metric"], c["metric"]),
            f"{100 * c['relative_change']:+.1f} %",
            "{:+.1f} to {:+.1f}".format(*(100 * x for x in c["ci95"])),
            f"{c['p_value']:.4f}",
        )
        for c in data["comparisons"]
    ]
    head = ("arm", "against", "directions", "metric", "change", "95 % interval", "p")
    out.append(aligned([head, (*["---"] * 4, *["--:"] * 3), *lines]))
    out += [TASK_MOE_LATER]
    old = ("old lines that changed", "of", "old chrF before", "after")
    head = ("arm", "seeds", "trained parameters", "chrF before", "after ↑", "BLEU ↑", "off-target, % ↓", *old)
    lines = []
    for arm in new:
        size = cell(arm, "trained parameters", "later", 0)
        scores = [cell(arm, metric, "later", 2, 100) for metric in ("chrf before", "chrf", "bleu")]
        scores.append(cell(arm, "off-target", "later", 1, 100))
        counts = [cell(arm, metric, "old", 0) for metric in ("lines changed", "lines")]
        both = [cell(arm, metric, "old", 2, 100) for metric in ("chrf before", "chrf")]
        lines.append((arm, seeds(arm), size, *scores, *counts, *both))
    out.append(aligned([head, ("---", *["--:"] * 10), *lines]))
    return "\n".join(out) + "\n"


U2PP = """Word and character error rates of held-out utterances, the mean over seeds ± their standard deviation; in
brackets the 95 % bootstrap interval over utterances, whose errors are summed over seeds. `moe` has 8 experts of which a
frame takes 2 and `dense` as many active parameters, `wide` is dense with as many in all. Chunks are of 16 frames (640
ms) and 4 (160 ms), all before them seen. The change is against `dense` on the same utterances and seeds, p its paired
randomisation test. M are millions of parameters, minutes those of training, compiling included, on a core beside
another one at work.
"""


def u2pp(data: dict[str, Any]) -> str:
    """Recognisers: a table a corpus, a line an arm and decoding; then the languages, where there are several."""
    rows, meta = data["rows"], data["meta"]
    out = [f"## {data['experiment']}\n", f"`{meta['command']}` · {meta['split']} · {meta['date']}\n", U2PP]

    def of(corpus: str, arm: str, metric: str, decoding: str | None = None, name: str = "all") -> list[dict[str, Any]]:
        key = (corpus, arm, metric, decoding, name)
        return [r for r in rows if (r["task"], r["arm"], r["metric"], r.get("decoding"), r["set"]) == key]

    def rate(found: list[dict[str, Any]]) -> str:
        values = [100 * r["value"] for r in found if r["seed"] is not None]
        return f"{np.mean(values):.2f}{spread(values)}"

    for corpus in unique(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == corpus]
        arms, decodings = unique(r["arm"] for r in mine), unique(r["decoding"] for r in mine if "decoding" in r)
        sets = [name for name in unique(r["set"] for r in mine) if name != "all"]
        lines = next(r["lines"] for r in mine if r["set"] == "all")
        out.append(f"### {corpus}, {lines} utterances\n")
        head = ("decoding", "arm", "M", "minutes", "seeds", "WER % ↓", "95 %", "CER % ↓", "change of WER", "p")
        table = []
        for decoding in decodings:
            for arm in arms:
                found = of(corpus, arm, "wer", decoding)
                minutes = [r["value"] for r in of(corpus, arm, "minutes")]
                over = next((r for r in found if r["seed"] is None), found[0])  # of all seeds, where there are several
                low, high = over["value_ci95"]
                change, p = over["relative_change"], over["p_value"]
                table.append(
                    (
                        decoding,
                        arm,
                        f"{of(corpus, arm, 'parameters')[0]['value'] / 1e6:.2f}",
                        f"{np.mean(minutes):.0f}" if minutes else "",
                        str(sum(r["seed"] is not None for r in found)),
                        rate(found),
                        f"{100 * low:.2f} to {100 * high:.2f}",
                        rate(of(corpus, arm, "cer", decoding)),
                        "" if change is None else f"{100 * change:+.1f} %",
                        "" if p is None else f"{p:.4f}",
                    )
                )
        out.append(aligned([head, ("---", "---", *["--:"] * 8), *table]))
        if len(sets) > 1:
            decoding = "whole, rescored"
            head = (f"WER %, {decoding}", *sets)
            each = [(arm, *(rate(of(corpus, arm, "wer", decoding, name)) for name in sets)) for arm in arms]
            out.append(aligned([head, ("---", *["--:"] * len(sets)), *each]))
    return "\n".join(out) + "\n"


EVALUATION_ONLY = """Evaluation only: nothing was trained or tuned on these sets. `average` is the plain mean of the
sets, `all` their lines together, `distinct hypotheses: n` the lines whose list has so many. `hypo2trans` is how
HyPoradise's authors score: punctuation and digits deleted, the mean of the lines' own rates.
"""


def zero_shot(data: dict[str, Any]) -> str:
    """Test sets of others, once under each normaliser."""
    out = [f"## Zero-shot: HyPoradise\n\n`{data['meta']['command']}` · {data['meta']['date']}\n"]
    out.append(EVALUATION_ONLY)
    for normaliser in unique(r["normaliser"] for r in data["rows"]):
        out.append(to_markdown([r for r in data["rows"] if r["normaliser"] == normaliser]))
    return "\n".join(out)


UNSEEN = """Evaluation only: other sets of the families that were trained, and `tn` and `itn`, which no model here was
trained on. Of a longer set {lines} lines chosen by a hash of their text. The guard's threshold is the run's own: it was
tuned on the validation text of the shipped sets.
"""


def unseen(data: dict[str, Any]) -> str:
    """Sets and families that no arm was trained on, a table a family."""
    found = re.search(r"--lines (\d+)", data["meta"]["command"])
    out = [f"## Unseen sets and families\n\n`{data['meta']['command']}` · {data['meta']['date']}\n"]
    out.append(UNSEEN.format(lines=found[1] if found else "at most 300"))
    for task in unique(r["task"] for r in data["rows"]):
        out.append(f"### {task}\n\n" + to_markdown([r for r in data["rows"] if r["task"] == task]))
    return "\n".join(out)


SPEED = """# Speed

A ratio is ours / the rival's in time or memory, the smaller the better, both measured in one run in turns; targets are
goals that were set beforehand. Each benchmark's first lines say what its cases are. From run to run times differ by a
fifth on a shared machine, ratios by a tenth.
"""


def speed() -> Iterator[str]:
    """The tables of results/speed/<benchmark>.json, each followed by its remarks (<benchmark>.md)."""
    for path in sorted((ROOT / "results" / "speed").glob("*.json")):
        data = json.loads(path.read_text("utf-8"))
        about = ", ".join(f"{k} {v}" for k, v in data["machine"].items())
        yield f"## speed: {path.stem}\n\n`{data['command']}` · {data['date']} · {about}\n\n{markdown(data['rows'])}\n"
        notes = path.with_suffix(".md")
        if notes.exists():
            yield notes.read_text("utf-8")


# What the README shows of speed: the benchmark, a part of the names of its rows, what it is.
FRONT = (
    ("moe_layer", "T2048 d256 E8 k2: ", "MoE layer / dense one of equal active FLOPs, 2,048 tokens, d 256, top 2 of 8"),
    ("moe_layer", "T2048 d1024 E8 k2: ", "the same, d 1024"),
    ("train_step", ": step", "training step / transformers on PyTorch"),
    ("decode", ": generate", "decoding 128 tokens / `transformers.generate`"),
    ("rtf", "225M: ", "Conformer of 1,080 M parameters / dense one of equal active FLOPs"),
    ("input_pipeline", "wait: ", "waiting for input / training step"),
    ("tpu_aot", "v5p step", "training step, MoE / dense, as the TPU compiler estimates it, 64 v5p chips"),
)


def front_speed() -> str:
    out = ["| ours / rival, CPU unless said (smaller is better) | ratio | target |", "|---|---|--:|"]
    for name, part, what in FRONT:
        path = ROOT / "results" / "speed" / f"{name}.json"
        if not path.exists():
            continue
        rows = [r for r in json.loads(path.read_text("utf-8"))["rows"] if part in r["case"] and r["target"]]
        cells = ", ".join(
            f"{r['case'].replace(part, '').strip(' :')} {r['ratio']:.{2 if r['ratio'] < 0.1 else 3}g}" for r in rows
        )
        targets = ", ".join(dict.fromkeys(f"{r['target']:.3g}" for r in rows))
        out.append(f"| {what} | {cells} | {targets} |")
    return "\n".join(out)


RENDERERS = {
    "chain": partial(table, each=by_seed),
    "zero_shot": zero_shot,
    "unseen": unseen,
    **{f"merging_{setting}": merging for setting in ("corrector", "recogniser", "translator")},
    "merging_align": align,
    "task_moe": task_moe,
    "u2pp": u2pp,
}


ROUTING = "The share of each task's tokens that free routing sends to each expert, by layer, the darker the larger"


def results() -> str:
    """The text of RESULTS.md: each experiment's own remarks (results/<experiment>/notes.md) follow its table."""
    parts = [HEAD]
    for path in sorted((ROOT / "results").glob("*/table.json")):
        data = json.loads(path.read_text("utf-8"))
        parts.append(RENDERERS.get(data["experiment"], table)(data))
        if (drawn := path.with_name("routing.svg")).exists():
            parts.append(f"![{ROUTING}]({drawn.relative_to(ROOT)})\n")
        notes = path.with_name("notes.md")
        if notes.exists():
            parts.append(notes.read_text("utf-8"))
    return "\n".join([*parts, SPEED, *speed()])


# What the README shows of results/neko, and what it calls it.
FRONT_ARMS = {
    "first pass": "first pass",
    "oracle n-best": "the best text of each list, by an oracle",
    "oracle compositional": "the best words of each list, by an oracle",
    "quickstart": "**`make quickstart`**: an expert a task (`neko`), from the shipped base",
    "neko": "`neko`: an expert a task, from a base that knows no recogniser",
    "top2": "`top2`: the same, routed freely",
    "random": "`random`: the same, a random task map",
    "dense": "`dense`: no experts, as many active parameters",
    "single": "`single`: a dense model a task, which is told the task",
}
FRONT_TASKS = {"asr": "speech", "ocr": "print", "mt": "translation", "gec": "writers' errors"}


def front_table() -> str:
    """The README's table: arms of the experiment that the quickstart is one of, the main error of each family."""
    data = json.loads((ROOT / "results" / "neko" / "table.json").read_text("utf-8"))
    rows = [r for r in data["rows"] if r["set"] == "all" and r["metric"] == "wer"]
    tasks, arms = unique(r["task"] for r in rows), {r["arm"] for r in rows}
    said = [f"{FRONT_TASKS[task]} (`{task}`)" for task in tasks]
    out = ["| word error rate, % | " + " | ".join(said) + " |", "|---|" + "--:|" * len(tasks)]
    for arm in (arm for arm in FRONT_ARMS if arm in arms):
        cells = []
        for task in tasks:
            mine = [r for r in rows if (r["arm"], r["task"]) == (arm, task)]
            changes = [r["relative_change"] for r in mine if r["relative_change"] is not None]
            sure = all(r["p_value"] is not None and r["p_value"] < 0.05 for r in mine)
            change = f" ({100 * np.mean(changes):+.1f} %{'*' if sure else ''})" if changes else ""
            cells.append(f"{100 * np.mean([r['value'] for r in mine]):.2f}{change}")
        seeds = len({r["seed"] for r in rows if r["arm"] == arm} - {None})
        drawn = f" ({seeds} seed{'s' if seeds > 1 else ''})" if seeds else ""
        out.append(f"| {FRONT_ARMS[arm]}{drawn} | " + " | ".join(cells) + " |")
    meta = data["meta"]
    out.append(
        f"\nHeld-out test lines, relative change against the first pass; * p < 0.05 with every seed. {meta['date']}, "
        f"`{meta['command']}`. [RESULTS.md](RESULTS.md#neko) has all arms, metrics, sets and intervals."
    )
    return "\n".join(out)


def readme(text: str) -> str:
    """The README with its tables made anew, each between its two markers."""
    for name, made in (("results", front_table()), ("speed", front_speed())):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    wanted = {"RESULTS.md": results(), "README.md": readme((ROOT / "README.md").read_text("utf-8"))}
    for name, text in wanted.items():
        path = ROOT / name
        if not args.check:
            partfile.write_text(path, text)
        elif not path.exists() or path.read_text("utf-8") != text:
            sys.exit(f"{name} does not agree with results/: run python -m benchmarks.results")


if __name__ == "__main__":
    main()

"""Run folder -> one HTML file that needs nothing else: no network, no other file, no server."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from moe_jax.report import results
from moe_jax.report.atlas import SHADES, atlas
from moe_jax.report.curves import curves
from moe_jax.report.diff import marked
from moe_jax.report.read import Run, read_run

HERE = Path(__file__).parent


def write_report(run_dir: Path, *, title: str) -> Path:
    """Write `report.html` into a run folder and return its path.

    Reads `scores.json` and, where they exist, `routing.json`, `metrics.jsonl` and `examples.jsonl`; the
    section of an absent file is left out. WER, CER and F0.5 are fractions (0.12 is 12 %), BLEU and chrF run
    from 0 to 100; `relative_change` and `ci95` are fractions of the first pass's score. The first "all" row
    of a family is the one that its headline tells. A line is fixed if the correction leaves fewer errors,
    broken if more, untouched if as many.

    Raises:
      ValueError: `scores.json` is missing or a file is malformed; the message is one line with the place.
    """
    run_dir = Path(run_dir)
    page = render(read_run(run_dir), title)
    target = run_dir / "report.html"
    aside = run_dir / f".report.html.{os.getpid()}"
    try:
        # A lone surrogate in a user's JSON has no UTF-8 form.
        aside.write_bytes(page.encode("utf-8", "replace"))
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def render(run: Run, title: str) -> str:
    """The page's HTML. Every value from the run passes jinja2's autoescape or `json_for_html`."""
    css, js = ((HERE / name).read_text("utf-8") for name in ("report.css", "report.js"))
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template("report.html").render(
        title=title,
        css=Markup(css),
        js=Markup(js),
        csp=f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(js)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        meta=run.meta,
        brief=[(k, v) for k, v in run.meta.items() if len(v) <= 32][:4],
        summary=results.summary(run.rows),
        cards=results.cards(run.rows),
        table=results.table(run.rows),
        bars=results.bars(run.rows),
        measures=list(dict.fromkeys(_measure(row) for row in run.rows if row["normaliser"] or row["signature"])),
        shades=range(1, SHADES + 1),
        verdicts=results.VERDICTS,
        icons=results.ICONS,
        metrics={row["metric"] for row in run.rows},
        atlas=atlas(run.routing) if run.routing else None,
        curves=curves(run.log) if run.log else None,
        examples=json_for_html([_shown(e) for e in run.examples]) if run.examples else None,
        example_tasks={e["task"] for e in run.examples or ()},
    )


def json_for_html(value: object) -> Markup:
    """JSON that may stand inside a <script>: nothing in it can end the element or a JavaScript line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _shown(example: dict[str, Any]) -> dict[str, Any]:
    first, *others = example["hypotheses"]
    return {
        "task": example["task"],
        "set": example["set"],
        "before": example["errors_before"],
        "after": example["errors_after"],
        "kept": bool(example["kept"]),
        "lines": marked(first, example["correction"], example["reference"]),
        "others": others,
    }


def _measure(row: dict[str, Any]) -> tuple[str, str, str]:
    return results.METRICS[row["metric"]], row["task"], row["normaliser"] or row["signature"]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

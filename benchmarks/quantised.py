"""What holding weights in fewer bytes changes: `results/quantised/table.json`, of a model over validation lines.

    python -m benchmarks.quantised runs/neko/neko-0/model.safetensors     # about five minutes on two cores

For each checkpoint (the shipped base comes first; its file holds bfloat16, which as weights is therefore exact), each
way of holding weights and each family: the word error rate of what the model writes (without the guard, which would
hide differences), against that of float32, and the mean absolute difference of its logits over prompts and references.
`meta` has the bytes of the weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import checkpoint, decode, launch, partfile, quantise
from moe_jax.branches import FAMILIES
from moe_jax.evaluate import line_errors, propose, read_rows
from moe_jax.metrics import errors, significance
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.pipeline import Pipeline
from moe_jax.text.prompt import encode_example

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tasks" / "data"
BASE = DATA / "base.safetensors"
ARMS = ("float32", "bfloat16", "int8")
BATCH = 16


@jax.jit
def logits(model: Any, tokens: np.ndarray, info: Any) -> jax.Array:
    return model.logits(model(tokens, info)[0])


def logit_differences(pipelines: dict[str, Pipeline], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """arm -> mean |logit - that of float32| over tokens and vocabulary, of prompts with their references."""
    first, total, count = pipelines[ARMS[0]], dict.fromkeys(pipelines, 0.0), 0
    made = (
        encode_example(
            first.tokeniser, r["hypotheses"], (), r["reference"], max_length=first.max_length, layout=first.layout
        )
        for r in rows
    )
    texts = sorted((e.tokens for e in made if e), key=len)
    for start in range(0, len(texts), BATCH):
        batch = (texts[start : start + BATCH] + texts[-1:] * BATCH)[:BATCH]
        tokens, info = decode.padded(batch, [0] * BATCH, decode.bucket(max(map(len, batch))))
        real = np.asarray(info.valid_BxL) & (np.arange(BATCH) < len(texts) - start)[:, None]
        count += real.sum()
        exact = logits(first.model, tokens, info)
        for arm, pipeline in pipelines.items():
            off_BxL = jnp.abs(logits(pipeline.model, tokens, info) - exact).mean(-1)
            total[arm] += float(jnp.where(real, off_BxL, 0).sum())
    return {arm: float(t / count) for arm, t in total.items()}


def table(name: str, pipelines: dict[str, Pipeline], lines: int) -> list[dict[str, Any]]:
    """Rows as those of `benchmarks.arms`; changes, intervals and p-values are against float32."""
    none = {"relative_change": None, "ci95": None, "p_value": None, "fixed": None, "broken": None}
    out = []
    for family in FAMILIES:
        records, rows = read_rows([str(DATA / f"{family}.valid.jsonl.gz")], family)
        records, rows = records[:lines], rows[:lines]
        about = {"seed": None, "task": family, "set": "all"}
        sizes = errors.line_errors([r["reference"] for r in rows], [""] * len(rows), family_normaliser(family))
        words = np.array([c.reference_length for c in sizes])
        exact: Any = None
        for arm, pipeline in pipelines.items():
            found = line_errors(rows, [p.guarded(-np.inf).text for p in propose(pipeline, records)])
            wer = {"metric": "wer", "value": found.sum() / words.sum(), "lines": len(rows)}
            compared = none
            if exact is None:
                exact = found
            else:
                c = significance.compare(np.stack([exact, words], 1), np.stack([found, words], 1))
                compared = {"relative_change": c.relative_change, "ci95": c.ci95, "p_value": c.p_value}
                compared |= {"fixed": int((found < exact).sum()), "broken": int((found > exact).sum())}
            out.append({"arm": f"{name} {arm}", **about, **wer, **compared})
        for arm, off in logit_differences(pipelines, rows).items():
            more = {"metric": "mean absolute logit difference", "value": off, **none, "lines": len(rows)}
            out.append({"arm": f"{name} {arm}", **about, **more})
    return out


def main() -> None:
    launch.command()
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("checkpoints", nargs="*", type=Path, help="safetensors files beside the shipped base")
    parser.add_argument("--lines", type=int, default=60, help="of each family at most (default: 60)")
    args = parser.parse_args()
    given = " ".join(map(str, args.checkpoints))
    meta: dict[str, Any] = {"command": f"python -m benchmarks.quantised {given} --lines {args.lines}"}
    meta |= {"date": f"{datetime.date.today()}", "bytes of weights": {}}
    meta["split"] = ", ".join(f"{family}.valid.jsonl.gz" for family in FAMILIES)
    rows, steps = [], []
    for path in (BASE, *args.checkpoints):
        name = path.parent.name if path.stem == "model" else path.stem
        pipelines = {arm: Pipeline.load(path, weights=arm) for arm in ARMS}
        meta["bytes of weights"][name] = {arm: quantise.size(p.model) for arm, p in pipelines.items()}
        steps.append(str(checkpoint.Source(path).meta.get("step")))
        rows += table(name, pipelines, args.lines)
    meta["step"] = ", ".join(steps)
    path = ROOT / "results" / "quantised" / "table.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"experiment": "quantised", "meta": meta, "rows": rows, "comparisons": []}, indent=1)
    partfile.write_text(path, text + "\n")
    print(f"{path.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()

"""A drawing of who uses which experts: an SVG file of its own, a panel a layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from markupsafe import Markup, escape

from moe_jax.report.atlas import told_apart

CELL, GAP, NAMES, HEAD, TITLE = 16, 24, 64, 56, 20
TEXT = Markup('<text x="{}" y="{}" {}>{}</text>')


def heat_maps(parts: dict[str, dict[str, Any]]) -> str:
    """SVG of `{"experts": {"tasks": [...], "load": shares_NxTxE}, ...}`, a part as a run's routing.json: one row of
    panels a part, under its name, in each a row a task and a column an expert, the darker the larger the share of the
    task's tokens (hover for it), with a frame where `mapped` says that the expert is the task's. `told_apart` of each
    layer is computed where it is not given."""
    drawn, y, width = Markup(""), 0, 0
    for part, found in parts.items():
        drawn += TEXT.format(NAMES, y + 16, Markup('font-weight="bold"'), part)
        x, y = NAMES, y + TITLE
        each = found.get("told_apart") or [told_apart(load) for load in found["load"]]
        mapped = {(task, expert) for task, experts in found.get("mapped", {}).items() for expert in experts}
        for layer, (load, apart) in enumerate(zip(found["load"], each, strict=True)):
            names = found["tasks"] if layer == 0 else None
            drawn += _panel(x, y, f"layer {layer}", apart, load, names, found["tasks"], mapped)
            x += CELL * len(load[0]) + GAP
        width, y = max(width, x), y + HEAD + CELL * len(found["tasks"]) + GAP
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" '
            'font-family="sans-serif" font-size="11"><rect width="{0}" height="{1}" fill="#fff"/>{2}</svg>\n'
        ).format(width, max(y, 1), drawn)
    )


def _panel(
    x: int,
    y: int,
    title: str,
    apart: float,
    load: Sequence[Sequence[float]],
    names: Sequence[str] | None,
    tasks: Any,
    mapped: Collection[tuple[str, int]] = (),
) -> Markup:
    frames = Markup("")  # after all cells, or the next would cover a side
    out = TEXT.format(x, y + 16, "", title) + TEXT.format(x, y + 30, Markup('fill="#666"'), f"told apart {apart:.2f}")
    for e in range(len(load[0])):
        out += TEXT.format(x + CELL * e + CELL // 2, y + HEAD - 6, Markup('text-anchor="middle" fill="#666"'), e)
    for row, (task, shares) in enumerate(zip(tasks, load, strict=True)):
        top = y + HEAD + CELL * row
        if names:
            out += TEXT.format(x - 6, top + 12, Markup('text-anchor="end"'), names[row])
        for e, share in enumerate(shares):
            own = (task, e) in mapped
            edge = Markup('stroke="crimson" stroke-width="2"' if own else 'stroke="#ddd"')
            cell = Markup(
                '<rect x="{}" y="{}" width="{}" height="{}" fill="#1f4e79" fill-opacity="{:.3f}" {}>'
                "<title>{}</title></rect>"
            ).format(
                *(x + CELL * e, top, CELL, CELL, share, edge),
                escape(f"{task}, {e}: {100 * share:.1f} %{', mapped' if own else ''}"),
            )
            out, frames = (out, frames + cell) if own else (out + cell, frames)
    return out + frames

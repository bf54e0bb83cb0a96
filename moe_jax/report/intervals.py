"""A drawing of means with their intervals: an SVG file of its own, a panel a measure, a line a setting."""

from __future__ import annotations

import math
from collections.abc import Mapping

from markupsafe import Markup

from moe_jax.report.svg import short, ticks

LINE, HEAD, FOOT, GAP, PLOT = 22, 26, 26, 28, 260


def panels(measures: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """`measures`: title -> setting -> (mean, half of its interval; NaN for none). Settings are on the left, once."""
    settings = list(dict.fromkeys(name for of in measures.values() for name in of))
    left = 20 + 8 * max((len(name) for name in settings), default=0)
    height = HEAD + LINE * len(settings) + FOOT
    out = Markup("")
    text = Markup('<text x="{:.1f}" y="{:.1f}" {}>{}</text>')
    for row, name in enumerate(settings):
        out += text.format(left - 10, HEAD + LINE * row + 15, Markup('text-anchor="end"'), name)
    for column, (title, of) in enumerate(measures.items()):
        x = left + column * (PLOT + GAP)
        ends = [m + s * (h if math.isfinite(h) else 0) for m, h in of.values() for s in (-1, 1) if math.isfinite(m)]
        low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
        air = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        low, high = low - air, high + air

        def at(value: float, x: float = x, low: float = low, high: float = high) -> float:
            return x + PLOT * (value - low) / (high - low)

        out += text.format(x, 16, Markup('font-weight="bold"'), title)
        for tick in ticks(low, high):
            out += Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}" stroke="#ddd"/>').format(
                at(tick), HEAD, height - FOOT
            )
            out += text.format(at(tick), height - 10, Markup('text-anchor="middle" fill="#666"'), short(tick))
        for row, name in enumerate(settings):
            mean, half = of.get(name, (math.nan, math.nan))
            if not math.isfinite(mean):
                continue
            y = HEAD + LINE * row + 11
            if math.isfinite(half):
                span = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}" stroke="#1f4e79" stroke-width="2"/>')
                out += span.format(at(mean - half), at(mean + half), y, y)
            said = f"{name}: {mean:.4g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")
            out += Markup('<circle cx="{:.1f}" cy="{}" r="4" fill="#1f4e79"><title>{}</title></circle>').format(
                at(mean), y, said
            )
    width = left + len(measures) * (PLOT + GAP)
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" '
            'font-family="sans-serif" font-size="12"><rect width="{0}" height="{1}" fill="#fff"/>{2}</svg>\n'
        ).format(width, height, out)
    )

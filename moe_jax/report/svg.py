"""Small SVG drawings: whiskers, stacked bars, line charts. Colours come from classes of the style sheet."""

from __future__ import annotations

import dataclasses
import math

from markupsafe import Markup, escape

Point = tuple[float, float]


def whisker(value: float, low: float, high: float, *, scale: Point, label: str) -> Markup:
    """A dot with its interval and a mark at zero, on a scale from least to greatest; as wide as its place."""

    def at(v: float) -> str:
        share = (v - scale[0]) / (scale[1] - scale[0])
        return f"{3 + 94 * max(0.0, min(1.0, share)):.2f}%"

    low, high = min(low, high), max(low, high)
    return Markup(
        '<svg class="whisker" role="img" aria-label="{0}"><title>{0}</title>'
        '<line class="zero" x1="{4}" x2="{4}" y1="0" y2="16"/>'
        '<line class="span" x1="{1}" x2="{2}" y1="8" y2="8"/>'
        '<line class="cap" x1="{1}" x2="{1}" y1="4.5" y2="11.5"/>'
        '<line class="cap" x1="{2}" x2="{2}" y1="4.5" y2="11.5"/>'
        '<circle cx="{3}" cy="8" r="4"/></svg>'
    ).format(label, at(low), at(high), at(value), at(0))


def stacked(parts: list[tuple[str, int]], total: int, *, label: str) -> Markup:
    """One bar of (class, count) parts on a track of `total`; as wide as its place."""
    bars, left = Markup(""), 0
    for css_class, count in parts:
        bars += Markup('<rect class="{}" x="{:.3f}%" width="{:.3f}%" height="14"/>').format(
            css_class, 100 * left / max(total, 1), 100 * count / max(total, 1)
        )
        left += count
    return Markup('<svg class="stack" role="img" aria-label="{0}"><title>{0}</title>{1}</svg>').format(label, bars)


@dataclasses.dataclass(frozen=True)
class Series:
    """A named line. `css_class` picks colour and dash; points with a NaN break the line."""

    name: str
    css_class: str
    points: list[Point]


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 46, 12, 12, 28


def line_chart(series: list[Series], *, x_range: Point, y_range: Point, log_y: bool, label: str) -> Markup:
    """A line chart with light grid lines. Lines of many points are drawn as the means of runs of points, with
    a band from the least to the greatest of each run."""
    x_low, x_high = x_range
    y_low, y_high = (math.log10(v) for v in y_range) if log_y else y_range

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - x_low) / ((x_high - x_low) or 1)
        y = math.log10(point[1]) if log_y else point[1]
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (y_high - y) / ((y_high - y_low) or 1)

    body = Markup("")
    for tick in log_ticks(*y_range) if log_y else ticks(*y_range):
        y = place((x_low, tick))[1]
        body += Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end" dy="0.32em">{}</text>'
        ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 7, y, short(tick))
    for tick in ticks(x_low, x_high, 4):
        x = place((tick, y_range[0]))[0]
        body += Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            x, HEIGHT - 9, short(tick)
        )
    for one in series:
        body += _line(one, place)
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-frame="{}">{}</svg>').format(
        WIDTH,
        HEIGHT,
        label,
        f"{LEFT} {WIDTH - RIGHT} {x_low} {x_high} {TOP} {HEIGHT - BOTTOM} {y_low} {y_high} {int(log_y)}",
        body,
    )


def _line(series: Series, place) -> Markup:
    body = Markup("")
    for run in _unbroken(series.points):
        means, lows, highs = _thinned(run)
        if len(means) < len(run):
            band = " ".join(_pair(place(p)) for p in lows + highs[::-1])
            body += Markup('<polygon class="band {}" points="{}"/>').format(series.css_class, band)
        line = " ".join(_pair(place(p)) for p in means)
        body += Markup('<polyline class="line {}" data-name="{}" points="{}"/>').format(
            series.css_class, series.name, line
        )
        if len(means) <= 24:
            for point in means:
                x, y = place(point)
                body += Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.4"/>').format(
                    series.css_class, x, y
                )
    return body


def _pair(point: Point) -> str:
    return f"{point[0]:.1f},{point[1]:.1f}"


def _unbroken(points: list[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(points: list[Point], most: int = 160) -> tuple[list[Point], list[Point], list[Point]]:
    """Means, least and greatest of at most `most` runs of neighbouring points."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    mid = [sum(x for x, _ in group) / len(group) for group in groups]
    values = [[y for _, y in group] for group in groups]
    return (
        [(x, sum(ys) / len(ys)) for x, ys in zip(mid, values, strict=True)],
        [(x, min(ys)) for x, ys in zip(mid, values, strict=True)],
        [(x, max(ys)) for x, ys in zip(mid, values, strict=True)],
    )


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; only the powers if there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    decades = [t for t in found if math.isclose(math.log10(t), round(math.log10(t)), abs_tol=1e-9)]
    return decades if len(found) > 7 else found


def short(value: float) -> str:
    """A tick's label: 0.02, 1.5, 20k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return str(escape(f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"))

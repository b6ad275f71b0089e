"""Line charts as inline SVG, for the report: no script, no dependency; colours come from the page's CSS.

Classes that the page styles: `chart`, `grid`, `axis`, `mark`, `tick`, `label`, `s0`…`s2` (the series' colours),
`faint`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 46, 50, 42
MOST_POINTS = 600  # of one line; more cannot be told apart at this size
SMOOTHED_FROM = 100  # points of a noisy curve
LOG_FROM = 5.0  # largest / smallest value from which the axis is logarithmic

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve: (x, y) by rising x. `color` numbers a CSS class; a faint one stays behind and out of the legend."""

    name: str
    points: Sequence[Point]
    color: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A place on the x axis where something happened: a dashed line and a word."""

    x: float
    label: str


def points(records: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """What the records of a log say of `key`, by step."""
    return [(float(r["step"]), float(r[key])) for r in records if isinstance(r.get(key), int | float)]


def curve(name: str, raw: Sequence[Point], color: int) -> list[Series]:
    """A noisy curve: smoothed, with the raw one faint behind it; few points stay as they are."""
    if len(raw) < SMOOTHED_FROM:
        return [Series(name, raw, color)]
    return [Series(name, smooth(raw), color), Series(name, raw, color, faint=True)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Each finite y as the mean over its neighbours, a fiftieth of the curve to either side. Centred, so that the curve
    does not lag behind; the first point stays as it is, since a loss falls fastest there."""
    points = finite(points)
    reach, n = max(1, len(points) // 50), len(points)
    sums = [0.0, *accumulate(y for _, y in points)]
    smoothed = []
    for i, (x, _) in enumerate(points):
        before, after = min(i, reach), min(i, reach, n - 1 - i)
        smoothed.append((x, (sums[i + after + 1] - sums[i - before]) / (after + before + 1)))
    return smoothed


def finite(points: Sequence[Point]) -> list[Point]:
    """Without NaN, infinity and what would overflow an axis; what would underflow one (5e-324 / 4 is 0) becomes 0."""

    def flushed(value: float) -> float:
        return value if abs(value) > 1e-30 else 0.0

    return [(flushed(x), flushed(y)) for x, y in points if abs(x) < 1e30 and abs(y) < 1e30]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Every k-th point, and always the last."""
    k = -(-len(points) // most)
    return list(points) if k <= 1 else [*points[:-1:k], points[-1]]


class Scale:
    """From values to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = (low * 0.9, high * 1.1) if log else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def linear_ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About `n` round values (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Three to six values inside [low, high], low > 0: 1, 2, 5 (or 1, 3, or 1) times powers of ten, every k-th decade
    of a wide range; round values as on a linear axis where the range is too narrow for these."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        values = (m * 10.0**d for d in decades for m in multiples)
        found = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) < 3:
            return [tick for tick in linear_ticks(low, high) if tick > 0]
        if len(found) <= 6:
            return found
    return found[:: -(-len(found) // 6)]


def short(value: float) -> str:
    """A number for an axis: 1500 as 1.5K, 0.25 as 0.25."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_y: bool | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """The chart, or "" when no series has a finite point. log_y None: logarithmic where values span a factor of 5.
    Marks that lie outside of the curves are left out."""
    drawn = [Series(s.name, thin(found), s.color, s.faint, s.dots) for s in series if (found := finite(s.points))]
    if not drawn:
        return ""
    ys = [y for s in drawn for _, y in s.points]
    xs = [x for s in drawn for x, _ in s.points]
    low, high = min(ys), max(ys)
    if log_y is None:
        log_y = low > 1e-30 and high / low > LOG_FROM
    log_y = log_y and low > 1e-30
    pad = (high / low) ** 0.05 if log_y else (high - low) * 0.06
    low, high = (low / pad, high * pad) if log_y else (low - pad, high + pad)
    x = Scale(min(0.0, min(xs)), max(xs), LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, log_y)
    body = [
        *_axes(x, y, x_label, y_label + (" (log scale)" if log_y else "")),
        *(_mark(mark, x) for mark in marks if x.low <= mark.x <= x.high),
        *(_curve(s, x, y) for s in sorted(drawn, key=lambda s: not s.faint)),
        *_end_labels([s for s in drawn if not s.faint], y),
        *_hits([s for s in drawn if not s.faint], x, y, x_label),
        _legend(drawn),
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>" + "".join(body) + "</svg>"
    )


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in log_ticks(y.low, y.high) if y.log else linear_ticks(y.low, y.high):
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in linear_ticks(x.low, x.high):
        at = x(tick)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{short(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="0" y="{TOP - 14}">{escape(y_label)}</text>')
    return parts


def _mark(mark: Mark, x: Scale) -> str:
    """A word at the line's side with more room."""
    at, bottom = x(mark.x), HEIGHT - BOTTOM
    side, gap = ("start", 4) if at < WIDTH / 2 else ("end", -4)
    return (
        f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>'
        f'<text class="tick" x="{at + gap:.1f}" y="{bottom - 6}" text-anchor="{side}">{escape(mark.label)}</text>'
    )


def _curve(series: Series, x: Scale, y: Scale) -> str:
    at = [(x(a), y(b)) for a, b in series.points]
    classes = f"s{series.color}" + (" faint" if series.faint else "")
    dots = at if series.dots and len(at) <= 60 else at if len(at) == 1 else []
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
    circles = "".join(f'<circle class="dot {classes}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in dots)
    return f'<polyline class="line {classes}" points="{line}"/>{circles}'


def _end_labels(series: Sequence[Series], y: Scale) -> list[str]:
    """The last value of each curve behind its end, pushed apart where they would overlap."""
    gap, left = 14.0, WIDTH - RIGHT + 7
    ends = sorted(((y(s.points[-1][1]), s) for s in series), key=lambda end: end[0])
    placed: list[tuple[float, Series]] = []
    for at, s in ends:
        placed.append((max(at, placed[-1][0] + gap) if placed else at, s))
    over = max(0.0, placed[-1][0] - (HEIGHT - BOTTOM)) if placed else 0.0
    return [
        f'<text class="end t{s.color}" x="{left}" y="{at - over + 4:.1f}">{s.points[-1][1]:.3g}</text>'
        for at, s in placed
    ]


def _hits(series: Sequence[Series], x: Scale, y: Scale, x_label: str) -> list[str]:
    """Invisible targets that show a value on hover."""
    parts = []
    for s in series:
        for a, b in thin(s.points, 100):
            tip = escape(f"{s.name}: {b:.4g} at {a:,.0f} {x_label}")
            parts.append(f'<circle class="hit" cx="{x(a):.1f}" cy="{y(b):.1f}" r="6"><title>{tip}</title></circle>')
    return parts


def _legend(series: Sequence[Series]) -> str:
    parts, at = [], 1.0
    for s in (s for s in series if not s.faint):
        parts.append(f'<line class="line s{s.color}" x1="{at}" x2="{at + 16}" y1="12" y2="12"/>')
        parts.append(f'<text class="key" x="{at + 22}" y="16">{escape(s.name)}</text>')
        at += 40 + 6.6 * len(s.name)
    return "".join(parts)

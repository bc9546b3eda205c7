"""Charts of the report page as plain SVG, which takes its colours from the page's style sheet."""

import html
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from speech_finetuning.base.files import counted

WIDTH = 420  # in units of the drawing; a telephone is about as wide
HEIGHT = 230
LEFT = 58
RIGHT = 10
TOP = 12
BOTTOM = 30
NUM_TICKS = 5


@dataclass(kw_only=True)
class Line:
    """One curve: (step, value) points. style: a class of the style sheet."""

    name: str
    points: list[tuple[float, float]]
    style: str = "first"


@dataclass(kw_only=True)
class Chart:
    """Curves over the steps of the training."""

    title: str
    unit: str  # after a value, " %"
    lines: list[Line]
    baseline: float | None = None  # of the untouched model
    starts_at_zero: bool = True
    drawing: Markup = field(init=False)

    def __post_init__(self) -> None:
        self.drawing = draw(self)


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover low to high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / NUM_TICKS
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def short_number(value: float) -> str:
    """12,000 as 12k, 0.000125 as 1.2e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}"


def readable_hours(hours: float) -> str:
    """36 s, 14 min or 1,250.0 h."""
    seconds = 3600 * hours
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{hours:,.1f} h"


def draw(chart: Chart) -> Markup:
    """The chart as an SVG element without an address in it, as HTML needs none."""
    points = [point for line in chart.lines for point in line.points]
    values = [value for _, value in points if math.isfinite(value)]
    if chart.baseline is not None:
        values.append(chart.baseline)
    if not points or not values:
        return Markup("")
    low = min(0.0, *values) if chart.starts_at_zero else min(values)
    ticks = nice_ticks(low, max(values))
    steps = nice_ticks(0, max(step for step, _ in points) or 1)
    across = Scale(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    up = Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [grid(ticks, steps, across, up)]
    if chart.baseline is not None:
        y = up(chart.baseline)
        parts.append(f'<path class="baseline" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    for line in chart.lines:
        parts.append(curve(line, chart.unit, across, up))
    label = html.escape(f"{chart.title}: {describe(chart)}")
    body = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
    )


@dataclass(frozen=True)
class Scale:
    """From values to places in the drawing."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)


def describe(chart: Chart) -> str:
    """For those who cannot see it."""
    parts = []
    for line in chart.lines:
        if line.points:
            step, value = line.points[-1]
            parts.append(f"{line.name} {value:.4g}{chart.unit} at step {step:g}")
    if chart.baseline is not None:
        parts.append(f"untouched model {chart.baseline:.4g}{chart.unit}")
    return ", ".join(parts)


def grid(ticks: list[float], steps: list[float], across: Scale, up: Scale) -> str:
    """Lines and numbers at the left and below."""
    parts = []
    for tick in ticks:
        y = up(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>'
        )
    for step in steps:
        anchor = "end" if step == steps[-1] else "middle"
        x = across(step)
        name = short_number(step)
        if step == steps[0]:
            anchor = "start"
            name = f"step {name}"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{name}</text>')
    return "".join(parts)


def curve(line: Line, unit: str, across: Scale, up: Scale) -> str:
    """A path, and dots that tell their value when they are few."""
    points = [point for point in line.points if math.isfinite(point[1])]
    places = [f"{across(step):.1f} {up(value):.1f}" for step, value in points]
    parts = [f'<path class="curve {line.style}" d="M{"L".join(places)}"/>'] if places else []
    if len(points) <= 60:
        for (step, value), place in zip(points, places, strict=True):
            x, y = place.split()
            told = html.escape(f"{line.name}, step {step:g}: {value:.4g}{unit}")
            parts.append(
                f'<circle class="{line.style}" cx="{x}" cy="{y}" r="3"><title>{told}</title></circle>'
            )
    return "".join(parts)


def points_of(history: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of a figure of the trainer's log."""
    return [(entry["step"], float(entry[name])) for entry in history if name in entry]


def learning_charts(history: list[dict[str, Any]], zero_shot: dict[str, float]) -> list[Chart]:
    """Loss and error rates, with the untouched model as a line."""
    training_loss = Line(name="training", points=points_of(history, "loss"), style="second")
    evaluated_loss = Line(name="evaluation", points=points_of(history, "eval_loss"))
    charts = [
        Chart(
            title="Loss",
            unit="",
            lines=[training_loss, evaluated_loss],
            baseline=zero_shot.get("zero_shot_loss"),
        )
    ]
    for name in ("wer", "cer"):
        points = points_of(history, f"eval_{name}")
        if points:
            charts.append(
                Chart(
                    title=f"{name.upper()} in %",
                    unit=" %",
                    lines=[Line(name=name.upper(), points=points)],
                    baseline=zero_shot.get(f"zero_shot_{name}"),
                )
            )
    rate = Line(name="rate", points=points_of(history, "learning_rate"))
    charts.append(Chart(title="Learning rate", unit="", lines=[rate]))
    return [chart for chart in charts if chart.drawing and any(line.points for line in chart.lines)]


def speed_charts(history: list[dict[str, Any]]) -> list[Chart]:
    """How fast the training went, and how long it waited for data."""
    waits = [(step, 100 * value) for step, value in points_of(history, "data_wait_fraction")]
    padding = [(step, 100 * value) for step, value in points_of(history, "padding_fraction")]
    charts = [
        Chart(
            title="Hours of speech trained on per hour",
            unit=" h",
            lines=[Line(name="speech", points=points_of(history, "audio_hours_per_hour"))],
        ),
        Chart(
            title="Time spent waiting for data, in %",
            unit=" %",
            lines=[Line(name="waiting", points=waits)],
        ),
        Chart(
            title="Padding in the encoder's window, in %",
            unit=" %",
            lines=[Line(name="padding", points=padding)],
        ),
    ]
    return [chart for chart in charts if chart.drawing]


def histogram(values: list[float], num_bars: int = 24) -> list[dict[str, Any]]:
    """Bars up to the 99th percentile, the last of which counts the rest as well: label, count, right
    end, and height in percent of the highest."""
    if not values:
        return []
    last = float(np.percentile(values, 99)) or 1.0
    counts, edges = np.histogram(np.minimum(values, last), bins=num_bars, range=(0, last))
    highest = max(1, int(counts.max()))
    return [
        {
            "label": f"{low:.3g} to {high:.3g}: {counted(count, 'row')}",
            "count": count,
            "high": high,
            "height": round(100 * count / highest, 1),
        }
        for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
    ]

"""Layout of line charts: positions of ticks, lines and labels in pixels. Templates and style sheets draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deskrl.analysis.report.run_history import Points

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Ticks of a percentage axis, for a tall chart and for a small one.
_SHARES = ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.5, 1.0])
_LABEL_GAP = 13.0
_TOP, _RIGHT, _BOTTOM, _LEFT = 10.0, 14.0, 38.0, 46.0
# A wide chart is scaled down on a narrow screen while its labels keep their size, so that they need more room.
_WIDE, _WIDE_LEFT = 500.0, 58.0
_LABEL_ROOM = 34.0


@dataclass(frozen=True)
class Line:
    """A curve with a label at its end; a faint one is drawn pale."""

    points: Points
    label: str = ""
    faint: bool = False
    series: int = 0
    """Index of its colour in the style sheet."""


@dataclass(frozen=True)
class Band:
    """Area between a lower and an upper curve."""

    points: Sequence[tuple[float, float, float]]
    """(x, low, high) at each x."""
    series: int = 0
    """Index of its colour, which is that of the line it belongs to."""


@dataclass(frozen=True)
class Whisker:
    """A value with an interval."""

    x: float
    value: float
    low: float
    high: float
    label: str
    hollow: bool = False


@dataclass(frozen=True)
class Scale:
    """Map of values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class DrawnLine:
    """A line in pixels: an SVG path, isolated points between gaps, and the position of the label."""

    path: str
    dots: list[tuple[float, float]]
    label: str
    label_x: float
    label_y: float
    faint: bool
    series: int


@dataclass(frozen=True)
class DrawnBand:
    """A band in pixels: a closed SVG path."""

    path: str
    series: int


@dataclass(frozen=True)
class DrawnWhisker:
    """A whisker in pixels."""

    x: float
    y: float
    low_y: float
    high_y: float
    label: str
    hollow: bool


@dataclass(frozen=True)
class Chart:
    """Everything the template draws, in pixels."""

    title: str
    unit: str
    description: str
    x_title: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[DrawnLine]
    whiskers: list[DrawnWhisker]
    bands: list[DrawnBand]

    @property
    def is_empty(self) -> bool:
        """Whether there is no data to draw."""
        return not (self.lines or self.whiskers)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    x_title: str = "update",
    y_from: float | None = None,
    percent: bool = False,
    log: bool = False,
    whiskers: Sequence[Whisker] = (),
    bands: Sequence[Band] = (),
    width: float = 360,
    height: float = 190,
) -> Chart:
    """Lay out a chart.

    Args:
        title: what is plotted.
        lines: curves; the first one is drawn on top.
        unit: unit of the vertical axis, shown beside the title.
        x_title: title of the horizontal axis.
        y_from: upper bound of the start of the vertical axis; None: it starts at the smallest value.
        percent: values are shares; the vertical axis is 0 to 100 %.
        log: use a logarithmic vertical axis if any value is positive.
        whiskers: values with intervals, drawn on top.
        bands: areas, drawn below the lines.
        width: width of the drawing in pixels.
        height: height of the drawing in pixels.
    """
    values = [y for line in lines for _, y in line.points if y is not None]
    values += [v for whisker in whiskers for v in (whisker.low, whisker.high)]
    values += [value for band in bands for _, *ends in band.points for value in ends]
    log = log and any(value > 0 for value in values)
    if log:
        lines = [replace(it, points=[(x, y if y and y > 0 else None) for x, y in it.points]) for it in lines]
        values = [value for value in values if value > 0]
    label_room = _LABEL_ROOM if any(line.label for line in lines) else 0
    left = _WIDE_LEFT if width >= _WIDE else _LEFT
    right, bottom = width - _RIGHT - label_room, height - _BOTTOM
    # A line without any value is not drawn, but its updates still count for the horizontal axis.
    xs = [x for line in lines for x, _ in line.points] + [whisker.x for whisker in whiskers]
    y_values = log_ticks(values) if log else (_SHARES[height < 200] if percent else linear_ticks(values, y_from))
    x_scale = Scale(min(xs, default=0), max(xs, default=0) if len(set(xs)) > 1 else min(xs, default=0) + 1, left, right)
    y_scale = Scale(y_values[0], y_values[-1], bottom, _TOP, log)
    drawn = [_draw(line, x_scale, y_scale) for line in lines if any(y is not None for _, y in line.points)]
    return Chart(
        title=title,
        unit=unit,
        description=_describe(title, unit, x_title, lines, percent),
        x_title=x_title,
        width=width,
        height=height,
        left=left,
        right=right,
        top=_TOP,
        bottom=bottom,
        x_ticks=[Tick(x_scale(x), f"{x:g}") for x in integer_ticks(x_scale.low, x_scale.high)],
        y_ticks=[Tick(y_scale(y), tick_label(y, y_values, percent, log)) for y in y_values],
        lines=_separate_labels(drawn),
        whiskers=[
            DrawnWhisker(x_scale(w.x), y_scale(w.value), y_scale(w.low), y_scale(w.high), w.label, w.hollow)
            for w in whiskers
        ],
        bands=[DrawnBand(_outline(band, x_scale, y_scale), band.series) for band in bands if band.points],
    )


def running_mean(points: Points, window: int) -> Points:
    """Return the mean of the last `window` values at each point; gaps are ignored."""
    smooth: Points = []
    for index in range(len(points)):
        recent = [y for _, y in points[max(0, index - window + 1) : index + 1] if y is not None]
        smooth.append((points[index][0], sum(recent) / len(recent) if recent else None))
    return smooth


def linear_ticks(values: Sequence[float], y_from: float | None = None) -> list[float]:
    """Return evenly spaced round numbers, about four to seven, that enclose the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if y_from is not None:
        low = min(low, y_from)
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        # Equal values get a margin on both sides, but not below `y_from`.
        pad = abs(high) / 2 or 1.0
        low, high = (low if y_from is not None and low >= y_from else low - pad), high + pad
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """Return powers of ten that enclose the values; every second or third one over a wide range."""
    low = math.floor(math.log10(min(values)) + 1e-9)
    high = max(math.ceil(math.log10(max(values)) - 1e-9), low + 1)
    stride = math.ceil((high - low) / 5)
    high = low + math.ceil((high - low) / stride) * stride
    return [10.0**exponent for exponent in range(low, high + 1, stride)]


def integer_ticks(low: float, high: float) -> list[float]:
    """Return about five whole numbers inside a range."""
    step = max(1.0, _round_step((high - low) / 5))
    if step == 2.5:
        step = 2.0
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_label(value: float, ticks: Sequence[float], percent: bool, log: bool) -> str:
    """Return the text of a tick, with enough decimals to distinguish it from its neighbours."""
    if percent:
        return f"{value:.0%}"
    if log:
        return "10" + str(round(math.log10(value))).translate(_SUPERSCRIPT)
    step = ticks[1] - ticks[0]
    if 0 < step < 1e-4 or step >= 1e5:
        return f"{value:.1e}" if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if _needs_half(step) else 0)
    return f"{value:.{decimals}f}".replace("-", "−")


def _needs_half(step: float) -> bool:
    return math.isclose(step / 10.0 ** math.floor(math.log10(step) + 1e-9), 2.5)


def _round_step(rough: float) -> float:
    """Round up to 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _draw(line: Line, x_scale: Scale, y_scale: Scale) -> DrawnLine:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x_scale(x), y_scale(y)))
    runs = [run for run in runs if run]
    path = " ".join("M" + " L".join(f"{x:g},{y:g}" for x, y in run) for run in runs if len(run) > 1)
    end_x, end_y = runs[-1][-1]
    dots = [run[0] for run in runs if len(run) == 1]
    return DrawnLine(path, dots, line.label, end_x + 6, end_y + 4, line.faint, line.series)


def _outline(band: Band, x_scale: Scale, y_scale: Scale) -> str:
    """Return a closed path along the upper curve and back along the lower one."""
    upper = [(x_scale(x), y_scale(high)) for x, _, high in band.points]
    lower = [(x_scale(x), y_scale(low)) for x, low, _ in reversed(band.points)]
    return "M" + " L".join(f"{x:g},{y:g}" for x, y in (*upper, *lower)) + " Z"


def _separate_labels(lines: Sequence[DrawnLine]) -> list[DrawnLine]:
    """Move overlapping labels at the ends of lines apart, keeping their order."""
    placed: dict[int, float] = {}
    floor = -math.inf
    for index in sorted((i for i, line in enumerate(lines) if line.label), key=lambda i: lines[i].label_y):
        floor = max(lines[index].label_y, floor + _LABEL_GAP)
        placed[index] = floor
    return [replace(it, label_y=placed.get(index, it.label_y)) for index, it in enumerate(lines)]


def _describe(title: str, unit: str, x_title: str, lines: Sequence[Line], percent: bool) -> str:
    """Return a description of the chart for screen readers."""
    values = [y for line in lines[:1] for _, y in line.points if y is not None]
    if not values:
        return f"{title}: not recorded"
    first, last = (f"{v:.0%}" if percent else f"{v:.3g}{' ' + unit if unit else ''}" for v in (values[0], values[-1]))
    return f"{title} by {x_title}, {len(values)} values, from {first} to {last}"

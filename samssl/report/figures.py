"""The report's figures, each a function from numbers to a data URI.

Charts are SVG that follows the reader's light or dark colours: everything that is not data is drawn in
one ink, which a style sheet inside the SVG sets. Pictures of scans are JPEG. Colours are Okabe and Ito's,
which readers with any colour vision tell apart.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Integer
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, YELLOW = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442",
)  # fmt: skip
ARM_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""Treatment, baseline, then any further arm: each has contrast enough on white and on near-black."""
LABEL_COLORS = (ORANGE, SKY, GREEN, YELLOW, PURPLE, VERMILLION, BLUE)
"""For overlays, on grey levels; they repeat after seven labels."""

INK = "#123456"
"""Stands for the page's own text colour; replaced when the SVG is written."""
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.linewidth": 0.6,
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "samssl",  # the same numbers give the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a case may be called a$b$c
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_SVG_STYLE = (
    "<style>svg{color:#24292f}text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,"
    "'Helvetica Neue',Arial,sans-serif!important}"
    "@media(prefers-color-scheme:dark){svg{color:#d7dce2}}</style>"
)
_JPEG = {"quality": 80, "subsampling": 0}  # outlines keep their colour
_OVERLAY_PX, _PICTURE_PX = 600, 1000


@dataclass(frozen=True)
class Curve:
    """One line in a panel of curves; `name` goes into the legend once a colour."""

    name: str
    color: str
    steps: Float[np.ndarray, " points"]
    values: Float[np.ndarray, " points"]


def paired_plot(baseline: pd.Series, treatment: pd.Series, intervals: Sequence[Mapping[str, Any]]) -> str:
    """One line a case from its baseline to its treatment Dice, beside each arm's mean and interval.

    `intervals` are the summary's entries of the two arms, baseline first; the series' names label them.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        opacity = float(np.clip(12 / len(baseline), 0.25, 0.8))
        for before, after in zip(baseline, treatment, strict=True):
            color = BLUE if after > before else VERMILLION if after < before else INK
            axes.plot([0, 1], [before, after], color=color, alpha=opacity, lw=1.1, marker="o", ms=3, mew=0)
        for position, color, entry in zip((-0.18, 1.18), (VERMILLION, BLUE), intervals, strict=True):
            _interval_marker(axes, position, entry, color)
        axes.set_xticks([0, 1], [str(baseline.name), str(treatment.name)])
        axes.set_xlim(-0.4, 1.4)
        axes.set_ylabel("Dice of a case")
        grid(axes, "y")

    return svg_uri(draw, 3.4, 3.9)


def difference_plot(differences: pd.Series, interval: Sequence[float | None]) -> str:
    """Each case's difference in Dice, sorted, with the mean difference and its 95 % interval as a band."""
    ordered = differences.sort_values()

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = np.arange(len(ordered))
        colors = [BLUE if value > 0 else VERMILLION if value < 0 else INK for value in ordered]
        low, high = interval
        if low is not None and high is not None:
            axes.axvspan(low, high, color=INK, alpha=0.12, lw=0)
        axes.axvline(float(ordered.mean()), color=INK, lw=1, ls=(0, (4, 3)))
        axes.axvline(0, color=INK, lw=0.8)
        axes.hlines(rows, 0, ordered, colors=colors, lw=min(1.4, 60 / len(ordered)))
        axes.scatter(ordered, rows, c=colors, s=min(16, 500 / len(ordered)), zorder=3)
        named = len(ordered) <= 30
        axes.set_yticks(rows if named else [], [str(case) for case in ordered.index] if named else [])
        axes.tick_params("y", length=0, labelsize=7.5)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("difference in Dice")
        axes.margins(y=0.6 / len(ordered))
        grid(axes, "x")

    return svg_uri(draw, 4.0, 3.9)


def dice_by_label(per_label: Mapping[str, Mapping[str, Mapping[str, Any]]], colors: Mapping[str, str]) -> str:
    """Mean Dice and interval of every label: `per_label` is arm -> label -> entry, `colors` arm -> colour."""
    labels = list(dict.fromkeys(label for entries in per_label.values() for label in entries))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for offset, (arm, entries) in zip(_offsets(len(per_label)), per_label.items(), strict=True):
            for row, label in enumerate(labels):
                entry = entries.get(label)
                if entry and entry["test/dice"] is not None:
                    _interval_marker(axes, row + offset, entry, colors[arm], horizontal=True)
            axes.plot([], [], "o", color=colors[arm], ms=5, label=arm)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params("y", length=0)
        axes.set_xlabel("Dice")
        axes.spines["left"].set_visible(False)
        grid(axes, "x")
        figure.legend(loc="outside upper left", ncols=len(per_label), handletextpad=0.2)

    return svg_uri(draw, 7.4, 0.9 + 0.16 * len(labels) * (1 + len(per_label)))


def loss_curves(panels: Mapping[str, Sequence[Curve]]) -> str:
    """One panel beside the other, each with its curves over training steps."""

    def draw(figure: Figure) -> None:
        for axes, (title, curves) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for curve in curves:
                _draw_curve(axes, curve)
            axes.set_title(title)
            axes.set_xlabel("step")
            names = {curve.name: curve.color for curve in curves}
            if len(names) > 1:
                handles = [axes.plot([], [], color=color, lw=1.8)[0] for color in names.values()]
                axes.legend(handles, list(names), handlelength=1.2)
            grid(axes, "y")

    return svg_uri(draw, 7.4, 2.6)


def label_color(label: int) -> str:
    """The colour in which overlays show the label id `label` (1, 2, ...)."""
    return LABEL_COLORS[(label - 1) % len(LABEL_COLORS)]


def overlay(image: Float[np.ndarray, "H W"], labels: Integer[np.ndarray, "H W"], pixel_aspect: float) -> str:
    """A slice scaled to [0, 1] in grey, with a tint and an outline for each label above 0.

    `pixel_aspect` is the height of a pixel over its width.
    """

    def draw(axes: Axes) -> None:
        for label in np.unique(labels[labels > 0]):
            inside = labels == label
            _tint(axes, inside, label_color(int(label)), opacity=0.3)
            if not inside.all() and min(inside.shape) > 1:
                axes.contour(inside, levels=[0.5], colors=[label_color(int(label))], linewidths=1.2)

    return _scan(image, pixel_aspect, draw)


def marked(image: Float[np.ndarray, "H W"], mark: Bool[np.ndarray, "H W"], pixel_aspect: float) -> str:
    """A slice scaled to [0, 1] in grey, with the pixels where `mark` is True in one strong colour."""
    return _scan(image, pixel_aspect, lambda axes: _tint(axes, mark, VERMILLION, opacity=0.8))


def picture(content: bytes) -> str:
    """A picture file, made smaller where it is larger than the page shows it, as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        smaller = image.convert("RGB")
    smaller.thumbnail((_PICTURE_PX, _PICTURE_PX))
    smaller.save(buffer, "JPEG", **_JPEG)
    return data_uri("image/jpeg", buffer.getvalue())


def data_uri(media_type: str, content: bytes) -> str:
    """`content` as text that an `src` attribute holds, so that the page needs no other file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def svg_uri(draw: Callable[[Figure], None], width_in: float, height_in: float) -> str:
    """What `draw` puts on a figure of that size, as SVG in the reader's colours in a data URI."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in))
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().replace(INK, "currentColor").replace("<defs>", f"{_SVG_STYLE}<defs>", 1)
    return data_uri("image/svg+xml", text.encode())


def grid(axes: Axes, axis: Any) -> None:
    """Faint lines behind the data, across `axis` (`x`, `y` or `both`)."""
    axes.grid(axis=axis, color=INK, alpha=0.15, lw=0.6)
    axes.set_axisbelow(True)


def _scan(image: Float[np.ndarray, "H W"], pixel_aspect: float, draw: Callable[[Axes], None]) -> str:
    height, width = image.shape[0] * pixel_aspect, image.shape[1]
    scale = _OVERLAY_PX / max(height, width) / 100
    figure = Figure(figsize=(width * scale, height * scale), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="bilinear")
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", facecolor="black", pil_kwargs=_JPEG)
    return data_uri("image/jpeg", buffer.getvalue())


def _tint(axes: Axes, inside: Bool[np.ndarray, "H W"], color: str, opacity: float) -> None:
    tint = np.zeros((*inside.shape, 4))
    tint[inside] = (*to_rgb(color), opacity)
    axes.imshow(tint, aspect="auto", interpolation="nearest")


def _draw_curve(axes: Axes, curve: Curve) -> None:
    """The raw values faintly and their running mean over a fiftieth of the run on top."""
    window = max(1, len(curve.values) // 50)
    if window > 1:
        axes.plot(curve.steps, curve.values, color=curve.color, lw=0.5, alpha=0.3)
    smooth = pd.Series(curve.values).rolling(window, min_periods=1).mean()
    marker = "o" if len(curve.values) <= 12 else None
    axes.plot(curve.steps, smooth, color=curve.color, lw=1.4, marker=marker, ms=3)


def _interval_marker(
    axes: Axes, position: float, entry: Mapping[str, Any], color: str, *, horizontal: bool = False
) -> None:
    """A mean as a dot and its 95 % interval as a bar, at `position` of the other axis."""
    low, high = entry["ci95"]
    points = [[position], [entry["test/dice"]]]
    if low is not None and high is not None:
        line = ([position, position], [low, high])
        axes.plot(*(line[::-1] if horizontal else line), color=color, lw=2.2)
    axes.plot(*(points[::-1] if horizontal else points), "o", color=color, ms=6)


def _offsets(count: int) -> Float[np.ndarray, " arms"]:
    return (np.arange(count) - (count - 1) / 2) * 0.22

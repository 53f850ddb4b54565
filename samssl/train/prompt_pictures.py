"""Pictures of promptable segmentation, as RGB arrays: Dice against clicks, and prompts on slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, UInt8

from samssl.data.inputs import square_images
from samssl.data.slices import SliceStore
from samssl.interactive import Answer, Asking, answers, click_rows
from samssl.metrics import case_dice
from samssl.prompts import INSIDE, OUTSIDE
from samssl.train.probe import labelled_rows

REFERENCE, ANSWER, CLICKED = "#e69f00", "#56b4e9", {INSIDE: "#009e73", OUTSIDE: "#d55e00"}
"""Okabe and Ito's orange, sky blue, green and vermillion."""
SHOWN = 4
"""Slices in the picture of prompts."""

Picture = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class Dialogue:
    """An object of a slice, and answers to prompts for it."""

    image: Float[np.ndarray, "S S"]
    """The slice on the model's input."""
    mask: Bool[np.ndarray, "H W"]
    """The reference, in native pixels."""
    answers: Sequence[Answer]
    """Of this one object."""


@torch.no_grad()
def dialogues(segmenter: Any, store: SliceStore, split: str, asking: Asking) -> list[Dialogue]:
    """The largest object of a few labelled slices, asked about by a box, one click, and all clicks."""
    shown = []
    for row in labelled_rows(store, split, SHOWN).tolist():
        reference = store.mask_slice(store.rows.case_name(row), int(store.rows.z[row]))
        assert reference is not None, "the slice is labelled"
        images = square_images(store, [row], asking.image_size, asking.inputs, asking.device)
        mask = reference == 1 + np.bincount(reference.ravel())[1:].argmax()
        first = torch.zeros(1, dtype=torch.int64, device=asking.device)
        found = [*answers(segmenter, segmenter.embed(images), first, mask[None], asking)]
        image = images[0].float().mean(dim=0).cpu().numpy()
        shown.append(Dialogue(image, mask, [found[index] for index in dict.fromkeys((0, 1, len(found) - 1))]))
    return shown


def prompts_picture(shown: Sequence[Dialogue]) -> Picture:
    """A row an object, a column a prompt: reference and answer as contours, clicks, and the box."""

    def draw(figure: Any) -> None:
        columns = len(shown[0].answers)
        for row, dialogue in zip(figure.subplots(len(shown), columns, squeeze=False), shown, strict=True):
            for axes, answer in zip(row, dialogue.answers, strict=True):
                _draw_answer(axes, dialogue, answer)

    return _picture(draw, 2.2 * len(shown[0].answers), 2.4 * len(shown))


def click_curve(table: pd.DataFrame) -> Picture:
    """Mean Dice over cases against the number of clicks, of each label and of all; the box as a line."""

    def draw(figure: Any) -> None:
        axes, clicks = figure.subplots(), click_rows(table)
        labels = list(clicks.groupby("label", sort=False))
        for name, rows in labels if 1 < len(labels) <= 10 else []:
            means = rows.groupby("clicks")["dice"].mean()
            axes.plot(means.index, means, lw=0.8, alpha=0.7, label=str(name))
        means = [float(case_dice(rows).mean()) for _, rows in clicks.groupby("clicks")]
        axes.plot(
            np.arange(1, len(means) + 1), means, color="black", lw=1.8, marker="o", ms=4, label="clicks"
        )
        box = float(case_dice(table[table["prompt"] == "box"]).mean())
        axes.axhline(box, color="black", lw=1, ls=(0, (4, 3)), label="box")
        axes.set_xticks(np.arange(1, len(means) + 1))
        axes.set_xlabel("clicks on each object of each slice")
        axes.set_ylabel("Dice of a case, mean")
        axes.set_ylim(0, 1)
        axes.grid(axis="y", alpha=0.2)
        axes.legend(frameon=False, fontsize=8)

    return _picture(draw, 5, 3.4)


def _draw_answer(axes: Any, dialogue: Dialogue, answer: Answer) -> None:
    """In native pixels; the image lies under them as large as it is on the model's input."""
    height, width = dialogue.mask.shape
    side = max(height, width)
    axes.imshow(dialogue.image, cmap="gray", vmin=0, vmax=1, extent=(-0.5, side - 0.5, side - 0.5, -0.5))
    for mask, color in ((dialogue.mask, REFERENCE), (answer.masks[0], ANSWER)):
        if mask.any() and not mask.all():
            axes.contour(np.pad(mask, 1), levels=[0.5], colors=[color], linewidths=1.2, extent=_padded(mask))
    for (x, y), label in zip(answer.points[0], answer.labels[0].tolist(), strict=True):
        if label in CLICKED:
            axes.plot(x, y, "o", color=CLICKED[label], ms=4, mec="white", mew=0.6)
    if answer.boxes is not None:
        left, top, right, bottom = answer.boxes[0].tolist()
        corners = [left, right, right, left, left], [top, top, bottom, bottom, top]
        axes.plot(*corners, color=CLICKED[INSIDE], lw=1, ls=(0, (3, 2)))
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_axis_off()
    axes.set_title("box" if answer.prompt == "box" else f"clicks: {answer.clicks}", fontsize=7)


def _padded(mask: Bool[np.ndarray, "H W"]) -> tuple[float, float, float, float]:
    """Where the centres of the outermost pixels lie once `mask` has a pixel more on each side."""
    height, width = mask.shape
    return (-1.0, float(width), -1.0, float(height))


def _picture(draw: Any, width_in: float, height_in: float) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

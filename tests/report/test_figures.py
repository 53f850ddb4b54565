"""Figures are well-formed, follow the page's colours, and show what they are given."""

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from samssl.report import figures


def svg(uri: str) -> str:
    media_type, content = uri.split(";base64,")
    assert media_type == "data:image/svg+xml"
    return base64.b64decode(content).decode()


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), dtype=np.int16)


def entry(mean: float, low: float | None, high: float | None) -> dict:
    return {"test/dice": mean, "ci95": [low, high], "cases": 3}


ENTRIES = [entry(0.5, 0.4, 0.6), entry(0.6, None, None)]
BEFORE = pd.Series({"a$b$": 0.4, "<c>": 0.5, "d": 0.6}, name="no SSL")
AFTER = pd.Series({"a$b$": 0.5, "<c>": 0.4, "d": 0.6}, name="SSL")
LINE = figures.Curve("training", figures.BLUE, np.arange(200.0), np.linspace(1, 0, 200))


@pytest.mark.parametrize(
    ("uri", "texts"),
    [
        (figures.paired_plot(BEFORE, AFTER, ENTRIES), ["no SSL", "SSL", "Dice of a case"]),
        (figures.difference_plot(AFTER - BEFORE, [-0.1, 0.1]), ["a$b$", "<c>", "d", "difference in Dice"]),
        (figures.difference_plot(AFTER - BEFORE, [None, None]), ["a$b$"]),
        (
            figures.dice_by_label(
                {"SSL": {"liver": ENTRIES[0]}, "x": {"cyst": ENTRIES[1]}}, {"SSL": "C0", "x": "C1"}
            ),
            ["liver", "cyst", "SSL", "x"],
        ),
        (figures.loss_curves({"Loss": [LINE], "Dice": [LINE, LINE]}), ["Loss", "Dice", "step"]),
    ],
)
def test_charts_are_xml_with_their_texts_in_the_page_colour(uri: str, texts: list[str]) -> None:
    source = svg(uri)
    written = [
        "".join(node.itertext())
        for node in ElementTree.fromstring(source).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert set(texts) <= set(written)
    assert "currentColor" in source
    assert figures.INK not in source
    assert "prefers-color-scheme:dark" in source


def test_charts_are_the_same_each_time() -> None:
    first, second = (figures.difference_plot(AFTER - BEFORE, [0.0, 1.0]) for _ in range(2))
    assert first == second


def test_overlay_tints_the_label_and_leaves_the_rest_grey() -> None:
    labels = np.zeros((10, 10), np.uint8)
    labels[:, 5:] = 1
    shown = pixels(figures.overlay(np.full((10, 10), 0.5), labels, pixel_aspect=1.0))
    left, right = shown[300, 100], shown[300, 500]
    assert np.ptp(left) <= 2
    orange = np.array([0xE6, 0x9F, 0x00])
    np.testing.assert_allclose(right, 0.7 * left + 0.3 * orange, atol=4)


def test_overlay_keeps_the_pixel_aspect() -> None:
    shown = pixels(figures.overlay(np.zeros((10, 20)), np.zeros((10, 20), np.uint8), pixel_aspect=4.0))
    assert shown.shape == (600, 300, 3)


@pytest.mark.parametrize("labels", [np.ones((1, 5), np.uint8), np.full((4, 4), 9, np.uint8)])
def test_overlay_of_odd_masks(labels: np.ndarray) -> None:
    assert pixels(figures.overlay(np.zeros(labels.shape), labels, pixel_aspect=1.0)).max() > 30


def test_marked_pixels_stand_out() -> None:
    mark = np.zeros((10, 10), bool)
    mark[0:5] = True
    shown = pixels(figures.marked(np.full((10, 10), 0.5), mark, pixel_aspect=1.0))
    assert shown[100, 300, 0] - shown[100, 300, 2] > 100
    assert np.ptp(shown[500, 300]) <= 2


def test_large_pictures_are_made_smaller() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((3000, 1500, 3), np.uint8)).save(buffer, "PNG")
    assert pixels(figures.picture(buffer.getvalue())).shape == (1000, 500, 3)

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from samssl.data.classes import run_classes
from samssl.data.resize import downsample_labels, fit_labels
from samssl.data.slices import SliceStore
from samssl.data.vanishing import Vanishing, count_vanishing, say_vanishing, vanishing_objects


@pytest.mark.parametrize("shape", [(40, 40), (31, 50), (50, 31)])
@pytest.mark.parametrize("sides", [(20, 5), (37, 12), (64, 64)])
def test_counted_is_what_resizing_loses(shape: tuple[int, int], sides: tuple[int, int]) -> None:
    inside = np.random.default_rng(0).random(shape) > 0.97
    numbered, objects = ndimage.label(inside)  # pyright: ignore[reportGeneralTypeIssues]
    at_input = fit_labels(torch.from_numpy(numbered)[None].long(), sides[0])
    at_loss = downsample_labels(at_input, (sides[1], sides[1]))
    left = [len(set(labels.unique().tolist()) - {0}) for labels in (at_input, at_loss)]
    assert vanishing_objects(inside, *sides).tolist() == [objects, objects - left[0], objects - left[1]]


@pytest.fixture
def store(tmp_path: Path, prepare_boxes: Callable[..., SliceStore]) -> SliceStore:
    return prepare_boxes(tmp_path, train=2, val=1, test=1)


def test_objects_of_each_class_are_counted_in_the_training_slices(store: SliceStore) -> None:
    rows = store.rows.rows(["train"])
    classes = run_classes(store.labels)
    shell, core = count_vanishing(store, rows, classes, 24, 24)
    # Two cases with four slices of the shell and two of the core in it.
    assert (shell, core) == (Vanishing("shell", 8, 0, 0), Vanishing("core", 4, 0, 0))
    assert say_vanishing([shell, core], 24, 24) == ""
    gone = count_vanishing(store, rows, classes, 24, 2)
    assert gone[1].at_loss > 0
    assert "core: " in say_vanishing(gone, 24, 2)
    assert "at the 2 px" in say_vanishing(gone, 24, 2)
    merged = run_classes(store.labels, {"box": ["shell", "core"]})
    assert count_vanishing(store, rows, merged, 24, 24) == [Vanishing("box", 8, 0, 0)]

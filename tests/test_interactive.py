"""Asked with simulated prompts, models whose answers are known get the scores that they deserve."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from samssl.data.inputs import InputConfig
from samssl.data.slices import SliceStore
from samssl.interactive import Asking, answers, click_rows, prompt_dice, prompted_case
from samssl.metrics import case_dice, dice_per_label
from samssl.models.promptable import Prompts
from samssl.prompts import INSIDE, NO_POINT, OUTSIDE

SIZE, GRID = 64, 16
ASKING = Asking(SIZE, InputConfig(mr="full"), clicks=3, device=torch.device("cpu"))


class DrawsDiscs(nn.Module):
    """Answers with discs of 6 pixels of the input around points inside, and fills boxes."""

    def embed(self, images: Tensor) -> Tensor:
        return images[:, :1, ::4, ::4]

    def decode(self, embeddings: Tensor, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        place = torch.arange(4 * GRID) + 0.5
        y, x = torch.meshgrid(place, place, indexing="ij")  # in pixels of the input: 64 = 4 x 16
        found = torch.full((len(prompts.image), 4 * GRID, 4 * GRID), -1.0)
        for number, mask in enumerate(found):
            if prompts.boxes is not None:
                left, top, right, bottom = prompts.boxes[number].tolist()
                mask[(x > left) & (x < right + 1) & (y > top) & (y < bottom + 1)] = 1
            elif prompts.points is not None and prompts.labels is not None:
                for (u, v), label in zip(prompts.points[number], prompts.labels[number], strict=True):
                    if label == INSIDE:
                        mask[(x - u - 0.5) ** 2 + (y - v - 0.5) ** 2 < 36] = 1
        count = 3 if multimask else 1
        predicted = torch.tensor([0.2, 0.9, 0.1])[:count].expand(len(found), -1)
        logits = torch.stack([found if index == count // 2 else -found for index in range(count)], dim=1)
        return logits, predicted


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> SliceStore:
    return prepare_boxes(tmp_path_factory.mktemp("prompted"), train=1, val=1, test=1)


def test_points_and_answers_lie_where_they_should_in_slices_that_are_not_square() -> None:
    masks = np.zeros((2, 40, 80), bool)
    masks[0, 4:12, 60:76] = True
    masks[1, 30:39, 5:20] = True
    embeddings, image = torch.zeros(1, 1, GRID, GRID), torch.tensor([0, 0])
    box, *clicks = answers(DrawsDiscs(), embeddings, image, masks, ASKING)
    assert box.boxes is not None
    assert box.boxes.tolist() == [[60, 4, 75, 11], [5, 30, 19, 38]]
    overlap = (box.masks & masks).sum((1, 2)) / (box.masks | masks).sum((1, 2))
    assert (overlap > 0.85).all()  # edges are uneven by the resolution of the logits
    first, last = clicks[0], clicks[-1]
    for number in range(2):
        x, y = first.points[number, 0]
        assert masks[number, int(y), int(x)]
        assert first.masks[number, int(y), int(x)]
        rows, columns = np.nonzero(first.masks[number])
        assert abs(rows.mean() - y) < 0.6
        assert abs(columns.mean() - x) < 0.6
    assert [answer.clicks for answer in clicks] == [1, 2, 3]
    assert last.points.shape == (2, 3, 2)
    assert set(last.labels.flatten().tolist()) <= {INSIDE, OUTSIDE, NO_POINT}
    assert (first.labels == INSIDE).all()


def test_scores_of_a_case_are_those_of_its_whole_volume(store: SliceStore) -> None:
    (case,) = store.cases("test")
    reference = store.mask(case)
    assert reference is not None
    found = prompted_case(DrawsDiscs(), store, case, ASKING)
    table = found.table
    keys = table[["prompt", "clicks", "label_id"]].itertuples(index=False, name=None)
    prompts = [("box", 0), ("clicks", 1), ("clicks", 2), ("clicks", 3)]
    assert [*keys] == [(*prompt, label) for prompt in prompts for label in (1, 2)]
    assert {"case", "patient", "label", "dice", "reference_voxels", "predicted_voxels"} <= {*table.columns}
    ids, voxels = np.unique(reference, return_counts=True)
    assert table.groupby("label_id")["reference_voxels"].unique().map(list).to_dict() == {
        label: [count] for label, count in zip(ids[1:].tolist(), voxels[1:].tolist(), strict=True)
    }
    # The core lies in the shell, so that only where discs do not meet do both scores follow from one volume.
    final = table[(table["clicks"] == 3) & (table["label_id"] == 2)]["dice"].item()
    from_volume = dice_per_label(found.prediction, reference, 3)[1]
    assert from_volume["dice"] == pytest.approx(final, abs=0.25)
    assert not found.prediction[~reference.any(axis=(1, 2))].any()


def test_dice_is_counted_over_all_slices_of_a_label(store: SliceStore) -> None:
    """The same discs drawn by hand, slice by slice, and counted as one volume."""
    (case,) = store.cases("val")
    reference = store.mask(case)
    assert reference is not None
    table = prompted_case(DrawsDiscs(), store, case, ASKING).table
    for label in (1, 2):
        drawn = np.zeros_like(reference)
        for z in np.flatnonzero((reference == label).any(axis=(1, 2))):
            mask = (reference[z] == label)[None]
            _, first, *_ = answers(
                DrawsDiscs(), torch.zeros(1, 1, GRID, GRID), torch.tensor([0]), mask, ASKING
            )
            drawn[z][first.masks[0]] = label
        wanted = dice_per_label(drawn, np.where(reference == label, reference, 0), 3)[label - 1]["dice"]
        rows = table[(table["prompt"] == "clicks") & (table["clicks"] == 1) & (table["label_id"] == label)]
        assert rows["dice"].item() == pytest.approx(wanted)


def test_a_model_is_judged_by_its_clicks_and_the_box_is_told_beside() -> None:
    table = pd.DataFrame(
        [("a", "box", 0, 0.9), ("a", "clicks", 1, 0.5), ("a", "clicks", 2, 0.7), ("b", "clicks", 2, np.nan)],
        columns=["case", "prompt", "clicks", "dice"],
    )
    assert case_dice(click_rows(table)).to_dict() == pytest.approx({"a": 0.6})
    means = prompt_dice(table, "val/dice")
    assert means == pytest.approx({"val/dice_box": 0.9, "val/dice_clicks_1": 0.5, "val/dice_clicks_2": 0.7})
    automatic = table.drop(columns=["prompt", "clicks"])
    assert click_rows(automatic) is automatic
    assert prompt_dice(automatic, "val/dice") == {}

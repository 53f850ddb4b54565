import numpy as np
import pytest
import torch

from samssl.config import UserError
from samssl.data.classes import Classes, run_classes

LABELS = {0: "background", 1: "edema", 2: "core", 4: "enhancing", 300: "vessel"}
MASK = np.array([[[0, 1, 2], [4, 300, 1]]], np.uint16)
RANKS = torch.tensor([[[0, 1, 2], [3, 4, 1]]])
BRATS = {
    "enhancing tumour": ["enhancing"],
    "tumour core": ["core", "enhancing"],
    "whole": ["edema", "core", "enhancing"],
}


def winning(classes: Classes, number: int) -> torch.Tensor:
    logits = torch.zeros(1, classes.num_outputs, 1, 1)
    logits[0, number] = 1.0
    return classes.decide(logits)


def test_without_a_map_every_label_is_a_class_under_its_own_id() -> None:
    classes = run_classes(LABELS)
    assert classes.num_outputs == 5
    assert classes.names == {label: name for label, name in LABELS.items() if label}
    assert classes.targets(RANKS) is RANKS
    assert classes.reference(MASK) is MASK
    assert [int(winning(classes, number)) for number in range(5)] == sorted(LABELS)
    assert winning(classes, 0).dtype == torch.int32
    assert winning(run_classes({0: "background", 7: "liver"}), 1).dtype == torch.uint8


def test_labels_are_merged_and_the_rest_is_background() -> None:
    classes = run_classes(LABELS, {"vessel": ["vessel"], "tumour": ["enhancing", "core"]})
    assert classes.names == {1: "tumour", 2: "vessel"}
    assert classes.targets(RANKS).tolist() == [[[0, 0, 1], [1, 2, 0]]]
    assert classes.reference(MASK).tolist() == [[[0, 0, 1], [1, 2, 0]]]
    assert [int(winning(classes, number)) for number in range(3)] == [0, 1, 2]
    shown = [np.array(labels, np.int64) for labels in ([], [1], [2, 300])]
    assert classes.held(shown).tolist() == [[False, False], [False, False], [True, True]]


def test_labels_that_swap_names_are_not_left_as_they_are() -> None:
    classes = run_classes({0: "background", 1: "a", 2: "b"}, {"b": ["a"], "a": ["b"]})
    assert classes.names == {1: "b", 2: "a"}
    assert classes.reference(np.array([[[1, 2]]], np.uint8)).tolist() == [[[1, 2]]]


def test_regions_share_labels_and_come_the_larger_first() -> None:
    classes = run_classes(LABELS, BRATS, overlapping=True)
    assert list(classes.names.values()) == ["whole", "tumour core", "enhancing tumour"]
    assert classes.num_outputs == 3
    wanted = [MASK[0] != 300, np.isin(MASK[0], [2, 4]), MASK[0] == 4]
    wanted[0] = wanted[0] & (MASK[0] != 0)
    targets = classes.targets(RANKS)
    assert targets.dtype == torch.bool
    np.testing.assert_array_equal(targets[0].numpy(), wanted)
    np.testing.assert_array_equal(classes.reference(MASK)[:, 0], wanted)
    np.testing.assert_array_equal(classes.reference(MASK[0]), wanted)
    logits = torch.tensor([2.0, -1.0, 0.5]).view(1, 3, 1, 1)
    assert classes.decide(logits).flatten().tolist() == [True, False, True]


def test_the_order_in_which_classes_are_given_changes_nothing() -> None:
    reversed_map = dict(reversed(BRATS.items()))
    assert run_classes(LABELS, reversed_map, True) == run_classes(LABELS, BRATS, True)


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_hundred_and_more_labels(overlapping: bool) -> None:
    labels = {label: f"organ {label}" for label in range(151)}
    classes = run_classes(labels, None, overlapping)
    ranks = torch.arange(151).view(1, 1, 151)
    logits = classes.targets(ranks)
    if not overlapping:
        logits = torch.nn.functional.one_hot(ranks, 151).movedim(-1, 1)
    decided = classes.decide(logits.float())[0].numpy()
    np.testing.assert_array_equal(decided, classes.reference(np.arange(151, dtype=np.uint8)[None]))


@pytest.mark.parametrize(
    ("merged", "message"),
    [
        ({}, r"data\.classes is empty.*edema, core, enhancing, vessel"),
        ({"tumour": []}, r"class 'tumour' of data\.classes has no labels"),
        ({"tumour": ["core", "liver"]}, r"does not have: liver\. It has: edema, core, enhancing, vessel"),
        ({"organ": ["background"]}, r"does not have: background"),
        ({"background": ["core"]}, r"leave it out"),
        (BRATS, r"enhancing, core into more than one class.*data\.overlapping=true"),
    ],
)
def test_maps_that_cannot_be_meant_are_refused(merged: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_classes(LABELS, merged)

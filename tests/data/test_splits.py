import pandas as pd
import pytest

from samssl.config import ConfigError, UserError, load_config
from samssl.data.splits import SplitConfig, few_shot, one_patient_per_image, split_patients

PATIENTS = [f"p{number}" for number in range(20)]


def _counts(splits):
    return {name: list(splits.values()).count(name) for name in ("pool", "train", "val", "test")}


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        (SplitConfig(pool=0.0, train=0.5, val=0.25, test=0.25), (0, 10, 5, 5)),
        (SplitConfig(pool=8.0, train=5.0, val=3.0, test=4.0), (8, 5, 3, 4)),
        (SplitConfig(pool=0.0, train=5.0, val=0.0, test=4.0), (11, 5, 0, 4)),
        (SplitConfig(pool=0.5, train=1.0, val=1.0, test=0.4), (10, 1, 1, 8)),
    ],
)
def test_shares_and_whole_numbers_of_patients(settings, counts):
    assert tuple(_counts(split_patients(PATIENTS, settings)).values()) == counts


def test_order_of_patients_does_not_matter_but_the_seed_does():
    first = split_patients(PATIENTS, SplitConfig())
    assert first == split_patients(reversed(PATIENTS), SplitConfig())
    assert first != split_patients(PATIENTS, SplitConfig(seed=1))


def test_split_is_the_same_on_every_machine():
    splits = split_patients(PATIENTS, SplitConfig(train=3.0, val=2.0, test=3.0))
    assert sorted(name for name, split in splits.items() if split == "test") == ["p1", "p14", "p8"]


def test_test_patients_stay_when_other_splits_change():
    def tested(settings):
        return {name for name, split in split_patients(PATIENTS, settings).items() if split == "test"}

    assert tested(SplitConfig(train=3.0, val=2.0, test=5.0)) == tested(
        SplitConfig(train=9.0, val=4.0, test=5.0)
    )


@pytest.mark.parametrize("settings", [{"test": 21.0}, {"train": 15.0}, {"val": 0.01}, {"pool": 9.0}])
def test_split_that_cannot_be_filled_says_the_numbers(settings):
    with pytest.raises(UserError, match=r"20 patients have masks.*pool=.*train=.*val=.*test="):
        split_patients(PATIENTS, SplitConfig(**{"train": 4.0, "val": 4.0, "test": 4.0, **settings}))


@pytest.mark.parametrize("settings", [{"train": 2.5}, {"train": 0.9, "test": 0.9}, {"seed": -1}, {"val": -1}])
def test_sizes_that_cannot_be_meant_are_refused(settings):
    with pytest.raises(ConfigError):
        load_config(SplitConfig, None, settings)


def test_patients_who_share_an_image_are_one():
    patients = {"c1": "ann", "c2": "bob", "c3": "bob", "c4": "cid", "c5": "dan"}
    images = {"c1": "x", "c2": "x", "c3": "y", "c4": "y", "c5": "z"}
    merged = one_patient_per_image(patients, images)
    assert merged == {"c1": "ann", "c2": "ann", "c3": "ann", "c4": "ann", "c5": "dan"}


def _index():
    rows = [
        (f"{patient}{scan}", patient, "test" if patient == "held-out" else "train", z, foreground)
        for patient in ("ann", "bob", "cid", "empty", "held-out")
        for scan in "xy"
        for z, foreground in enumerate((0.0, 0.1, 0.2) if patient != "empty" else (0.0, 0.0, float("nan")))
    ]
    return pd.DataFrame(rows, columns=["case", "patient", "split", "z", "foreground_fraction"])


def test_few_shot_patients_are_nested_and_bring_all_slices():
    one, three = few_shot(_index(), 1, "patients", 0), few_shot(_index(), 3, "patients", 0)
    assert len(one) == 6
    assert len(three) == 18
    assert set(one) < set(three)
    assert len({case[:-1] for case, _ in one}) == 1


def test_few_shot_slices_are_nested_and_show_foreground():
    one, five = few_shot(_index(), 1, "slices", 0), few_shot(_index(), 5, "slices", 0)
    assert five[:1] == one
    assert len(set(five)) == 5
    assert all(z > 0 and not case.startswith(("empty", "held-out")) for case, z in five)
    assert few_shot(_index().sample(frac=1, random_state=0), 5, "slices", 0) == five
    assert few_shot(_index(), 5, "slices", 1) != five


@pytest.mark.parametrize(("unit", "available"), [("patients", 3), ("slices", 12)])
def test_too_many_shots_say_how_many_there_are(unit, available):
    assert few_shot(_index(), available, unit, 0)
    with pytest.raises(UserError, match=f"only {available} of the train split"):
        few_shot(_index(), available + 1, unit, 0)

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from samssl.config import ConfigError, UserError, build_config
from samssl.data.cases import intensity_statistics
from samssl.data.datasets import AugmentConfig, LabelledSlices, Pooled, UnlabelledSlices, rows_of, unit_slice
from samssl.data.inputs import InputConfig, check_input, input_slice, unit_images, value_ranges
from samssl.data.intensity import WINDOWS_HU, CaseIntensity, to_unit
from samssl.data.prepare import prepare
from samssl.data.resize import fit_square
from samssl.data.slices import SliceStore
from samssl.data.views import CropConfig, keyed_randomness, random_crop, still

CT = CaseIntensity("CT", -160.0, 240.0, 40.0, 100.0, -1024.0, 3000.0)
MR = CaseIntensity("MR", 10.0, 900.0, 400.0, 50.0, 0.0, 2000.0)


@pytest.fixture
def store(prepare_config) -> SliceStore:
    prepare(prepare_config())
    return SliceStore(prepare_config().out)


def ready(dataset: Any, *draws: tuple[int, int]) -> dict[str, Tensor]:
    return unit_images(default_collate([dataset[draw] for draw in draws]))


def test_ranges_follow_the_modality_and_its_rule() -> None:
    def ranges(values: CaseIntensity, **given: Any) -> list[list[float]]:
        return value_ranges(InputConfig(**given), values).tolist()

    assert ranges(CT) == [[-160, 240]]
    assert ranges(CT, window="brain") == [[0, 80]]
    assert ranges(CT, window=(-10.0, 20.0), mr="zscore") == [[-10, 20]]
    assert ranges(CT, channels="neighbours", window="lung") == [[-1350, 150]]
    assert ranges(CT, channels="windows") == [
        list(WINDOWS_HU[name]) for name in ("soft_tissue", "lung", "bone")
    ]
    assert ranges(MR) == [[10, 900]]
    assert ranges(MR, mr="zscore") == [[250, 550]]
    assert ranges(MR, mr="zscore", zscore_clip=1.0) == [[350, 450]]
    assert ranges(MR, mr="full", channels="windows") == [[0, 2000]] * 3
    assert ranges(replace(MR, modality="US"), us="full", mr="zscore") == [[0, 2000]]
    assert ranges(replace(MR, modality="XR"), us="full", xr="zscore") == [[250, 550]]


def test_statistics_leave_the_background_out() -> None:
    voxels = np.array([[[-5, -5], [1, 3]]], np.int16)
    assert intensity_statistics(voxels) == (2, 1, -5, 3)
    assert intensity_statistics(np.full((1, 2, 2), 7, np.uint8)) == (7, 0, 7, 7)


def test_the_default_is_what_it_always_was(store: SliceStore) -> None:
    """Clipped and scaled before the resize, on the CPU, cropped and flipped by the same draws."""
    crop = CropConfig(smallest=0.4)
    dataset = UnlabelledSlices(store, rows_of(store, ["train"]), 32, crop)
    for draw in ((0, 5), (3, 6), (6, 1 << 60)):
        row = int(dataset.rows[draw[0]])
        case, z = store.rows.case_name(row), int(store.rows.z[row])
        image = torch.from_numpy(to_unit(store.image_slice(case, z), -160.0, 240.0))[None]
        with keyed_randomness(draw[1]):
            part = random_crop(image, 0.4)
            part = part.flip(-1) if torch.rand(()) < 0.5 else part
        expected = fit_square(part[None], 32)[0]
        batch = ready(dataset, draw)
        torch.testing.assert_close(batch["image"][0], expected, atol=1e-6, rtol=0)
        assert (batch["key"].item(), batch["index"].item()) == (draw[1], draw[0])
        assert dataset.describe(draw[0]) == f"{case}/{z}"
        torch.testing.assert_close(unit_slice(store, case, z), image, atol=1e-6, rtol=0)


def test_windows_are_three_channels_and_padding_is_black_in_each(store: SliceStore) -> None:
    inputs = InputConfig(channels="windows", windows=("liver", (-2000.0, 2000.0), (100.0, 101.0)))
    image = ready(
        UnlabelledSlices(store, rows_of(store, ["train"]), 12, still(CropConfig()), inputs), (1, 0)
    )["image"]
    assert image.shape == (1, 3, 12, 12)
    pixels = store.image_slice(store.rows.case_name(1), 0)
    assert pixels.shape == (5, 6)  # so that 10 of the 12 rows are filled
    assert image[:, :, 10:].eq(0).all()
    row = int(rows_of(store, ["train"])[0])
    values = store.image_slice(store.rows.case_name(row), 0)
    shown = unit_slice(store, store.rows.case_name(row), 0, inputs)
    for channel, (low, high) in zip(shown, ((-45.0, 105.0), (-2000.0, 2000.0), (100.0, 101.0)), strict=True):
        np.testing.assert_allclose(channel, to_unit(values, low, high), atol=1e-4)


def test_neighbours_stop_at_the_ends_of_their_own_volume(store: SliceStore) -> None:
    case = store.cases("train")[1]
    first = store.first_row(case)
    volume = [unit_slice(store, case, z)[0] for z in range(4)]
    for step, z, expected in ((1, 0, (0, 0, 1)), (1, 2, (1, 2, 3)), (1, 3, (2, 3, 3)), (2, 1, (0, 1, 3))):
        image, _ = input_slice(store, first + z, InputConfig(channels="neighbours", step=step))
        assert image.shape[0] == 3
        shown = unit_slice(store, case, z, InputConfig(channels="neighbours", step=step))
        assert torch.equal(shown, torch.stack([volume[place] for place in expected]))


def test_labelled_slices_see_the_same_input(store: SliceStore) -> None:
    inputs = InputConfig(channels="neighbours")
    still_augment = AugmentConfig(degrees=0.0, translate=0.0, scale=0.0, intensity=0.0, noise=0.0)
    rows = rows_of(store, ["train"])
    item = LabelledSlices(store, rows, 24, still_augment, inputs)[2, 7]
    seen = ready(UnlabelledSlices(store, rows, 24, still(CropConfig()), inputs), (2, 7))["image"][0]
    torch.testing.assert_close(item["image"], seen, atol=1e-5, rtol=0)  # an identity is resampled too
    assert item["labels"].shape == (24, 24)
    assert set(item["labels"].unique().tolist()) <= {0, 1, 2}
    batch = {"image": item["image"][None], "labels": item["labels"][None]}
    assert unit_images(batch) is batch


def test_pooled_stores_keep_their_own_ranges_and_names(store, prepare_config, tmp_path) -> None:
    config = prepare_config(store="other", window_hu=(0.0, 1000.0))
    prepare(replace(config, name="other"))
    other = SliceStore(config.out)
    parts = [
        UnlabelledSlices(each, rows_of(each, ["pool", "train"]), 8, still(CropConfig()))
        for each in (store, other)
    ]
    pooled = Pooled(parts)
    count = len(parts[0])
    assert len(pooled) == count + len(parts[1])
    assert torch.equal(pooled[count + 1, 3]["image"], parts[1][1, 3]["image"])
    assert pooled[count + 1, 3]["index"] == count + 1
    assert pooled[0, 3]["range"].tolist() == [[0, 400]]
    assert pooled[count, 3]["range"].tolist() == [[0, 1000]]
    assert pooled.describe(0).startswith("tiny-")
    assert pooled.describe(count).startswith("other-")
    assert set(pooled.groups("modality").tolist()) == {0}
    patients = pooled.groups("patient")
    assert len(set(patients[:count]) & set(patients[count:])) == 0


def test_settings_that_cannot_be_meant_are_refused(store: SliceStore) -> None:
    with pytest.raises(ConfigError, match="low end must lie below"):
        build_config(InputConfig, {"window": [40, -40]}, "test")
    with pytest.raises(ConfigError):
        build_config(InputConfig, {"window": "stomach"}, "test")
    assert build_config(InputConfig, {"window": [-40, 40]}, "test").window == (-40, 40)
    check_input(InputConfig(channels="windows"), store)
    nothing_known = replace(MR, mean=np.nan, std=np.nan, lowest=np.nan)
    with pytest.raises(UserError, match=r"older version.*Run prepare again"):
        value_ranges(InputConfig(mr="zscore"), nothing_known)
    assert value_ranges(InputConfig(), nothing_known).tolist() == [[10, 900]]

import numpy as np
import pytest
import torch

from samssl.data.inputs import shaded
from samssl.data.views import CropConfig, draw_view, keyed_randomness, native_window, still

IMAGE = torch.arange(1.0, 1 + 3 * 20 * 30).view(3, 20, 30)


def view(key: int, crop: CropConfig, size: int = 16) -> torch.Tensor:
    with keyed_randomness(key):
        return draw_view(IMAGE, size, crop)[0]


@pytest.mark.parametrize("kind", ["resized", "native"])
def test_a_view_follows_from_its_key(kind) -> None:
    crop = CropConfig(kind=kind, degrees=10.0, intensity=0.2, gamma=0.3)
    with keyed_randomness(4):
        image, shade = draw_view(IMAGE, 16, crop)
    with keyed_randomness(4):
        again, shade_again = draw_view(IMAGE, 16, crop)
    assert image.shape == (3, 16, 16)
    assert torch.equal(image, again)
    assert shade is not None
    assert shade_again is not None
    assert torch.equal(shade, shade_again)
    assert not torch.equal(image, view(5, crop))


def test_native_windows_are_pixels_of_the_slice_or_black() -> None:
    crop = CropConfig(kind="native", flip=0.0)
    corners = set()
    for key in range(40):
        window = view(key, crop)
        top, left = divmod(int(window[0, 0, 0]) - 1, 30)
        assert torch.equal(window, IMAGE[:, top : top + 16, left : left + 16])
        corners.add((top, left))
    assert len(corners) > 20
    padded = native_window(IMAGE, 24)
    assert padded.shape == (3, 24, 24)
    assert padded[:, 20:].eq(0).all()
    assert padded[:, :20].ne(0).all()


def test_flips_come_in_their_share() -> None:
    crop = CropConfig(kind="native", smallest=1.0, flip=0.25)
    flipped = [bool((view(key, crop)[0, 0].diff() < 0).all()) for key in range(400)]
    assert 70 < sum(flipped) < 130  # 100 expected; 30 is 3.5 standard deviations
    assert not any((view(key, still(crop))[0, 0].diff() < 0).all() for key in range(50))


def test_shade_stays_within_its_bounds_and_is_gamma_contrast_brightness() -> None:
    crop = CropConfig(intensity=0.1, gamma=0.2)
    shades = []
    for key in range(200):
        with keyed_randomness(key):
            shades.append(draw_view(IMAGE, 16, crop)[1])
    low, high = torch.stack(shades).aminmax(dim=0)
    assert (low >= torch.tensor([0.9, 0.9, np.exp(-0.2) - 1e-6])).all()
    assert (high <= torch.tensor([1.1, 1.1, np.exp(0.2) + 1e-6])).all()
    assert (high - low > torch.tensor([0.15, 0.15, 0.3])).all()
    image = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 1, 2, 2)
    assert torch.equal(shaded(image, torch.ones(1, 3)), image)
    squared = image**2
    centre = squared.mean()
    expected = (0.8 * (centre + 0.5 * (squared - centre))).clamp(0, 1)
    torch.testing.assert_close(shaded(image, torch.tensor([[0.8, 0.5, 2.0]])), expected)
    assert draw_view(IMAGE, 16, CropConfig())[1] is None


def test_nothing_random_leaks_out_of_a_key() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    view(3, CropConfig())
    assert torch.equal(torch.rand(3), expected)

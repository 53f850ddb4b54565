import pytest
import torch

from samssl.masking import all_tokens, stratified, window_noise


def draw(grid: tuple[int, int], window: int, mask_ratio: float, batch: int = 3):
    return stratified(window_noise(torch.arange(batch), grid, window, 1), grid, window, mask_ratio)


def test_sam_at_1024_keeps_49_slots_of_every_window_and_a_quarter_of_the_tokens() -> None:
    visible = draw((64, 64), 14, 0.75, batch=1)
    assert visible.slots.shape == (1, 25, 49)
    assert visible.tokens.shape == (1, 1024)
    per_window = torch.zeros(25).scatter_add(0, visible.real[0] // 49, torch.ones(1024))
    assert sorted(per_window.tolist()) == [16.0] + [28.0] * 8 + [49.0] * 16


@pytest.mark.parametrize("grid", [(16, 16), (4, 4), (9, 13)])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.4, 0.75])
def test_tokens_are_different_and_lie_where_their_slots_say(grid: tuple[int, int], mask_ratio: float) -> None:
    visible = draw(grid, 6, mask_ratio)
    columns_of_windows = -(-grid[1] // 6)
    for tokens, slots in zip(visible.tokens, visible.slots, strict=True):
        assert len(set(tokens.tolist())) == len(tokens)
        window = torch.arange(len(slots))[:, None].expand_as(slots)
        rows = window // columns_of_windows * 6 + slots // 6
        columns = window % columns_of_windows * 6 + slots % 6
        raster = (rows * grid[1] + columns).flatten()[visible.real[0]]
        assert torch.equal(raster, tokens)
        padding = torch.ones(slots.numel(), dtype=torch.bool).index_fill(0, visible.real[0], False)
        outside = (rows >= grid[0]) | (columns >= grid[1])
        assert torch.equal(outside.flatten(), padding)


def test_nothing_hidden_is_every_token() -> None:
    visible = all_tokens((9, 13), 6, torch.device("cpu"))
    assert sorted(visible.tokens[0].tolist()) == list(range(9 * 13))
    assert not visible.hidden().any()


def test_hidden_is_the_complement_and_differs_between_images() -> None:
    visible = draw((16, 16), 6, 0.75)
    hidden = visible.hidden()
    assert torch.equal(hidden.sum(1), torch.full((3,), 256 - visible.tokens.shape[1]))
    assert not hidden.gather(1, visible.tokens).any()
    assert not torch.equal(hidden[0], hidden[1])

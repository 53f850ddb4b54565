import pytest
import torch

from samssl.masking import (
    MaskingConfig,
    all_tokens,
    draw_hidden,
    draw_visible,
    stratified,
    window_noise,
)


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


KEYS = torch.arange(4)


@pytest.mark.parametrize("layout", ["stratified", "uniform"])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_every_layout_keeps_the_asked_share_and_follows_from_the_key_alone(layout, block: int) -> None:
    masking = MaskingConfig(ratio=0.75, layout=layout, block=block)
    visible = draw_visible(KEYS, (16, 16), 6, masking)
    assert visible.tokens.shape[1] == pytest.approx(64, abs=2)
    assert all(len(set(tokens.tolist())) == len(tokens) for tokens in visible.tokens)
    alone = draw_visible(KEYS[2:3], (16, 16), 6, masking)
    assert set(alone.tokens[0].tolist()) == set(visible.tokens[2].tolist())
    assert set(visible.tokens[0].tolist()) != set(visible.tokens[1].tolist())


def test_uniform_windows_keep_different_numbers_and_say_which_slots_are_there() -> None:
    visible = draw_visible(KEYS, (16, 16), 6, MaskingConfig(layout="uniform"))
    assert visible.present is not None
    counts = visible.present.sum(-1)
    assert counts.max() == visible.slots.shape[2]
    assert counts.min() < counts.max()
    assert (counts.sum(1) == 64 + 17).all()  # a quarter of 256 tokens and of 68 padding slots


def neighbours_alike(hidden: torch.Tensor) -> float:
    """Share of horizontal neighbours of which both are hidden or both are shown."""
    grid = hidden.view(-1, 16, 16)
    return (grid[:, :, 1:] == grid[:, :, :-1]).float().mean().item()


def test_blocks_are_hidden_and_shown_together() -> None:
    alike = [neighbours_alike(draw_hidden(KEYS, (16, 16), MaskingConfig(block=block))) for block in (1, 2, 4)]
    assert alike[0] < alike[1] < alike[2]
    whole = draw_hidden(KEYS, (16, 16), MaskingConfig(block=4)).view(-1, 4, 4, 4, 4)
    assert torch.equal(whole.all(4).all(2), whole.any(4).any(2))  # 12 of 16 squares, none of them in part


@pytest.mark.parametrize("layout", ["stratified", "uniform"])
def test_so_much_of_what_is_visible_is_tissue(layout) -> None:
    tissue = torch.zeros(4, 16, 16, dtype=torch.bool)
    tissue[:, 4:12, 4:12] = True
    tissue = tissue.flatten(1)

    def share(tissue_share: float) -> float:
        masking = MaskingConfig(ratio=0.75, layout=layout, tissue_share=tissue_share)
        visible = draw_visible(KEYS, (16, 16), 6, masking, tissue)
        return tissue.gather(1, visible.tokens).float().mean().item()

    assert share(0.0) == pytest.approx(0.25, abs=0.08)
    assert share(0.9) > 0.45
    hidden = draw_hidden(KEYS, (16, 16), MaskingConfig(tissue_share=0.75), tissue)
    assert (~hidden & tissue).sum(1).min() >= 48
    assert torch.equal(hidden.sum(1), torch.full((4,), 192))

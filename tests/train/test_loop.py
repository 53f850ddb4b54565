"""The loop's promises: the same batches for any number of workers, and exact resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from samssl.config import UserError
from samssl.train.context import LocalContext, State
from samssl.train.feed import BatchSampler, Shuffled, batch_draws
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig, is_decayed, learning_rate

CONFIG = FitConfig(steps=12, batch_size=4, lr=0.1, warmup_steps=2, validate_every=3, log_every=4, seed=3)


class Noisy:
    """Items that are all randomness: `x` from the draw's key, `y` from its index."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        index, key = draw
        x = torch.randn(3, generator=torch.Generator().manual_seed(key))
        return {"x": x, "y": torch.tensor(float(index))}


class Regressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        noise = torch.rand(len(batch["y"]))  # randomness of the step itself
        error = self.layer(batch["x"])[:, 0] + 0.1 * noise - batch["y"]
        return {"loss": error.square().mean()}


class Interrupted(Exception):
    pass


class StoppingContext(LocalContext):
    """Is killed when it is to save its `stop_at`-th state."""

    def __init__(self, folder: Path, stop_at: int) -> None:
        super().__init__(folder)
        self.left = stop_at

    def save(self, state: State, metrics: dict[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted
        super().save(state, metrics)


def run(context: LocalContext, config: FitConfig = CONFIG, scores: list[float] | None = None) -> State:
    context.device = torch.device("cpu")
    model = Regressor()

    def validate(step: int) -> Validation:
        weight = float(model.layer.weight.abs().sum())
        score = scores[step // config.validate_every] if scores else -weight
        return Validation(score, {"val/weight": weight})

    return fit(model, Noisy(), validate, config, context)


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_a_run_stopped_anywhere_and_resumed_is_bit_for_bit_the_undisturbed_one(
    tmp_path: Path, stop_at: int
) -> None:
    wanted = run(LocalContext())
    with pytest.raises(Interrupted):
        run(StoppingContext(tmp_path, stop_at))
    found = run(LocalContext(tmp_path))
    for name, value in wanted["weights"].items():
        assert torch.equal(found["weights"][name], value)
    assert found["progress"]["history"] == wanted["progress"]["history"]
    assert found["progress"]["step"] == 12


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = run(LocalContext(tmp_path))
    again = LocalContext(tmp_path)
    assert run(again)["progress"]["history"] == first["progress"]["history"]
    assert not again.metrics  # nothing is trained or validated a second time


def test_one_and_two_workers_see_the_same_global_batches() -> None:
    def batches(rank: int, world_size: int) -> list[list[tuple[int, int]]]:
        context = LocalContext()
        context.rank, context.world_size = rank, world_size
        return list(BatchSampler(Shuffled(10), CONFIG, context, start=2))

    halves = [left + right for left, right in zip(batches(0, 2), batches(1, 2), strict=True)]
    assert halves == batches(0, 1)
    assert len(halves) == 10


def test_every_epoch_shows_every_item_once_in_another_order_with_other_keys() -> None:
    draws = batch_draws(Shuffled(10), 0, 30, seed=1)
    epochs = [[index for index, _ in draws[first : first + 10]] for first in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({key for _, key in draws}) == 30
    assert batch_draws(Shuffled(10), 7, 5, seed=1) == draws[7:12]
    assert batch_draws(Shuffled(10), 0, 30, seed=2) != draws


def test_no_steps_leave_the_weights_as_they_were() -> None:
    state = run(LocalContext(), replace(CONFIG, steps=0))
    assert torch.equal(state["weights"]["layer.weight"], Regressor().layer.weight)
    assert state["progress"]["step"] == 0


def test_patience_stops_the_run_and_the_best_weights_are_those_of_the_best_score() -> None:
    state = run(LocalContext(), replace(CONFIG, patience=2, keep_best=True), scores=[0.1, 0.5, 0.4, 0.3, 0.9])
    assert state["progress"]["step"] == 9
    assert state["progress"]["best_step"] == 3
    assert not torch.equal(
        state["progress"]["best_weights"]["layer.weight"], state["weights"]["layer.weight"]
    )


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate(step, CONFIG) for step in range(12)]
    assert rates[:3] == [0.05, 0.1, 0.1]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(12, CONFIG) == pytest.approx(0, abs=1e-12)
    poly = replace(CONFIG, schedule="poly")
    assert learning_rate(7, poly) == pytest.approx(0.1 * 0.5**0.9)


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    context = LocalContext()
    context.world_size = 3
    with pytest.raises(ValueError, match="choose a multiple of 3"):
        run(context)


def test_a_loss_that_is_no_number_stops_the_run_and_says_where() -> None:
    with pytest.raises(UserError, match=r"loss became (inf|nan) at step"):
        run(LocalContext(), replace(CONFIG, lr=1e30, clip_norm=0.0))


def test_every_matrix_decays_and_nothing_else() -> None:
    names = [
        "cross_attn_token_to_image.q_proj.weight",
        "mask_tokens.weight",
        "iou_token.weight",
        "pos_embed",
        "rel_pos_h",
        "attn.attention_biases",
    ]
    matrix = nn.Parameter(torch.zeros(2, 2))
    assert [is_decayed(name, matrix) for name in names] == [True, *[False] * 5]
    assert not is_decayed("norm.weight", nn.Parameter(torch.zeros(2)))

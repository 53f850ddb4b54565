"""The loop's promises: the same batches for any number of workers, and exact resume."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from samssl.config import UserError
from samssl.train.context import LocalContext, State
from samssl.train.feed import BatchSampler, KeyedDataset, Shuffled, batch_draws
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig, build_optimizer, is_decayed, layer_scales, learning_rate

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
    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        noise = torch.rand(len(batch["y"]))  # randomness of the step itself
        error = self.layer(batch["x"])[:, 0] + self.noise * noise - batch["y"]
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


class Recording(LocalContext):
    """Keeps every state that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[State] = []

    def save(self, state: State, metrics: dict[str, float]) -> None:
        self.states.append(state)


def run(
    context: LocalContext,
    config: FitConfig = CONFIG,
    scores: list[float] | None = None,
    data: KeyedDataset | None = None,
    noise: float = 0.1,
    initial: State | None = None,
) -> State:
    context.device = torch.device("cpu")
    model = Regressor(noise)

    def validate(step: int) -> Validation:
        weight = float(model.layer.weight.abs().sum())
        score = scores[step // config.validate_every] if scores else -weight
        return Validation(score, {"val/weight": weight})

    return fit(model, data or Noisy(), validate, config, context, initial=initial)


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


def test_a_loss_that_is_no_number_again_and_again_stops_the_run_and_names_the_slices() -> None:
    with pytest.raises(UserError, match=r"in 4 steps in a row \(steps 1 to 4\).*item \d.*optim.lr"):
        run(LocalContext(), replace(CONFIG, lr=1e30, clip_norm=0.0, max_skipped=3))


class Broken(Noisy):
    """Item 7 holds a value that is no number."""

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        item = super().__getitem__(draw)
        return {**item, "x": item["x"] * math.nan} if draw[0] == 7 else item

    def describe(self, index: int) -> str:
        return f"case_{index}"


def test_a_step_whose_loss_is_no_number_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    steps = [batch_draws(Shuffled(10), step * 4, 4, CONFIG.seed) for step in range(12)]
    skipped = [any(index == 7 for index, _ in draws) for draws in steps]
    assert 0 < sum(skipped) < 12
    wanted = run(LocalContext(), data=Broken())
    assert wanted["progress"]["skipped"] == sum(skipped)
    assert all(math.isfinite(value) for _, _, value in wanted["progress"]["history"])
    assert wanted["optimizer"]["state"][0]["step"] == 12 - sum(skipped)
    with pytest.raises(Interrupted):
        run(StoppingContext(tmp_path, 3), data=Broken())
    found = run(LocalContext(tmp_path), data=Broken())
    assert found["progress"]["history"] == wanted["progress"]["history"]
    assert torch.equal(found["weights"]["layer.weight"], wanted["weights"]["layer.weight"])


def test_only_the_slice_that_is_broken_is_named() -> None:
    with pytest.raises(UserError, match=r"values that are no number: case_7\."):
        run(LocalContext(), replace(CONFIG, max_skipped=0), data=Broken())


def test_a_batch_in_parts_gives_the_step_of_the_whole_batch() -> None:
    config = replace(CONFIG, schedule="poly")
    whole, parts = (run(LocalContext(), replace(config, accumulate=n), noise=0.0) for n in (1, 4))
    torch.testing.assert_close(parts["weights"], whole["weights"], rtol=1e-4, atol=1e-6)
    assert not torch.equal(whole["weights"]["layer.weight"], Regressor().layer.weight)
    with pytest.raises(ValueError, match=r"optim\.accumulate 3 does not divide the 4 slices"):
        run(LocalContext(), replace(config, accumulate=3))


def test_saving_apart_from_validating_changes_no_number(tmp_path: Path) -> None:
    wanted = run(LocalContext())
    config = replace(CONFIG, save_every=2)
    with pytest.raises(Interrupted):
        run(StoppingContext(tmp_path, 5), config)
    saved = LocalContext(tmp_path).restore()
    assert saved is not None
    assert saved["progress"]["step"] == 6
    found = run(LocalContext(tmp_path), config)
    assert found["progress"]["history"] == wanted["progress"]["history"]
    assert torch.equal(found["weights"]["layer.weight"], wanted["weights"]["layer.weight"])


def test_a_finished_run_is_continued_with_more_steps() -> None:
    constant = replace(CONFIG, warmup_steps=100)  # a schedule that does not depend on `steps`
    wanted = run(LocalContext(), constant)
    first = run(LocalContext(), replace(constant, steps=6))
    found = run(LocalContext(), constant, initial=first)
    assert first["progress"]["step"] == 6  # what is continued is not changed
    assert len(first["progress"]["history"]) < len(found["progress"]["history"])
    assert torch.equal(found["weights"]["layer.weight"], wanted["weights"]["layer.weight"])
    validated = [entry for entry in found["progress"]["history"] if entry[1] == "val/weight"]
    assert validated == [entry for entry in wanted["progress"]["history"] if entry[1] == "val/weight"]


def test_the_average_of_the_weights_is_what_is_validated_and_exported(tmp_path: Path) -> None:
    config = replace(CONFIG, ema_decay=0.5, validate_every=1, keep_best=False)
    context = Recording()
    state = run(context, config)
    average = Regressor().layer.weight.detach()
    for saved in context.states[1:]:
        average = 0.5 * average + 0.5 * saved["raw_weights"]["layer.weight"]
    torch.testing.assert_close(state["weights"]["layer.weight"], average)
    assert not torch.equal(state["raw_weights"]["layer.weight"], state["weights"]["layer.weight"])
    validated = [value for _, name, value in state["progress"]["history"] if name == "val/weight"]
    assert validated[-1] == float(state["weights"]["layer.weight"].abs().sum())
    with pytest.raises(Interrupted):
        run(StoppingContext(tmp_path, 4), config)
    found = run(LocalContext(tmp_path), config)
    assert torch.equal(found["weights"]["layer.weight"], state["weights"]["layer.weight"])


def test_the_share_of_time_spent_waiting_for_data_is_logged() -> None:
    context = LocalContext()
    run(context)
    shares = [metrics["wait_share"] for _, metrics in context.metrics if "wait_share" in metrics]
    assert len(shares) == 3
    assert all(0 < share < 1 for share in shares)


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


def test_the_learning_rate_grows_with_the_batch_it_is_not_meant_for() -> None:
    assert learning_rate(2, replace(CONFIG, lr_batch_size=16)) == pytest.approx(0.1 * 4 / 16)
    context = LocalContext()
    run(context, replace(CONFIG, lr_batch_size=16))
    assert (0, {"peak_lr": 0.1 * 4 / 16}) in context.metrics


def test_blocks_learn_the_slower_the_earlier_they_come(micro_sam: Sam) -> None:
    scales = layer_scales(micro_sam, 0.5)
    assert scales["image_encoder.patch_embed.proj.weight"] == scales["image_encoder.pos_embed"] == 0.5**5
    assert [scales[f"image_encoder.blocks.{i}.mlp.lin1.weight"] for i in range(4)] == [
        0.5**n for n in (4, 3, 2, 1)
    ]
    assert scales["image_encoder.neck.0.weight"] == scales["mask_decoder.mask_tokens.weight"] == 1.0
    optimizer = build_optimizer(micro_sam, replace(CONFIG, layer_decay=0.5))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(micro_sam.parameters()))
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.5**n for n in range(6)}


def test_tinyvit_layers_are_depths_too() -> None:
    layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    model = nn.ModuleDict({"image_encoder": nn.ModuleDict({"layers": layers})})
    assert layer_scales(model, 0.5)["image_encoder.layers.0.weight"] == 0.25

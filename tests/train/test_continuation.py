"""Going on from another run's state is the same as never having stopped."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from samssl.config import UserError
from samssl.train.context import LocalContext, State
from samssl.train.continuation import read_state
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig

SETTINGS = FitConfig(steps=6, batch_size=2, warmup_steps=2, validate_every=4, log_every=1, keep_best=False)


class Noise:
    """Each draw another vector."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        return {"x": torch.rand(3, generator=torch.Generator().manual_seed(draw[1])) + draw[0]}


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.linear(batch["x"])[:, 0] - batch["x"].sum(1)).square().mean()}


class Keeping(LocalContext):
    """Remembers every state that was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.states: list[State] = []

    def save(self, state: State, metrics: dict[str, float]) -> None:
        self.states.append(copy.deepcopy(state))


def train(context: Keeping, initial: State | None = None) -> State:
    torch.manual_seed(0 if initial is None else 1)  # other weights at first: the state has to replace them
    return fit(Sum(), Noise(), lambda step: Validation(0.0, {}), SETTINGS, context, initial=initial)


def test_a_continued_run_ends_with_the_weights_of_an_undisturbed_one() -> None:
    whole, rest = Keeping(), Keeping()
    wanted = train(whole)
    found = train(rest, initial=whole.states[1])
    assert whole.states[1]["progress"]["step"] == 4
    assert [state["progress"]["step"] for state in rest.states] == [4, 6]
    assert found["progress"]["history"] == wanted["progress"]["history"]
    for name, value in wanted["weights"].items():
        assert torch.equal(found["weights"][name], value)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"state\.pt cannot be read as the state of a run"):
        read_state(tmp_path)

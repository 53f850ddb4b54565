"""Points of a search space."""

import math
from typing import Any

import optuna
import pytest

from samssl.cluster.space import AxisConfig, check_conditions, drawn, field_value, grid, in_words, suggest

METHOD, RANK, LR = "finetune.strategy.method", "finetune.strategy.lora.rank", "finetune.optim.lr"
SPACE = {
    METHOD: AxisConfig(choice=("lora", "adapter")),
    RANK: AxisConfig(choice=(1, 4), when={METHOD: "lora"}),
    LR: AxisConfig(loguniform=(1e-4, 1e-2)),
}


def test_a_grid_has_every_combination_that_its_conditions_allow() -> None:
    space = {name: SPACE[name] for name in (METHOD, RANK)} | {LR: AxisConfig(uniform=(0.1, 0.3), step=0.1)}
    points = grid(space)
    assert len(points) == 9
    assert sum(RANK in point for point in points) == 6
    assert all((RANK in point) == (point[METHOD] == "lora") for point in points)
    assert {round(point[LR], 6) for point in points} == {0.1, 0.2, 0.3}


def test_a_grid_of_a_continuous_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid needs choice"):
        grid(SPACE)


def test_random_points_are_the_same_for_the_same_seed_and_stay_inside() -> None:
    points = drawn(SPACE, 40, seed=3)
    assert points == drawn(SPACE, 40, seed=3) != drawn(SPACE, 40, seed=4)
    assert all(1e-4 <= point[LR] <= 1e-2 for point in points)
    assert all((RANK in point) == (point[METHOD] == "lora") for point in points)
    below = sum(point[LR] < 1e-3 for point in points)  # half of a log-uniform axis
    assert 8 < below < 32


def test_points_that_are_drawn_twice_are_tried_once() -> None:
    assert len(drawn({RANK: AxisConfig(choice=(1, 2))}, 30, seed=0)) == 2


def test_tpe_finds_the_better_half() -> None:
    space = {LR: AxisConfig(loguniform=(1e-4, 1e-2)), RANK: AxisConfig(integers=(1, 9), step=2)}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        point = suggest(trial, space)
        assert point[RANK] in (1, 3, 5, 7, 9)
        study.tell(trial, -abs(math.log10(point[LR]) + 3) + point[RANK] / 100)
    assert study.best_params[LR] == pytest.approx(1e-3, rel=0.3)


def test_lists_are_choices_too() -> None:
    space = {"finetune.strategy.lora.ranks": AxisConfig(choice=([1, 2], [4, 8]))}
    assert [field_value(value) for point in grid(space) for value in point.values()] == [[1, 2], [4, 8]]
    assert {repr(point) for point in drawn(space, 9, seed=0)} == {repr(point) for point in grid(space)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "not none"),
        ({"choice": (1,), "uniform": (0.0, 1.0)}, "choice, uniform"),
        ({"choice": ()}, "empty"),
        ({"choice": (1, 1)}, "twice"),
        ({"uniform": (1.0, 0.0)}, "smaller to a larger"),
        ({"loguniform": (1.0, 2.0), "step": 0.5}, "step goes with"),
    ],
)
def test_an_axis_says_what_is_wrong_with_it(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AxisConfig(**wrong)


def test_conditions_name_earlier_axes() -> None:
    check_conditions(SPACE)
    with pytest.raises(ValueError, match="no axis above it"):
        check_conditions({RANK: SPACE[RANK], METHOD: SPACE[METHOD]})


def test_points_are_told_by_the_parts_of_names_that_differ() -> None:
    assert in_words({RANK: 4, LR: 0.00123456}) == "rank=4, lr=0.00123"
    assert in_words({"a.lora.rank": 4, "a.other.rank": 2}) == "lora.rank=4, other.rank=2"

"""The space that a sweep searches, and points of it, drawn with Optuna."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

import optuna
from ray import tune
from ray.tune.search.sample import Domain

from samssl.config import PositiveFloat, config

Point = dict[str, Any]
"""Value of each axis by the dotted name of its field; an axis whose condition fails is absent."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@config
class AxisConfig:
    """Values that one field may take. Give one of choice, uniform, loguniform and integers."""

    choice: tuple[bool | int | float | str | list[Any], ...] | None = None
    """One of these; a list is one value, as a rank for each block."""
    uniform: tuple[float, float] | None = None
    """From one number to another, evenly."""
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """From one number to another, every factor as likely as any other."""
    integers: tuple[int, int] | None = None
    """Whole numbers from the first to the last, both included."""
    step: PositiveFloat | None = None
    """Of `uniform` and `integers`: multiples of this above the first."""
    when: dict[str, Any] = field(default_factory=dict)
    """Searched only where earlier axes have these values: {finetune.strategy.method: lora}; a list allows
    several."""

    def __post_init__(self) -> None:
        kinds = [
            name
            for name in ("choice", "uniform", "loguniform", "integers")
            if getattr(self, name) is not None
        ]
        if len(kinds) != 1:
            raise ValueError(
                f"give one of choice, uniform, loguniform and integers, not {', '.join(kinds) or 'none'}"
            )
        ends = getattr(self, kinds[0])
        if kinds == ["choice"] and len(set(map(repr, ends))) != len(ends):
            raise ValueError("choice has the same value twice")
        if kinds != ["choice"] and not ends[0] < ends[1]:
            raise ValueError(f"{kinds[0]} must go from a smaller to a larger number")
        if self.step and kinds[0] in ("choice", "loguniform"):
            raise ValueError("step goes with uniform and integers only")
        if not ends:
            raise ValueError("choice is empty")

    def applies(self, point: Point) -> bool:
        """Whether the conditions hold at `point`, as far as it is chosen."""
        return all(
            name in point and point[name] in (wanted if isinstance(wanted, list) else [wanted])
            for name, wanted in self.when.items()
        )

    def domain(self) -> Domain:
        """The axis as Ray Tune draws from it."""
        if self.choice is not None:
            return tune.choice(
                [json.dumps(value) if isinstance(value, list) else value for value in self.choice]
            )
        if self.integers is not None:
            return tune.qrandint(*self.integers, q=int(self.step or 1))
        if self.uniform is not None:
            return tune.quniform(*self.uniform, q=self.step) if self.step else tune.uniform(*self.uniform)
        assert self.loguniform is not None, "checked with the configuration"
        return tune.loguniform(*self.loguniform)


Space = Mapping[str, AxisConfig]


def field_value(value: Any) -> Any:
    """What a field is set to at a point; lists are text there, which Optuna can keep."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def check_conditions(space: Space) -> None:
    """Refuse conditions on what is no earlier axis.

    Raises:
        ValueError: naming the axis.
    """
    earlier: set[str] = set()
    for name, axis in space.items():
        if unknown := axis.when.keys() - earlier:
            raise ValueError(f"{name}: its condition names {min(unknown)}, which is no axis above it")
        earlier.add(name)


def grid(space: Space) -> list[Point]:
    """Every combination, without those that differ only in what their conditions leave out."""
    points: list[Point] = [{}]
    for name, axis in space.items():
        values = list(_listed(name, axis))
        points = list(
            itertools.chain.from_iterable(
                [point | {name: value} for value in values] if axis.applies(point) else [point]
                for point in points
            )
        )
    return points


def drawn(space: Space, count: int, seed: int) -> list[Point]:
    """`count` points at random; the same for the same seed, and fewer where some are the same."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    points = [suggest(study.ask(), space) for _ in range(count)]
    return list({repr(point): point for point in points}.values())


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """The point that Optuna's sampler proposes for `trial`."""
    point: Point = {}
    for name, axis in space.items():
        if axis.applies(point):
            point[name] = _suggest_one(trial, name, axis)
    return point


def _suggest_one(trial: optuna.Trial, name: str, axis: AxisConfig) -> Any:
    if axis.choice is not None:
        return trial.suggest_categorical(name, list(_listed(name, axis)))
    if axis.integers is not None:
        return trial.suggest_int(name, *axis.integers, step=int(axis.step or 1))
    if axis.uniform is not None:
        return trial.suggest_float(name, *axis.uniform, step=axis.step)
    assert axis.loguniform is not None, "checked with the configuration"
    return trial.suggest_float(name, *axis.loguniform, log=True)


def _listed(name: str, axis: AxisConfig) -> Iterator[Any]:
    if axis.choice is not None:
        yield from (json.dumps(value) if isinstance(value, list) else value for value in axis.choice)
    elif axis.integers is not None:
        yield from range(axis.integers[0], axis.integers[1] + 1, int(axis.step or 1))
    elif axis.uniform is not None and axis.step:
        first, last = axis.uniform
        yield from (
            first + number * axis.step for number in range(int((last - first) / axis.step + 1e-9) + 1)
        )
    else:
        raise ValueError(f"{name}: a grid needs choice, integers, or uniform with a step")


def in_words(point: Point) -> str:
    """`rank=4, lr=0.00123`: each axis by the last part of its name that tells it from the others."""
    return ", ".join(
        f"{name}={_short(value)}" for name, value in zip(short_names(point), point.values(), strict=True)
    )


def short_names(names: Mapping[str, Any] | list[str]) -> list[str]:
    """Dotted names by as few of their last parts as tell them apart."""
    full = list(names)
    for length in itertools.count(1):
        shortened = [".".join(name.split(".")[-length:]) for name in full]
        if len(set(shortened)) == len(full):
            return shortened
    raise AssertionError("names of axes differ")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

from pathlib import Path
from typing import Literal

import pytest

from samssl.config import (
    ConfigError,
    PositiveFloat,
    PositiveInt,
    config,
    describe,
    dump_yaml,
    flatten,
    load_config,
    parse_overrides,
)


@config
class Inner:
    """Optimisation."""

    lr: PositiveFloat = 1e-3
    """Learning rate."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """Shape of the fall."""


@config
class Refined(Inner):
    """Optimisation with another default."""

    lr: PositiveFloat = 5e-2


@config
class Outer:
    """A stage."""

    out: Path
    """Folder."""
    steps: PositiveInt = 10
    """Optimizer steps."""
    optim: Refined = Refined()
    """Group."""
    seeds: tuple[int, ...] = (0,)
    """Seeds."""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_overrides_change_one_field_and_leave_its_siblings(tmp_path: Path) -> None:
    path = write(tmp_path, "out: here\noptim: {schedule: poly}\n")
    loaded = load_config(Outer, path, parse_overrides(["optim.lr=3e-4", "seeds=[1, 2]"]))
    assert loaded == Outer(out=Path("here").absolute(), optim=Refined(lr=3e-4, schedule="poly"), seeds=(1, 2))


def test_a_partly_given_group_keeps_the_defaults_of_its_stage(tmp_path: Path) -> None:
    assert load_config(Outer, write(tmp_path, "out: x\noptim: {schedule: poly}"), {}).optim.lr == 5e-2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "optim.lrr: there is no such field; the nearest is 'optim.lr'"),
        (["stepz=1"], "'steps'"),
        (["steps=0"], "steps: input should be greater than 0 (got '0')"),
        (["steps=many"], "steps:"),
        (["optim.schedule=linear"], "optim.schedule: input should be 'cosine' or 'poly' (got 'linear')"),
        (["steps.x=1"], "'steps' holds a value"),
        (["steps"], "'steps' is not an override"),
        (["seeds=[1"], "not a valid YAML list"),
    ],
)
def test_errors_name_the_field_and_the_mend(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = write(tmp_path, "out: here\nsteps: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, path, parse_overrides(overrides))
    assert message in str(caught.value)


def test_a_missing_field_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out: is required; set it in the YAML or as out=VALUE"):
        load_config(Outer, write(tmp_path, ""), {})
    with pytest.raises(ConfigError, match=r"no configuration file .*absent\.yaml"):
        load_config(Outer, tmp_path / "absent.yaml", {})
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(Outer, write(tmp_path, "a: [1"), {})
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(Outer, write(tmp_path, "- 1"), {})


def test_every_leaf_is_described_with_type_default_and_meaning() -> None:
    listed = {field.name: field for field in describe(Outer)}
    assert list(listed) == ["out", "steps", "optim.lr", "optim.schedule", "seeds"]
    assert (listed["steps"].type, listed["steps"].default) == ("int > 0", "10")
    assert listed["optim.lr"].default == "0.05"
    assert listed["optim.lr"].help == "Learning rate."
    assert listed["out"].default == "required"


def test_yaml_round_trip(tmp_path: Path) -> None:
    value = Outer(out=tmp_path, seeds=(3, 4))
    assert load_config(Outer, write(tmp_path, dump_yaml(value)), {}) == value
    assert flatten(value)["optim.lr"] == 5e-2

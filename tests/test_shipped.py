"""The package finds the files of ray_configs/ wherever it is run."""

import tomllib
from pathlib import Path

import pytest

from samssl.config import ConfigError, read_yaml
from samssl.shipped import DEMO, FOLDER, JOBS_GPU, config_file, shipped_folder

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", [DEMO, JOBS_GPU])
def test_what_the_commands_take_by_themselves_is_shipped(path: Path) -> None:
    assert (shipped_folder() / path.relative_to(FOLDER)).is_file()


def test_a_shipped_file_is_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = config_file(str(DEMO))
    assert found.read_text() == (ROOT / DEMO).read_text()
    own = tmp_path / DEMO
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\n")
    assert config_file(str(DEMO)).read_text() == "name: mine\n"


def test_a_name_that_is_not_shipped_stays_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "ray_configs/studies/none.yaml", "ray_configs"):
        assert config_file(name) == Path(name)
    with pytest.raises(ConfigError, match=r"no configuration file ray_configs/studies/none\.yaml"):
        read_yaml(config_file("ray_configs/studies/none.yaml"))


def test_the_wheel_is_told_to_put_them_where_they_are_looked_for() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["force-include"] == {FOLDER: f"samssl/{FOLDER}"}
    assert {f"/{FOLDER}", "/samssl"} <= set(build["sdist"]["include"])

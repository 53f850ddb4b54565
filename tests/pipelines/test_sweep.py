"""Sweeps as a user runs them: real Ray Tune, real MLflow, the micro model."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from mlflow.tracking import MlflowClient
from pipelines_support import SETTINGS, samssl

from samssl.files import sha256_tree

pytestmark = pytest.mark.ray
RANK = "finetune.strategy.lora.rank"


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and the file that describes it."""

    root: Path
    file: Path

    @property
    def out(self) -> Path:
        """Where it writes."""
        return self.root / self.file.stem

    def run(self, *overrides: str, check: bool = True) -> str:
        """Run it, or go on with it; returns what it printed."""
        done = samssl(self.root, "sweep", "--config", str(self.file), *overrides, check=check)
        return done.stdout + done.stderr

    def table(self) -> pd.DataFrame:
        """All trials."""
        return pd.read_csv(self.out / "trials.csv")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> Callable[..., Sweep]:
    """Writes the configuration of a sweep over one store."""
    root = tmp_path_factory.mktemp("sweep")
    scans = make_scans(root / "scans", cases=8)

    def sweep(name: str, space: dict[str, Any], **changes: Any) -> Sweep:
        settings: dict[str, Any] = json.loads(json.dumps(SETTINGS))
        del settings["pretrain"]
        settings["prepare"]["data"]["root"] = str(scans)
        settings |= {"name": name, "out": str(root / name), "space": space, **changes}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        return Sweep(root, root / f"{name}.yaml")

    return sweep


@pytest.fixture(scope="module")
def ranks(make: Callable[..., Sweep]) -> Sweep:
    """Two ranks of LoRA with two seeds, from a pretrained encoder."""
    pretrain = SETTINGS["pretrain"]
    space = {RANK: {"choice": [1, 4]}, "finetune.optim.lr": {"choice": [1e-3]}}
    sweep = make("ranks", space, pretrain=pretrain, seeds=[0, 1])
    sweep.run()
    return sweep


def test_a_grid_is_searched_on_val_and_its_best_point_is_tested_once(ranks: Sweep) -> None:
    table = ranks.table()
    assert table["status"].tolist() == ["finished"] * 4
    assert list(zip(table[RANK], table["seed"], strict=True)) == [(1, 0), (1, 1), (4, 0), (4, 1)]
    assert table.groupby(RANK)["trained_parameters"].first().is_monotonic_increasing
    best = json.loads((ranks.out / "best.json").read_text())
    means = table.groupby("point")["score"].mean()
    assert best["point"][RANK] == table[table["point"] == means.idxmax()][RANK].iloc[0]
    assert sorted(path.name for path in (ranks.out / "best").iterdir()) == ["bundle", "seed0", "seed1"]
    assert not list((ranks.out / "trials").rglob("cases.parquet"))
    chosen = table[(table["point"] == means.idxmax()) & (table["seed"] == best["seed"])].iloc[0]
    assert sha256_tree(ranks.out / "best/bundle") == sha256_tree(ranks.out / chosen["folder"] / "bundle")


def test_trials_are_children_of_the_sweep_in_mlflow(ranks: Sweep) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{ranks.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ranks")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    (parent,) = (run for run in runs.values() if run.data.tags["stage"] == "sweep")
    for row in ranks.table().to_dict("records"):
        run = runs[row["run_id"]]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["best/val_dice"] == pytest.approx(row["score"])
        assert run.info.run_name == f"finetune {row['point']} seed{row['seed']}"
    assert parent.data.metrics["best/val_dice"] == pytest.approx(
        ranks.table().groupby("point")["score"].mean().max()
    )


def test_what_is_finished_is_not_done_again(ranks: Sweep) -> None:
    before = {path: path.stat().st_mtime_ns for path in ranks.out.rglob("*.safetensors")}
    table = ranks.table()
    told = ranks.run()
    assert told.count("nothing to do") == 2 + 4 + 2  # pretraining, trials, tests of the best
    assert {path: path.stat().st_mtime_ns for path in before} == before
    pd.testing.assert_frame_equal(ranks.table(), table)


def test_a_wider_space_runs_the_new_points_only(ranks: Sweep) -> None:
    kept = ranks.table().set_index(["point", "seed"])["run_id"].to_dict()
    settings = yaml.safe_load(ranks.file.read_text())
    settings["space"][RANK]["choice"] = [1, 2, 4]
    ranks.file.write_text(yaml.safe_dump(settings))
    ranks.run()
    table = ranks.table().set_index(["point", "seed"])["run_id"].to_dict()
    assert len(table) == 6
    assert kept.items() <= table.items()


def test_tpe_with_asha_ends_what_falls_behind_and_goes_on_from_what_tune_kept(
    make: Callable[..., Sweep],
) -> None:
    space = {"finetune.optim.lr": {"loguniform": [1e-4, 1e-1]}}
    search = {"method": "tpe", "trials": 5, "scheduler": "asha", "grace_steps": 2, "reduction": 2, "seed": 1}
    sweep = make("tpe", space, search=search)
    sweep.run()
    table = sweep.table()
    assert len(table) == 5
    assert set(table["status"]) <= {"finished", "stopped"}
    assert (table["status"] == "finished").any()
    told = sweep.run()
    pd.testing.assert_frame_equal(sweep.table(), table)
    assert "Best:" in told


@pytest.mark.parametrize("scheduler", ["hyperband", "median"])
def test_what_is_paused_goes_on_and_what_is_ended_early_is_named(
    make: Callable[..., Sweep], scheduler: str
) -> None:
    search = {"method": "random", "trials": 4, "scheduler": scheduler, "reduction": 2, "seed": 1}
    optim = SETTINGS["finetune"]["optim"] | {"steps": 6}
    finetune = {"data": {"shots": 2}, "optim": optim}
    space = {"finetune.optim.lr": {"loguniform": [1e-6, 1e-1]}}
    sweep = make(scheduler, space, search=search | {"at_once": 2}, finetune=finetune)
    sweep.run()
    table = sweep.table()
    assert len(table) == 4
    assert set(table["status"]) <= {"finished", "stopped"}
    finished = table[table["status"] == "finished"]
    assert len(finished)
    for folder in finished["folder"]:
        history = pd.read_csv(sweep.out / folder / "history.csv")
        losses = history[history["metric"] == "train/loss"]
        assert losses["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_trial_that_always_fails_is_named_and_does_not_sink_the_sweep(make: Callable[..., Sweep]) -> None:
    sweep = make(
        "failing", {"finetune.strategy.lora.blocks": {"choice": [[0, 1], [9]]}}
    )  # micro has 4 blocks
    sweep.run()
    rows = {row["finetune.strategy.lora.blocks"]: row for row in sweep.table().to_dict("records")}
    assert {name: row["status"] for name, row in rows.items()} == {"[0, 1]": "finished", "[9]": "failed"}
    assert "names [9]" in rows["[9]"]["error"]
    assert str(rows["[9]"]["error"]) in (sweep.out / "report.html").read_text()


def test_a_population_goes_on_from_the_states_of_its_best(make: Callable[..., Sweep]) -> None:
    search = {"method": "random", "trials": 3, "scheduler": "pbt", "seed": 1, "at_once": 2}
    optim = {"steps": 8, "batch_size": 4, "warmup_steps": 1, "validate_every": 2, "log_every": 1}
    finetune = {"data": {"shots": 2}, "optim": optim}
    sweep = make("pbt", {"finetune.optim.lr": {"loguniform": [1e-6, 1e-1]}}, search=search, finetune=finetune)
    sweep.run()
    table = sweep.table()
    assert table["status"].tolist() == ["finished"] * 3
    client = MlflowClient(tracking_uri=f"sqlite:///{sweep.root / 'mlflow.db'}")
    runs = [client.get_run(str(run)) for run in table["run_id"]]
    donors = [(run, run.data.tags["continues"]) for run in runs if "continues" in run.data.tags]
    assert donors, "no trial took over another's state"
    for run, donor in donors:
        assert client.get_run(donor).info.run_id != run.info.run_id


def test_a_trial_may_have_workers_of_its_own_and_more_than_there_are_is_refused(
    make: Callable[..., Sweep],
) -> None:
    resources = {"workers": 2, "cpus_per_worker": 1}
    settings = {"finetune": {**SETTINGS["finetune"], "resources": resources}, "search": {"scheduler": "asha"}}
    sweep = make("nested", {RANK: {"choice": [2]}}, **settings)
    told = sweep.run("search.at_once=2", check=False)
    assert "2 x 2 = 4 CPUs of 2" in told
    sweep.run()
    assert (sweep.table()["status"] == "finished").any()
    history = pd.read_csv(sweep.out / sweep.table()["folder"][0] / "history.csv")
    assert history["step"].max() == SETTINGS["finetune"]["optim"]["steps"]

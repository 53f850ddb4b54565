"""What every stage does around its work: its folder, its MLflow run, its place in the lineage.

    config.yaml        the resolved configuration
    environment.json   versions, git commit, hardware
    run.json           MLflow run id, status, wall time, digests of inputs and outputs, metrics

A digest that a run reads or writes is a tag `input.<role>` or `output.<role>`; roles are `manifest`,
`encoder`, `state`, `bundle`, `export`, `safetensors` and `cases`. `input_path.<role>` and `path.<role>` say
where it lay; `run.<role>` names the run that wrote an input, where it is known.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from samssl.cluster.launch import join_cluster
from samssl.cluster.places import check_places
from samssl.cluster.tracking import PARENT_TAG, Run, continue_run, find_runs, open_run, tracking_uri
from samssl.config import UserError, dump_yaml, flatten, read_yaml, to_tree
from samssl.environment import environment, hardware
from samssl.files import read_json, write_json, write_text

PATHS = (
    *("out", "store", "data.store", "data.root", "data.csv", "model.checkpoint", "continue_from"),
    *("run", "bundle", "base", "study"),
)
"""Fields that say where something lies: what lies there is compared by digest instead."""


RUNTIME = (
    *("resources.", "register.", "optim.log_every", "optim.save_every"),
    *("dry_run", "gpu_tflops", "published", "trials_at_once", "search.at_once"),
    *("optim.loader_workers", "optim.checkpoint_activations", "data.embeddings.limit_gib"),
)
"""Fields, by how they begin, that change how a result is reached and not what it is."""

DESCRIBED = ("arm", "dataset", "shots", "seed")
"""Fields of `Place` that say which run of a study it is: tags in MLflow, and part of `run.json`."""


@dataclass(frozen=True)
class Place:
    """Where a run belongs in MLflow and in a study."""

    experiment: str = "samssl"
    arm: str | None = None
    dataset: str | None = None
    shots: int | None = None
    seed: int | None = None
    parent_run_id: str | None = None
    name: str | None = None
    """What the run is called after its stage; null: by the fields above."""


@dataclass(frozen=True)
class Input:
    """What a stage reads: its digest, and where it lies unless it was drawn at random."""

    digest: str
    path: Path | None


@dataclass
class StageRun:
    """A stage while it runs; what it finds out goes into `run.json` and MLflow at the end."""

    out: Path
    run: Run
    done: bool
    """An earlier run with the same configuration and inputs has finished; there is nothing to do."""
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    obsolete: list[Path] = field(default_factory=list)
    """Folders that are deleted once the stage has finished: what an interrupted one resumes from."""

    def wrote(self, role: str, digest: str, path: Path) -> None:
        """Record an output by its digest and where it lies."""
        self.outputs[role] = digest
        self.run.set_tags({f"output.{role}": digest, f"path.{role}": str(path.absolute())})


@contextmanager
def stage(
    name: str, config: Any, inputs: dict[str, Input], place: Place, *, always: bool = False
) -> Iterator[StageRun]:
    """Open the folder `config.out` for one stage; `inputs` maps roles to digests.

    Started again after an interruption it continues the same MLflow run; after success it says so and
    sets `done`, unless it is to run `always` because only its own work can tell what is left to do. An
    exception marks the run FAILED (Ctrl-C: KILLED) and leaves no `finished` behind.

    Raises:
        UserError: the folder holds the run of another configuration or of other inputs, or nodes of the
            cluster do not see it.
    """
    out = Path(config.out)
    record = _read_record(out)
    differing = _differing(record, out, name, config, inputs) if record else []
    if record and differing and (record["stage"] != name or not always):
        raise UserError(
            f"{out} holds a run that differs in {', '.join(differing)}. "
            "Choose another `out`, or delete that folder to replace it."
        )
    if record and record["status"] == "finished" and not always:
        print(f"{name}: {out} is finished and up to date; nothing to do.", flush=True)
        run = Run(tracking_uri(), record["run_id"])
        yield StageRun(out, run, done=True, outputs=record["outputs"], metrics=record["metrics"])
        return
    if not place.parent_run_id:  # whose stage has asked for all of its parts
        join_cluster()
        check_places(config, tracking_uri())
    run = _open(name, None if differing else record, place)
    _write_start(out, name, config, inputs, place, run)
    run.log_params(flatten(to_tree(config)))
    run.set_tags(_tags(name, inputs, place))
    if "manifest" in inputs:
        run.log_dataset(place.experiment, inputs["manifest"].digest)
    print(f"{name}: writing {out} (MLflow run {run.run_id})", flush=True)
    started, clock = datetime.now(UTC), time.monotonic()
    work = StageRun(out, run, done=False)
    try:
        yield work
    except BaseException as error:
        _record_failure(out, error)
        run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    record = read_json(out / "run.json")
    wall_time_s = time.monotonic() - clock
    record |= {
        "status": "finished",
        "started": started.isoformat(timespec="seconds"),
        "wall_time_s": wall_time_s,
    }
    write_json(out / "run.json", record | {"outputs": work.outputs, "metrics": work.metrics})
    run.log_metrics({**work.metrics, "wall_time_s": wall_time_s})
    run.end("FINISHED")
    for folder in work.obsolete:
        shutil.rmtree(folder, ignore_errors=True)


def _record_failure(out: Path, error: BaseException) -> None:
    """Say in `run.json` why the run ended, for reports that leave it out."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    with suppress(OSError, ValueError):  # a full disk, which is perhaps the reason
        record = read_json(out / "run.json")
        write_json(out / "run.json", record | {"status": "failed", "error": reason})


def _read_record(out: Path) -> dict[str, Any] | None:
    try:
        return read_json(out / "run.json")
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(
            f"{out / 'run.json'} is damaged. Delete the folder {out} and run the stage again."
        ) from None


def _differing(
    record: dict[str, Any], out: Path, name: str, config: Any, inputs: dict[str, Input]
) -> list[str]:
    """What of the run recorded in `out` is not as it is asked for now."""
    old, new = flatten(read_yaml(out / "config.yaml")), flatten(to_tree(config))
    names = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    roles = [f"the {role}" for role in inputs if record["inputs"].get(role) != inputs[role].digest]
    stage_name = [f"its stage, which is {record['stage']}"] if record["stage"] != name else []
    return [*stage_name, *(key for key in names if not _is_free(key)), *roles]


def _is_free(name: str) -> bool:
    return name in PATHS or name.startswith(RUNTIME)


def _open(name: str, record: dict[str, Any] | None, place: Place) -> Run:
    run = continue_run(record["run_id"]) if record else None
    if run:
        return run
    return open_run(place.experiment, _label(name, place), _tags(name, {}, place))


def _label(stage_name: str, place: Place) -> str:
    """The run's name in MLflow: `finetune hippocampus ssl 5-shot seed0`."""
    if place.name is not None:
        return f"{stage_name} {place.name}"
    shots = f"{place.shots}-shot" if place.shots else None
    seed = f"seed{place.seed}" if place.seed is not None else None
    parts = (stage_name, place.dataset, place.arm, shots, seed)
    return " ".join(part for part in parts if part is not None)


def _tags(name: str, inputs: dict[str, Input], place: Place) -> dict[str, str]:
    tags = {"stage": name}
    if place.parent_run_id:
        tags[PARENT_TAG] = place.parent_run_id
    described = {key: getattr(place, key) for key in DESCRIBED}
    tags |= {key: str(value) for key, value in described.items() if value is not None}
    for role, read in inputs.items():
        tags[f"input.{role}"] = read.digest
        if read.path:
            tags[f"input_path.{role}"] = str(read.path.absolute())
        writers = find_runs({f"output.{role}": read.digest})
        if writers:
            tags[f"run.{role}"] = writers[0].run_id
    return tags


def _write_start(out: Path, name: str, config: Any, inputs: dict[str, Input], place: Place, run: Run) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", dump_yaml(config))
    write_json(out / "environment.json", environment())
    record = {
        "stage": name,
        "run_id": run.run_id,
        "tracking_uri": run.uri,
        "status": "running",
        "hardware": hardware(),
        **{key: value for key, value in asdict(place).items() if key in ("experiment", *DESCRIBED)},
        "inputs": {role: read.digest for role, read in inputs.items()},
        "outputs": {},
        "metrics": {},
    }
    write_json(out / "run.json", record)

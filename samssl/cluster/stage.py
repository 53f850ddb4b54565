"""What every stage does around its work: its folder, its MLflow run, its place in the lineage.

    config.yaml        the resolved configuration
    environment.json   versions, git commit, hardware
    run.json           MLflow run id, status, wall time, digests of inputs and outputs, metrics, tags

A digest that a run reads or writes is a tag `input.<role>` or `output.<role>`; roles are `manifest`,
`encoder`, `state`, `bundle`, `export`, `safetensors` and `cases`. `input_path.<role>` and `path.<role>` say
where it lay; `run.<role>` names the run that wrote an input, where it is known. The tags `arm`, `dataset`,
`seed` and `shots` say where a run belongs, `init` and `ssl_run_id` what it starts from.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from samssl.cluster.origin import tags_of_bundle, tags_of_encoder
from samssl.cluster.outbox import FOLDER
from samssl.cluster.places import check_places
from samssl.cluster.server import tracking_uri
from samssl.cluster.tasks import join_cluster
from samssl.cluster.tracking import PARENT_TAG, DataUse, Run, continue_run, deliver_below, find_runs, open_run
from samssl.config import UserError, absolute_paths, as_url, dump_yaml, flatten, read_yaml, to_tree
from samssl.environment import environment, hardware
from samssl.files import read_json, write_json, write_text

PATHS = (
    *(
        "out",
        "store",
        "data.store",
        "data.root",
        "data.csv",
        "data.key_file",
        "model.checkpoint",
        "continue_from",
    ),
    *("run", "bundle", "base", "study"),
)
"""Fields that say where something lies: what lies there is compared by digest instead."""


RUNTIME = (
    *("resources.", "register.", "optim.log_every", "optim.save_every"),
    *("dry_run", "gpu_tflops", "published", "trials_at_once", "search.at_once"),
    *("optim.loader_workers", "optim.checkpoint_activations", "data.embeddings.limit_gib"),
)
"""Fields, by how they begin, that change how a result is reached and not what it is."""

TRAINING = "ray"
"""Folder, in a stage's, of the states that training goes on from."""
STOPPED = "stopped"
"""Status of a run that was given up before its last step."""

DESCRIBED = ("arm", "dataset", "shots", "seed")
"""Fields of `Place` that say which run of a study it is: tags in MLflow, and part of `run.json`."""


USES: dict[str, DataUse] = {"pretrain": "pretraining", "evaluate": "evaluation"}
"""What a stage uses its slices for, where that is not training."""


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
    tags: dict[str, str] = field(default_factory=dict)
    """What `run.json` has of the run's tags."""
    obsolete: list[Path] = field(default_factory=list)
    """Folders that are deleted once the stage has finished: what an interrupted one resumes from."""

    def wrote(self, role: str, digest: str, path: Path) -> None:
        """Record an output by its digest and where it lies."""
        self.outputs[role] = digest
        self.tag({f"output.{role}": digest, f"path.{role}": as_url(absolute_paths(path))})

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags in MLflow and in `run.json`, by which lineage works where there is no server."""
        self.tags |= tags
        self.run.set_tags(tags)


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
    if record and differing and record["status"] == "failed" and not (out / TRAINING).exists():
        record, differing = None, []  # it came to nothing, and may be tried with other settings
    if record and differing and (record["stage"] != name or not always):
        raise UserError(
            f"{out} holds a run that differs in {', '.join(differing)}. "
            "Choose another `out`, or delete that folder to replace it."
        )
    _deliver(name, out)
    if record and record["status"] == "finished" and not always:
        print(f"{name}: {out} is finished and up to date; nothing to do.", flush=True)
        run = Run(tracking_uri(), record["run_id"], out)
        yield StageRun(out, run, done=True, outputs=record["outputs"], metrics=record["metrics"])
        return
    if not place.parent_run_id:  # whose stage has asked for all of its parts
        join_cluster()
        check_places(config, tracking_uri())
    run = _open(name, out, None if differing else record, place)
    _write_start(out, name, config, inputs, place, run)
    run.log_params(flatten(to_tree(config)))
    tags = _log_inputs(name, run, inputs, place)
    print(f"{name}: writing {out} (MLflow run {run.run_id})", flush=True)
    started, clock = datetime.now(UTC), time.monotonic()
    work = StageRun(out, run, done=False, tags=tags)
    try:
        yield work
    except BaseException as error:
        _record_end(out, error)
        run.end("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
        raise
    wall_time_s = time.monotonic() - clock
    ended = {"started": started.isoformat(timespec="seconds"), "wall_time_s": wall_time_s}
    done = {"outputs": work.outputs, "metrics": work.metrics, "tags": work.tags}
    write_json(out / "run.json", read_json(out / "run.json") | {"status": "finished"} | ended | done)
    run.log_metrics({**work.metrics, "wall_time_s": wall_time_s})
    run.end("FINISHED")
    _deliver(name, out)
    for folder in work.obsolete:
        shutil.rmtree(folder, ignore_errors=True)


def _deliver(name: str, out: Path) -> None:
    """Log what an absence of the tracking server has left below `out`, or say that it is still there."""
    if left := deliver_below(out):
        print(
            f"{name}: MLflow has not got {left} entries yet. They are kept in `{FOLDER}` below {out}; "
            "the same command delivers them when the server is back.",
            flush=True,
        )


def _record_end(out: Path, error: BaseException) -> None:
    """Say in `run.json` why the run ended, for reports that leave it out.

    `SystemExit` is how Ray Tune ends a trial that its scheduler has given up.
    """
    status = STOPPED if isinstance(error, SystemExit) else "failed"
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    with suppress(OSError, ValueError):  # a full disk, which is perhaps the reason
        record = read_json(out / "run.json")
        write_json(out / "run.json", record | {"status": status, "error": reason})


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


def _open(name: str, out: Path, record: dict[str, Any] | None, place: Place) -> Run:
    run = continue_run(record["run_id"], out) if record else None
    if run:
        return run
    return open_run(place.experiment, _label(name, place), _place_tags(name, place), out)


def _label(stage_name: str, place: Place) -> str:
    """The run's name in MLflow: `finetune hippocampus ssl 5-shot seed0`."""
    if place.name is not None:
        return f"{stage_name} {place.name}"
    shots = f"{place.shots}-shot" if place.shots else None
    seed = f"seed{place.seed}" if place.seed is not None else None
    parts = (stage_name, place.dataset, place.arm, shots, seed)
    return " ".join(part for part in parts if part is not None)


def _place_tags(name: str, place: Place) -> dict[str, str]:
    tags = {"stage": name}
    if place.parent_run_id:
        tags[PARENT_TAG] = place.parent_run_id
    described = {key: getattr(place, key) for key in DESCRIBED}
    return tags | {key: str(value) for key, value in described.items() if value is not None}


def _log_inputs(name: str, run: Run, inputs: dict[str, Input], place: Place) -> dict[str, str]:
    """Link the run with what it reads: data sets and models of MLflow, and tags, which are returned."""
    tags: dict[str, str] = {}
    for role, read in inputs.items():
        tags[f"input.{role}"] = read.digest
        if read.path:
            tags[f"input_path.{role}"] = str(read.path.absolute())
        writer = next(iter(find_runs({f"output.{role}": read.digest})), None)
        if writer:
            tags[f"run.{role}"] = writer.run_id
        if role == "encoder":
            tags |= tags_of_encoder(read.digest, read.path, writer)
        elif role == "bundle":
            tags |= tags_of_bundle(writer)
        elif role == "manifest":
            run.log_dataset(place.dataset or place.experiment, read.digest, USES.get(name, "training"))
        model_id = writer.tags().get(f"model.{role}") if writer else None
        if model_id:
            run.log_model_input(model_id)
    tags |= _place_tags(name, place)
    run.set_tags(tags)
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

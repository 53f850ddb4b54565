"""Training in Ray Train workers."""

import functools
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.experimental import tqdm_ray
from ray.train.v2._internal.execution import context as ray_reporting
from ray.train.v2.api.report_config import CheckpointUploadMode
from torch import nn

from samssl.cluster.tasks import call_remote, error_for_user, nodes, resources_at_most, start_ray
from samssl.cluster.tracking import Run
from samssl.config import UserError
from samssl.models.checkpoints import save_state
from samssl.train.context import RunContext, State
from samssl.train.distributed import shard
from samssl.train.memory import keep_freed_memory
from samssl.train.resources import ResourcesConfig, Strategy

STATE_FILE = "state.pt"


def train(
    task: Callable[[Any, RunContext], State],
    config: Any,
    resources: ResourcesConfig,
    run: Run,
    storage: Path,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> State:
    """Run `task(config, context)` in Ray Train workers; returns the state it saved last.

    The state lies below `storage`. Where an earlier call left one there, training goes on from it:
    one `storage` belongs to one configuration.

    Raises:
        UserError: what the task raised for the user, or that workers were lost too often.
    """
    start_ray()
    bars = sys.stderr.isatty()

    def train_loop() -> UserError | None:
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        context = RayContext(run, bars, resources.strategy)
        if context.device.type == "cpu":
            keep_freed_memory()
        try:
            task(config, context)
        except UserError as error:
            if context.world_size > 1:
                raise  # the others wait for this one; Ray has to end them
            return error  # raised, it would count as a lost worker and be tried again

    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        scaling_config=_scaling(resources),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(storage.absolute()),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )
    try:
        with _own_sigint():
            result = trainer.fit()
    except SystemExit:  # Ray's way out of Ctrl-C
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        raise error_for_user(error) or UserError(
            f"Training failed: {str(error).strip().splitlines()[-1]} The workers' own messages are above. "
            "The same command goes on from the last saved state."
        ) from error
    if isinstance(result.return_value, UserError):
        raise result.return_value
    assert result.checkpoint is not None, "the training loop saves its state at least once"
    with result.checkpoint.as_directory() as folder:
        return _read_state(Path(folder))


@dataclass(frozen=True)
class Executor:
    """Where the work of a stage is done."""

    train: Callable[..., State]
    """As `train`."""
    call: Callable[[Callable[[Any], Any], Any], Any]
    """Calls a function with its argument."""


CLUSTER = Executor(train, call_remote)
"""In Ray Train workers, and in a Ray task."""


class RayContext:
    """`samssl.train.context.RunContext` in a Ray Train worker."""

    def __init__(self, run: Run, bars: bool, strategy: Strategy) -> None:
        worker = ray.train.get_context()
        self.rank, self.world_size = worker.get_world_rank(), worker.get_world_size()
        self.device = ray.train.torch.get_device()
        self.run, self.bars, self.strategy = run, bars, strategy
        ray_reporting.logger.setLevel("WARNING")  # the thread that reports does not follow LoggingConfig
        self.storage: Any = worker.get_storage()
        self.bar: tqdm_ray.tqdm | None = None
        self.written = threading.Event()
        self.written.set()

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Where there is more than one worker Ray's DDP wrapping, or the model sharded in place.

        Ray's own FSDP wants a GPU and hooks `forward`, which the encoder's blocks are not run through.
        """
        if self.strategy == "fsdp" and self.world_size > 1:
            return shard(model.to(self.device), self.device)
        return ray.train.torch.prepare_model(
            model, parallel_strategy_kwargs={"gradient_as_bucket_view": True}
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        """To MLflow, from rank 0."""
        if self.rank == 0:
            self.run.log_metrics(metrics, step)

    def picture(self, name: str, image: np.ndarray) -> None:
        """To MLflow's artifacts, from rank 0."""
        if self.rank == 0:
            self.run.log_picture(name, image)

    def progress(self, step: int, total: int, text: str) -> None:
        """A bar on the driver's terminal, or a plain line in its log."""
        if self.rank:
            return
        if not self.bars:
            print(f"step {step}/{total}: {text}", flush=True)
            return
        self.bar = self.bar or tqdm_ray.tqdm(total=total)
        self.bar.set_description(text)
        self.bar.update(step - self.bar._x)

    def save(self, state: State, metrics: dict[str, float]) -> None:
        """Report to Ray Train; rank 0 writes `state`, which it must own, while training goes on.

        Ray makes the checkpoint visible once it is whole, and waits for the last one before a run ends.
        At most one is written at a time: the next call waits for it.
        """
        self.written.wait()
        checkpoint = None
        if self.rank == 0:
            self.written.clear()
            checkpoint = ray.train.Checkpoint.from_directory(tempfile.mkdtemp(prefix="samssl_state_"))
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=functools.partial(self._write, state),
        )

    def _write(self, state: State, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """In Ray's own thread: `state` to a file of this machine, and from there to the run's storage."""
        try:
            save_state(state, Path(checkpoint.path) / STATE_FILE)
            return self.storage.persist_current_checkpoint(checkpoint, name)
        except BaseException:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
            raise
        finally:
            self.written.set()

    def restore(self) -> State | None:
        """The last checkpoint of this run, after a lost worker or a second start of the driver."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return _read_state(Path(folder))


@contextmanager
def _own_sigint() -> Iterator[None]:
    """Put back the handler of Ctrl-C that Ray Train replaces and leaves behind."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _read_state(folder: Path) -> State:
    return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)


def _scaling(resources: ResourcesConfig) -> ray.train.ScalingConfig:
    available = resources_at_most()
    wanted = resources.use_gpu
    use_gpu = available.get("GPU", 0) >= resources.workers if wanted is None else wanted
    hosts = [node for node in nodes() if node.get("GPU", 0) >= use_gpu]
    workers_a_host = -(-resources.workers // max(1, len(hosts)))
    cpus = resources.cpus_per_worker or max(
        1, int(min((n.get("CPU", 1) for n in hosts), default=1)) // workers_a_host
    )
    asked = {"CPU": cpus * resources.workers, "GPU": resources.workers if use_gpu else 0}
    for kind, amount in asked.items():
        if amount > available.get(kind, 0):
            raise UserError(
                f"The run asks for {amount} {kind}s ({resources.workers} workers), but the cluster has "
                f"{available.get(kind, 0):g}. Change workers, cpus_per_worker or use_gpu of `resources`."
            )
    each = {"CPU": float(cpus), **({"GPU": 1.0} if use_gpu else {})}
    return ray.train.ScalingConfig(num_workers=resources.workers, use_gpu=use_gpu, resources_per_worker=each)

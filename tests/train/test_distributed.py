"""Two processes on gloo: DDP and FSDP train as one process does, and their states are interchangeable."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from samssl.data.slices import SliceStore
from samssl.methods.mae import MaeConfig, MaskedAutoencoder
from samssl.models.sam import ModelConfig, build_sam
from samssl.models.strategies import StrategyConfig
from samssl.train.context import LocalContext, State
from samssl.train.distributed import shard
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneFitConfig, finetune
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig

CONFIG: dict[str, Any] = {
    **{"steps": 6, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2, "validate_every": 3, "log_every": 1},
    **{"ema_decay": 0.5, "precision": "fp32"},
}


class Images:
    """Noise that follows from the draw; item 3 of 16 holds a value that is no number."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        index, key = draw
        image = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(key))
        return {"image": image * (float("nan") if index == 3 else 1.0), "key": torch.tensor(key)}


class GlooContext(LocalContext):
    """One of several processes; rank 0 keeps the state in a folder they share."""

    def __init__(self, folder: Path, strategy: str) -> None:
        super().__init__(folder)
        self.device = torch.device("cpu")
        self.strategy = strategy
        if dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def prepare_model(self, model: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return model
        if self.strategy == "fsdp":
            return shard(model, self.device)
        return nn.parallel.DistributedDataParallel(model)

    def restore(self) -> State | None:
        state = super().restore()
        if self.world_size > 1:
            dist.barrier()  # or rank 0 might have saved before another has looked
        return state

    def save(self, state: State, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            super().save(state, metrics)


def train(folder: Path, strategy: str = "ddp", /, **changes: Any) -> None:
    """Train the micro MAE; every validation looks at the encoder from outside its forward."""
    torch.manual_seed(0)
    encoder = build_sam(ModelConfig(variant="micro", image_size=32)).image_encoder
    model = MaskedAutoencoder(
        encoder, MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2), image_size=32
    )

    def validate(step: int) -> Validation:
        batch = {"image": torch.ones(1, 1, 32, 32).tril(), "key": torch.tensor([1])}
        first = encoder.get_parameter("blocks.0.mlp.lin1.weight")
        loss, size = float(model(batch)["loss"]), float(first.norm())
        return Validation(
            -loss,
            {
                "val/loss": loss,
                "val/shown": float(model.reconstruct(batch).predicted.sum()),
                "val/size": size,
            },
        )

    folder.mkdir(exist_ok=True)
    fit(model, Images(), validate, FitConfig(**(CONFIG | changes)), GlooContext(folder, strategy))


def tune(folder: Path, store: Path, method: Any) -> None:
    """Fine-tune micro SAM on a slice store, sharded where there are several processes."""
    config = FinetuneConfig(
        out=folder,
        data=FinetuneDataConfig(store=store),
        model=ModelConfig(variant="micro", image_size=32),
        strategy=StrategyConfig(method=method),
        optim=FinetuneFitConfig(
            steps=4, batch_size=4, warmup_steps=1, validate_every=2, log_every=1, precision="fp32"
        ),
    )
    folder.mkdir(exist_ok=True)
    finetune(config, GlooContext(folder, "fsdp"))


def _worker(
    rank: int, port: int, call: Callable[..., None], arguments: tuple[Any, ...], changes: dict[str, Any]
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    call(*arguments, **changes)
    dist.destroy_process_group()


def in_two(call: Callable[..., None], *arguments: Any, **changes: Any) -> None:
    """`call` in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, call, arguments, changes), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


def train_in_two(folder: Path, strategy: str, **changes: Any) -> None:
    in_two(train, folder, strategy, **changes)


def state(folder: Path) -> State:
    return torch.load(folder / "state.pt", weights_only=True)


def check_close(found: State, wanted: State) -> None:
    for name in ("weights", "raw_weights"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=2e-4)
    assert 0 < found["progress"]["skipped"] == wanted["progress"]["skipped"] < 6
    for one, other in zip(found["progress"]["history"], wanted["progress"]["history"], strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], rel=2e-2, abs=1e-4), one


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> State:
    folder = tmp_path_factory.mktemp("alone")
    train(folder)
    return state(folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does_and_one_goes_on_from_their_state(
    tmp_path: Path, alone: State, strategy: str
) -> None:
    train_in_two(tmp_path, strategy)
    check_close(state(tmp_path), alone)
    shapes = {name: value.shape for name, value in alone["weights"].items()}
    assert {name: value.shape for name, value in state(tmp_path)["weights"].items()} == shapes


def test_a_sharded_run_goes_on_alone_and_the_other_way_round(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"warmup_steps": 100}  # a schedule that does not depend on `steps`
    train(tmp_path / "undisturbed", steps=6, **changes)
    for name, first, second in (("out", train_in_two, train), ("in", train, train_in_two)):
        folder = tmp_path / name
        first(folder, "fsdp", steps=3, **changes)
        assert state(folder)["progress"]["step"] == 3
        second(folder, "fsdp", steps=6, **changes)
        check_close(state(folder), state(tmp_path / "undisturbed"))


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_sharded_fine_tuning_of_few_parameters_has_the_losses_of_one_process(
    tmp_path: Path, prepare_boxes: Callable[..., SliceStore], method: str
) -> None:
    store = Path(prepare_boxes(tmp_path, train=2, val=1, test=1).root)
    tune(tmp_path / "alone", store, method)
    in_two(tune, tmp_path / "two", store, method)
    found, wanted = state(tmp_path / "two"), state(tmp_path / "alone")
    shapes = [{name: value.shape for name, value in run["weights"].items()} for run in (found, wanted)]
    assert shapes[0] == shapes[1]
    for one, other in zip(found["progress"]["history"], wanted["progress"]["history"], strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], rel=2e-2, abs=1e-4), one

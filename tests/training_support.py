"""Training a model a little."""

from pathlib import Path

import torch
from torch import Tensor, nn

from samssl.bundle import write_bundle
from samssl.data.slices import SliceStore
from samssl.models.sam import ModelConfig
from samssl.train.context import LocalContext
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneFitConfig, finetune


def write_tuned(path: Path, config: FinetuneConfig, store: SliceStore) -> None:
    """Fine-tune on the CPU and write the bundle to `path`."""
    context = LocalContext()
    context.device = torch.device("cpu")
    state = finetune(config, context)
    weights = {name.removeprefix("segmenter."): value for name, value in state["weights"].items()}
    write_bundle(path, config, store, weights)


def write_tuned_micro(root: Path, store: SliceStore, steps: int) -> None:
    """`write_tuned` of micro at 32 px on the store in `root`, to `root`/bundle."""
    optim = FinetuneFitConfig(steps=steps, batch_size=2, warmup_steps=1, validate_every=steps, lr=0.01)
    config = FinetuneConfig(
        out=root / "run",
        data=FinetuneDataConfig(store=root / "store"),
        model=ModelConfig(variant="micro", image_size=32),
        optim=optim,
    )
    write_tuned(root / "bundle", config, store)


def train_two_steps(model: nn.Module, images: Tensor) -> None:
    """Two steps of AdamW that draw the outputs towards 1; the model is in evaluation mode afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        (model(images) - 1).square().mean().backward()
        optimizer.step()
    model.eval()

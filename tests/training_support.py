"""Training a model a little."""

import torch
from torch import Tensor, nn


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

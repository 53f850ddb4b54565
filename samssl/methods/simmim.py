"""SimMIM (arXiv:2111.09886): hidden patches are replaced, every token is computed, pixels are predicted.

For TinyViT, whose convolutions cannot leave tokens out, and the dense baseline for SAM's ViTs. What stands
for a hidden patch is `samssl.models.backbones.encode_masked`'s to say. The head is one linear layer and
the loss the L1 distance over hidden patches, as published; masks and targets are those of all methods.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from samssl.config import UserError
from samssl.masking import MaskingConfig, draw_hidden
from samssl.methods.targets import (
    Reconstruction,
    TargetConfig,
    Targets,
    fill,
    patch_targets,
    take,
    weighted_mean,
)
from samssl.models.backbones import ImageEncoder, encode_masked, mask_width, token_side, token_width
from samssl.models.sam import normalise


class SimMim(nn.Module):
    """SAM's `image_encoder` with a mask token and a linear head that are thrown away after pretraining."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        *,
        image_size: int,
        channels: int = 1,
        masking: MaskingConfig = MaskingConfig(),
        targets: TargetConfig = TargetConfig(),
    ) -> None:
        """For square images of `image_size` pixels with 1 or 3 `channels`.

        Raises:
            UserError: the mask ratio hides none or all of an image's tokens.
        """
        super().__init__()
        self.image_encoder = image_encoder
        self.image_encoder.neck.requires_grad_(False)  # as in MAE: it learns in fine-tuning
        self.masking, self.targets = masking, targets
        self.patch = token_side(image_encoder)
        count = (image_size // self.patch) ** 2
        if round(count * (1 - masking.ratio)) in (0, count):
            raise UserError(
                f"masking.ratio {masking.ratio} hides none or all of an image's {count} tokens. "
                "Choose one nearer to 0.75."
            )
        self.mask_token = nn.Parameter(torch.zeros(mask_width(image_encoder)))
        self.norm = nn.LayerNorm(token_width(image_encoder), eps=1e-6)
        self.head = nn.Linear(token_width(image_encoder), channels * self.patch**2)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a batch with `image` [B, C, H, W] in [0, 1] and `key` [B], which seeds each mask."""
        targets, varies, hidden, chosen = self._task(batch)
        errors = self._predict(batch["image"], hidden, chosen) - take(targets.values, chosen)
        loss = weighted_mean(errors.abs().mean(-1), varies.gather(1, chosen), self.targets.flat_weight)
        return {"loss": loss, "varied_share": varies.float().mean()}

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor]) -> Reconstruction:
        """Every hidden patch predicted, at its own mean and contrast where targets are normalised."""
        targets, _, hidden, chosen = self._task(batch)
        predicted = self._predict(batch["image"], hidden, chosen)
        return fill(batch["image"], targets, predicted, chosen, self.patch)

    def _task(
        self, batch: dict[str, Tensor]
    ) -> tuple[Targets, Bool[Tensor, "B hw"], Bool[Tensor, "B hw"], Int[Tensor, "B M"]]:
        """Targets; where patches vary; which are hidden, as flags and as raster indices."""
        images = batch["image"]
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        targets = patch_targets(images, self.patch, self.targets)
        varies = targets.varies(self.targets.flat_std)
        hidden = draw_hidden(batch["key"], grid, self.masking, varies)
        return targets, varies, hidden, hidden.nonzero()[:, 1].view(len(images), -1)

    def _predict(
        self, images: Tensor, hidden: Bool[Tensor, "B hw"], chosen: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B M CPP"]:
        tokens = encode_masked(
            self.image_encoder, normalise(images, self.image_encoder), hidden, self.mask_token
        )
        return self.head(self.norm(take(tokens, chosen)))

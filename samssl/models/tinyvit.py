"""MobileSAM's image encoder (arXiv:2306.14289): TinyViT-5M (arXiv:2207.10666) at a stride of 16 pixels.

The blocks are timm's; names of parameters and buffers are those of the published `mobile_sam.pt`. Unlike
the published code it takes images of any size that is a multiple of 16.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from segment_anything.modeling.common import LayerNorm2d
from timm.models import tiny_vit
from torch import Tensor, nn

from samssl.models.recompute import run_block

STRIDE = 16
"""Pixels per token of the last stages, in each direction."""


class TinyViT(nn.Module):
    """A stage of convolutions, three of windowed attention, and SAM's neck; `layers` can be iterated."""

    img_size = 1024
    """The side to which `segment_anything`'s own code pads images."""

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 5, 10),
        windows: Sequence[int] = (7, 7, 14, 7),
        out_channels: int = 256,
        num_classes: int = 1000,
    ) -> None:
        """One number a stage; the first stage has no heads and windows. `num_classes` is `head`'s alone."""
        super().__init__()
        self.patch_embed = PatchEmbedding(embed_dims[0])
        stages = []
        for index, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            blocks = [
                attention_block(dim, num_heads[index], windows[index]) if index else convolution_block(dim)
                for _ in range(depth)
            ]
            last_but_one = index == len(embed_dims) - 2
            merging = [
                patch_merging(dim, out, stride=1 if last_but_one else 2)
                for out in embed_dims[index + 1 : index + 2]
            ]
            stages.append(Stage(blocks, *merging))
        self.layers = nn.ModuleList(stages)
        width = embed_dims[-1]
        self.norm_head = UnusedWeights((width,), (width,))
        self.head = UnusedWeights((num_classes, width), (num_classes,))
        self.neck = nn.Sequential(
            nn.Conv2d(width, out_channels, 1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )
        _initialise(self)

    @property
    def width(self) -> int:
        """Channels of the tokens, before the neck."""
        return self.neck[0].in_channels  # pyright: ignore[reportReturnType]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Image embeddings of normalised `images`."""
        return self.neck(self.encode(images))

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """The tokens of normalised `images` before the neck, one for 16 x 16 pixels."""
        height, width = images.shape[-2:]
        assert height % STRIDE == width % STRIDE == 0, f"{height} x {width} is not a multiple of {STRIDE}"
        tokens = self.patch_embed(images)
        for layer in self.layers:
            tokens = run_block(layer, _run_stage, tokens)
        return tokens

    def train(self, mode: bool = True) -> "TinyViT":
        """Training mode; batch norms whose weights are frozen keep and use the statistics they have."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(mode and module.weight.requires_grad)
        return self


def _run_stage(stage: nn.Module, tokens: Tensor) -> Tensor:
    return stage.forward(tokens)


class PatchEmbedding(nn.Module):
    """Two convolutions of stride 2: the stem."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        stem = tiny_vit.PatchEmbed(3, dim, nn.GELU)
        self.seq = _published_names(nn.Sequential(stem.conv1, stem.act, stem.conv2))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Feature maps at a quarter of the resolution."""
        return self.seq(images)


class Stage(nn.Module):
    """Blocks at one resolution, and what leads on to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def forward(self, tokens: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D i j"]:
        """The next stage's input."""
        for block in self.blocks:
            if isinstance(block, tiny_vit.TinyVitBlock):  # channels last
                tokens = block(tokens.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                tokens = block(tokens)
        return self.downsample(tokens)


class WindowAttention(tiny_vit.Attention):
    """timm's attention without its store of position biases, which outlives a change of the weights."""

    def get_attention_biases(self, device: torch.device) -> Float[Tensor, "heads N N"]:
        """One bias for each head, query and key; gradients are added up in one order (`F.embedding`)."""
        offsets = self.get_buffer("attention_bias_idxs")
        return F.embedding(offsets, self.attention_biases.T).permute(2, 0, 1)


class UnusedWeights(nn.Module):
    """`weight` and `bias` that the published file holds and nothing computes with: buffers, never trained."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(weight))
        self.register_buffer("bias", torch.zeros(bias))


def convolution_block(dim: int) -> nn.Module:
    """Inverted bottleneck with a residual (MBConv), expanding 4 times."""
    return _published_names(tiny_vit.MBConv(dim, dim, expand_ratio=4.0, act_layer=nn.GELU, drop_path=0.0))


def attention_block(dim: int, heads: int, window: int) -> nn.Module:
    """Attention in windows, padded as needed, a 3 x 3 depthwise convolution and an MLP."""
    block = tiny_vit.TinyVitBlock(dim, heads, window)
    block.attn = WindowAttention(dim, dim // heads, heads, attn_ratio=1, resolution=(window, window))
    return _published_names(block)


def patch_merging(dim: int, out: int, stride: int) -> nn.Module:
    """Three convolutions to `out` channels; `stride` 1 keeps the resolution, as MobileSAM does once."""
    merging = tiny_vit.PatchMerging(dim, out, nn.GELU)
    merging.conv2.conv.stride = (stride, stride)
    return _published_names(merging)


def _published_names(module: nn.Module) -> nn.Module:
    """`module` with every timm `ConvNorm` (`conv`, `bn`) as a sequence named as published (`c`, `bn`)."""
    for name, child in module.named_children():
        if isinstance(child, tiny_vit.ConvNorm):
            renamed = nn.Sequential()
            renamed.add_module("c", child.conv)
            renamed.add_module("bn", child.bn)
            setattr(module, name, renamed)
        else:
            _published_names(child)
    return module


def _initialise(encoder: TinyViT) -> None:
    """Linear layers as TinyViT draws them; convolutions, norms and biases are drawn where they are built."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

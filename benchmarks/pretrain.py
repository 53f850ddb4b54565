"""One training step of MAE on SAM's encoder against how it is done elsewhere, side by side in one process.

    samssl bench pretrain --json FILE
    samssl bench pretrain --variant micro --sizes 64 --batches 1 4 16

A step is forward, backward and fused AdamW, in the same precision everywhere, on weights drawn at random:

- `dense`: SimMIM-style training on `segment_anything`'s own encoder, all tokens and a linear head;
- `official`: the official MAE's shape at this size, a quarter of the tokens with global attention in plain
  ViT blocks (timm's), then its decoder of 8 x 512 over all tokens (lightly's; micro: 8 x 96);
- `samssl`: stratified visible tokens through SAM's own windows, cross-attention decoder.

Ratios are taken round by round. Run it on an idle machine.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samssl.environment import hardware
from samssl.masking import MaskingConfig, draw_hidden
from samssl.methods.decoders import sincos_positions
from samssl.methods.mae import MaeConfig, MaskedAutoencoder
from samssl.methods.official_decoder import SelfAttentionDecoder
from samssl.methods.targets import TargetConfig, patch_targets, take
from samssl.models.encoder import patchify
from samssl.models.sam import NORMALISATION, initialise
from samssl.train.costs import LiveBytes
from samssl.train.memory import keep_freed_memory

ENCODERS: dict[str, dict[str, Any]] = {
    "micro": {"embed_dim": 128, "depth": 4, "num_heads": 4, "global_attn_indexes": (1, 3), "window_size": 6},
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
}
MASKING = MaskingConfig()
OURS = "samssl"


def main() -> None:
    """Measure every table that is asked for; print each, and write all of them as JSON."""
    parser = argparse.ArgumentParser(
        prog="samssl bench pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variant", choices=list(ENCODERS), default="vit_b")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="sides of the images in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="those that fit")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count, after one that does not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the results; tables of earlier calls are kept")
    options = parser.parse_args()
    keep_freed_memory()
    for size in options.sizes:
        for batch in options.batches:
            for precision in options.precisions:
                table = measure(options, size, batch, precision)
                show(table)
                if options.json:
                    append(options.json, table)


def measure(options: argparse.Namespace, size: int, batch: int, precision: str) -> dict[str, Any]:
    """Seconds, ratios, operations and peak memory of each way."""
    variant, repeats, device = options.variant, options.repeats, options.device
    torch.manual_seed(0)
    images = torch.rand(batch, 1, size, size, device=device)
    ways = {name: WAYS[name](variant, size).to(device) for name in options.ways}
    steps = {name: make_step(way, images, precision) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peak = matrix_peak(precision, device)
    for round_number in range(repeats + 1):
        for name, step in steps.items():
            gc.collect()
            elapsed = timed(step, device)
            if round_number:
                seconds[name].append(elapsed)
    peak = max(peak, matrix_peak(precision, device))
    rows = {}
    for name, step in steps.items():
        flops = batch * count_operations(make_step(ways[name], images[:1], precision))
        median = statistics.median(seconds[name])
        rows[name] = {
            "seconds": round(median, 4),
            "range": [round(min(seconds[name]), 4), round(max(seconds[name]), 4)],
            "times_faster": {
                other: spread_of(theirs, seconds[name]) for other, theirs in seconds.items() if other != name
            },
            "tflop": round(flops / 1e12, 4),
            "share_of_peak": round(flops / median / peak, 3),
            "peak_gib": round(peak_bytes(ways[name], step, device) / 2**30, 2),
        }
    return {
        "variant": variant,
        "image_size": size,
        "batch_size": batch,
        "precision": precision,
        "repeats": repeats,
        "device": device,
        "hardware": hardware(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matrix_peak_tflops": round(peak / 1e12, 2),
        "ways": rows,
    }


class DenseSimMim(nn.Module):
    """Mask tokens and all others through `segment_anything`'s own encoder; L1 over hidden pixels."""

    def __init__(self, variant: str, size: int) -> None:
        super().__init__()
        self.encoder = build_encoder(variant, size)
        width = self.encoder.patch_embed.proj.out_channels
        self.patch = int(self.encoder.patch_embed.proj.kernel_size[0])
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, self.patch**2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of grey images [B, 1, S, S]."""
        images = batch["image"]
        tokens = self.encoder.patch_embed(images.expand(-1, 3, -1, -1))
        hidden = draw_hidden(batch["key"], (tokens.shape[1], tokens.shape[2]), MASKING)
        tokens = torch.where(hidden.view(*tokens.shape[:3], 1), self.mask_token.to(tokens.dtype), tokens)
        assert self.encoder.pos_embed is not None
        tokens = tokens + self.encoder.pos_embed
        for block in self.encoder.blocks:
            tokens = block(tokens)
        chosen = hidden.nonzero()[:, 1].view(len(images), -1)
        targets = patch_targets(images, self.patch, TargetConfig())
        predicted = self.head(take(tokens.flatten(1, 2), chosen))
        return {"loss": (predicted - take(targets.values, chosen)).abs().mean()}


class OfficialShape(nn.Module):
    """Visible tokens with global attention in plain blocks, then 8 blocks of 512 over all tokens, RGB."""

    def __init__(self, variant: str, size: int) -> None:
        super().__init__()
        sizes = ENCODERS[variant]
        width, self.patch = sizes["embed_dim"], 4 if variant == "micro" else 16
        self.grid = size // self.patch
        self.embed = nn.Linear(3 * self.patch**2, width)
        self.blocks = nn.ModuleList(
            [Block(width, sizes["num_heads"], qkv_bias=True) for _ in range(sizes["depth"])]
        )
        self.norm = nn.LayerNorm(width)
        dim = min(512, width * 2 // 3 // 32 * 32)
        self.decoder = SelfAttentionDecoder(width, dim, 8, dim // 32, 3 * self.patch**2, self.grid**2)
        self.register_buffer("positions", sincos_positions((self.grid, self.grid), width), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of grey images [B, 1, S, S], as RGB."""
        patches = patchify(batch["image"].expand(-1, 3, -1, -1), self.patch)
        hidden = draw_hidden(batch["key"], (self.grid, self.grid), MASKING)
        visible = (~hidden).nonzero()[:, 1].view(len(patches), -1)
        chosen = hidden.nonzero()[:, 1].view(len(patches), -1)
        tokens = self.embed(take(patches, visible)) + self.get_buffer("positions")[visible]
        for block in self.blocks:
            tokens = block(tokens)
        predicted = self.decoder(self.norm(tokens), visible, chosen, (self.grid, self.grid))
        return {"loss": (predicted - take(patches, chosen)).square().mean()}


def build_encoder(variant: str, size: int) -> ImageEncoderViT:
    """`segment_anything`'s encoder, built for images of this size."""
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    settings = {"window_size": 14, **ENCODERS[variant]}
    encoder = ImageEncoderViT(
        img_size=size,
        patch_size=4 if variant == "micro" else 16,
        norm_layer=norm,
        use_rel_pos=True,
        out_chans=64 if variant == "micro" else 256,
        **settings,
    )
    initialise(encoder)
    setattr(encoder, NORMALISATION, "sam")
    encoder.neck.requires_grad_(False)
    return encoder


def build_ours(variant: str, size: int) -> nn.Module:
    """This program's MAE with its defaults; for micro the decoder of ray_configs/studies."""
    small = MaeConfig(decoder_depth=2, decoder_dim=128, decoder_heads=4)
    mae = small if variant == "micro" else MaeConfig()
    return MaskedAutoencoder(build_encoder(variant, size), mae, image_size=size, masking=MASKING)


WAYS: dict[str, Callable[[str, int], nn.Module]] = {
    "dense": DenseSimMim,
    "official": OfficialShape,
    OURS: build_ours,
}


def make_step(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    """A whole training step."""
    device = images.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = {"image": images, "key": torch.arange(len(images), device=device)}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def timed(step: Callable[[], Any], device: str) -> float:
    """Seconds of one step."""
    synchronise(device)
    started = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_peak(precision: str, device: str, side: int = 4096, repeats: int = 8) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = side if device.startswith("cuda") or precision == "bf16" else side // 2
    a, b = (torch.rand(side, side, dtype=dtype, device=device) for _ in range(2))
    product: Callable[[], Any] = partial(torch.mm, a, b)
    return 2 * side**3 / min(timed(product, device) for _ in range(repeats))


def count_operations(step: Callable[[], None]) -> float:
    """Floating-point operations of a step as they are executed."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return float(counter.get_total_flops())


def peak_bytes(model: nn.Module, step: Callable[[], None], device: str) -> float:
    """The most memory in tensors during a step: weights, gradients, optimizer and activations."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        step()
        return float(torch.cuda.max_memory_allocated())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    moments = 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    for parameter in model.parameters():
        parameter.grad = None
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        step()
    return float(weights + moments + live.peak)


def spread_of(theirs: list[float], own: list[float]) -> list[float]:
    """Median, least and most of the ratios, round by round."""
    ratios = [other / mine for other, mine in zip(theirs, own, strict=True)]
    return [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def show(table: dict[str, Any]) -> None:
    """One table as text."""
    keys = ("variant", "image_size", "batch_size", "precision")
    print(", ".join(f"{key} {table[key]}" for key in keys) + f"; peak {table['matrix_peak_tflops']} TFLOP/s")
    ratios = table["ways"].get(OURS, {}).get("times_faster", {})
    for name, row in table["ways"].items():
        ratio = ratios.get(name)
        faster = f"samssl {ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]" if ratio else ""
        print(
            f"  {name:9} {row['seconds']:8.3f} s  {row['tflop']:6.2f} TFLOP  "
            f"{100 * row['share_of_peak']:3.0f} % of peak  {row['peak_gib']:6.2f} GiB  {faster}",
            flush=True,
        )


def append(path: Path, table: dict[str, Any]) -> None:
    """Add a table to the file."""
    tables = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*tables, table], indent=1) + "\n")


if __name__ == "__main__":
    main()

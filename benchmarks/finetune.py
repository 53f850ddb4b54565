"""Fine-tuning and evaluation against how they are done elsewhere, side by side in one process.

    samssl bench finetune --json FILE
    samssl bench finetune --variant micro --sections step cache volume

- `step`: a step of LoRA in encoder and decoder (forward, backward, fused AdamW). Common way: the same PEFT
  modules on `segment_anything`'s own encoder. Beside it a few steps of both on micro, whose losses agree.
- `cache`: an epoch of LoRA in the decoder alone. Common way: the frozen encoder runs for every slice again.
- `volume`: the slices of a volume to label ids. Common way: `SamPredictor`, slice by slice, one box each.

Weights are drawn at random. Ratios are taken round by round. Run it on an idle machine.
"""

import argparse
import copy
import gc
import io
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pretrain import append, count_operations, matrix_peak, peak_bytes, spread_of, timed
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import nn

from samssl.data.cases import Origin, write_case
from samssl.data.datasets import AugmentConfig, LabelledSlices, unit_slice
from samssl.data.embeddings import EmbeddingsConfig
from samssl.data.index import INDEX_COLUMNS
from samssl.data.scans import Scan
from samssl.data.slices import SliceStore, write_index
from samssl.environment import hardware
from samssl.losses import segmentation_loss
from samssl.models.encoder import patch_side
from samssl.models.sam import ModelConfig, build_sam, normalise
from samssl.models.strategies import StrategyConfig, segmenter_from
from samssl.predict import segment_case
from samssl.train.context import LocalContext
from samssl.train.feed import Batch, KeyedDataset, Shuffled, batches
from samssl.train.finetune import FinetuneFitConfig, SupervisedSegmenter
from samssl.train.frozen import FrozenEncoder
from samssl.train.memory import keep_freed_memory

NUM_CLASSES = 3
SIDE = 512
"""Pixels of a slice of the simulated scans."""

Ways = dict[str, Callable[[], Any]]


def main() -> None:
    """Measure every section that is asked for; print each table, and write all of them as JSON."""
    parser = argparse.ArgumentParser(
        prog="samssl bench finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--variant", choices=("micro", "vit_b", "vit_l", "vit_h"), default="vit_b")
    parser.add_argument("--size", type=int, default=0, help="side of the input in pixels; 0: as published")
    parser.add_argument("--batch", type=int, default=1, help="slices in a training step")
    parser.add_argument("--slices", type=int, default=4, help="slices of an epoch, and of a volume")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count, after one that does not")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the results; tables of earlier calls are kept")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    bench = Bench.of(options)
    for section in options.sections:
        table = SECTIONS[section](bench)
        show(table)
        if options.json:
            append(options.json, table)


@dataclass(frozen=True)
class Bench:
    """What is measured on: a SAM, and sizes."""

    variant: Any
    sam: Sam
    size: int
    batch: int
    slices: int
    repeats: int
    precisions: list[str]
    device: str

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Bench":
        """With weights drawn at random for images of the size that is asked for."""
        sam = build_sam(ModelConfig(variant=options.variant))
        size = options.size or int(sam.image_encoder.img_size)
        built_for(sam, size)
        return cls(
            options.variant,
            sam,
            size,
            options.batch,
            options.slices,
            options.repeats,
            options.precisions,
            options.device,
        )

    def segmenter(self, scope: Any) -> Any:
        """LoRA of rank 4 in the decoder, and in the encoder too where `scope` says so."""
        strategy = StrategyConfig(method="lora", scope=scope)
        return segmenter_from(copy.deepcopy(self.sam), strategy, NUM_CLASSES, seed=0).to(self.device)

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """In bf16, or not."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=precision == "bf16")

    def table(self, section: str, ways: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A result with all that it depends on."""
        return {
            "section": section,
            "variant": self.variant,
            "image_size": self.size,
            "batch_size": self.batch,
            "slices": self.slices,
            "repeats": self.repeats,
            "device": self.device,
            "hardware": hardware(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "ways": ways,
            **more,
        }


def built_for(sam: Sam, size: int) -> None:
    """Make `segment_anything`'s own code take images of this size, which its positions decide."""
    encoder = sam.image_encoder
    grid = size // patch_side(encoder)
    assert encoder.pos_embed is not None
    if encoder.img_size != size:
        encoder.img_size = size
        encoder.pos_embed = nn.Parameter(0.02 * torch.randn(1, grid, grid, encoder.pos_embed.shape[-1]))
        sam.prompt_encoder.input_image_size = (size, size)
        sam.prompt_encoder.image_embedding_size = (grid, grid)


class CommonWay(nn.Module):
    """The same weights and LoRA through `segment_anything`'s own encoder."""

    def __init__(self, segmenter: Any) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: Batch) -> Batch:
        """`loss`, as `SupervisedSegmenter` has it."""
        encoder = self.segmenter.image_encoder
        logits = self.segmenter.decode(encoder(normalise(batch["image"], encoder)))
        return {"loss": segmentation_loss(logits, batch["labels"])}


def measure_steps(bench: Bench) -> dict[str, Any]:
    """Seconds, ratios, operations and memory of one step of LoRA in encoder and decoder."""
    batch = discs(bench.batch, bench.size, bench.device)
    one = {name: value[:1] for name, value in batch.items()}
    models, ways = {}, {}
    for precision in bench.precisions:
        for name, kind in (("common", CommonWay), ("samssl", SupervisedSegmenter)):
            model = models[name, precision] = kind(bench.segmenter("encoder_decoder"))
            ways[f"{name} {precision}"] = make_step(bench, model, lambda: batch, precision)
    rows = summarised(timed_in_turn(ways, bench), ours="samssl")
    for (name, precision), model in models.items():
        row = rows[f"{name} {precision}"]
        step: Callable[[], Any] = make_step(bench, model, lambda: one, precision)
        flops = bench.batch * count_operations(step)
        peak = matrix_peak(precision, bench.device)
        row["tflop"] = round(flops / 1e12, 4)
        row["share_of_peak"] = round(flops / row["seconds"] / peak, 3)
        row["peak_gib"] = round(peak_bytes(model, ways[f"{name} {precision}"], bench.device) / 2**30, 2)
    return bench.table("step", rows, curves=loss_curves())


def loss_curves(steps: int = 12) -> dict[str, list[float]]:
    """Losses of both ways on micro, on the same batches."""
    sam = build_sam(ModelConfig(variant="micro"))
    micro = Bench("micro", sam, int(sam.image_encoder.img_size), 4, 0, 0, [], "cpu")
    found = {}
    for name, kind, precision in (
        ("common fp32", CommonWay, "fp32"),
        ("samssl fp32", SupervisedSegmenter, "fp32"),
        ("samssl bf16", SupervisedSegmenter, "bf16"),
    ):
        generator = iter(range(steps))
        model = kind(micro.segmenter("encoder_decoder"))
        step = make_step(
            micro, model, lambda seeds=generator: discs(4, micro.size, micro.device, next(seeds)), precision
        )
        found[name] = [round(step(), 5) for _ in range(steps)]
    return found


def measure_cache(bench: Bench) -> dict[str, Any]:
    """Seconds of an epoch with the encoder, of a first one that keeps embeddings, and of a later one."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = labelled_store(Path(folder) / "store", bench.slices)
        for precision in bench.precisions:
            ways = epochs(bench, store, Path(folder) / "kept", precision)
            measured = timed_in_turn(ways, bench)
            rows |= summarised(measured, ours=f"samssl, later {precision}")
            first, without = measured[f"samssl, first {precision}"], measured[f"common {precision}"]
            rows[f"samssl, first {precision}"]["times_longer"] = spread_of(first, without)
    return bench.table("cache", rows)


def epochs(bench: Bench, store: SliceStore, folder: Path, precision: Any) -> Ways:
    """Epochs over the training slices; each call of the first one begins with an empty folder."""
    settings = FinetuneFitConfig(
        steps=bench.slices // bench.batch, batch_size=bench.batch, precision=precision
    )
    context = LocalContext()
    context.device = torch.device(bench.device)
    slices = LabelledSlices(store, store.rows.rows(["train"]), bench.size, AugmentConfig())
    segmenter = bench.segmenter("decoder")
    model = SupervisedSegmenter(segmenter)

    def frozen(name: str) -> FrozenEncoder:
        kept = EmbeddingsConfig(folder=folder / name)
        encoder = FrozenEncoder(segmenter, slices, kept, bench.variant, settings, context)
        with redirect_stdout(io.StringIO()):
            encoder.fill()
        return encoder

    def epoch(data: KeyedDataset, on_device: Callable[[Batch], Batch] = lambda batch: batch) -> None:
        drawn = batches(data, Shuffled(len(data)), settings, context, start=0)

        def take() -> Batch:
            batch = next(drawn)[1]
            return on_device({name: value.to(bench.device) for name, value in batch.items()})

        step = make_step(bench, model, take, precision)
        for _ in range(settings.steps):
            step()

    numbers = iter(range(1_000_000))

    def first() -> None:
        new = frozen(f"{precision}-{next(numbers)}")
        epoch(new.data, new.complete)

    filled = frozen(f"{precision}-filled")
    return {
        f"common {precision}": lambda: epoch(slices),
        f"samssl, first {precision}": first,
        f"samssl, later {precision}": lambda: epoch(filled.data, filled.complete),
    }


def measure_volume(bench: Bench) -> dict[str, Any]:
    """Seconds from the slices of a volume to label ids in its own resolution.

    `SamPredictor` cannot give bf16 to numpy, so the common way is fp32.
    """
    predictor = SamPredictor(copy.deepcopy(bench.sam).to(bench.device))
    segmenter = bench.segmenter("decoder").eval()
    with tempfile.TemporaryDirectory() as folder:
        store = labelled_store(Path(folder), bench.slices)

        def in_batches(precision: str) -> None:
            with bench.autocast(precision):
                segment_case(segmenter, store, "test", bench.size, torch.device(bench.device))

        def one_by_one() -> None:
            for z in range(bench.slices):
                grey = (255 * unit_slice(store, "test", z)[0]).byte().numpy()
                predictor.set_image(np.repeat(grey[..., None], 3, axis=2))
                predictor.predict(box=np.array([100, 100, 300, 300]), multimask_output=False)

        ways: Ways = {"common fp32": one_by_one}
        for precision in bench.precisions:
            ways[f"samssl {precision}"] = lambda precision=precision: in_batches(precision)
        rows = summarised(timed_in_turn(ways, bench), ours="samssl")
    return bench.table("volume", rows)


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "step": measure_steps,
    "cache": measure_cache,
    "volume": measure_volume,
}


def labelled_store(folder: Path, slices: int) -> SliceStore:
    """Two noisy CT volumes with two labels, the cases `test` and `train`, each of its split."""
    rows, files = [], {}
    for number, name in enumerate(("test", "train")):
        generator = np.random.default_rng(number)
        y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
        radius = np.hypot(y, x)
        mask = (radius < 150).astype(np.uint8) + (radius < 60)
        mask = np.repeat(mask[None], slices, axis=0)
        voxels = (100.0 * mask + generator.normal(0, 15, mask.shape)).astype(np.int16)
        origin = Origin(source_sha256=name, mask_source_sha256=name, settings_sha256="")
        scan = Scan(voxels, (2.0, 0.8, 0.8), np.eye(4), "CT")
        facts = write_case(folder, name, scan, mask, origin=origin, window_hu=(-160.0, 240.0))
        files |= {f"cases/{name}.zarr/{file}": digest for file, digest in facts.files.items()}
        shared = {"case": name, "patient": name, "split": name, "modality": "CT", "labels": [1, 2]}
        shared |= {"num_slices": slices, "height": SIDE, "width": SIDE, "foreground_fraction": 0.2}
        shared |= {"intensity_low": -160.0, "intensity_high": 240.0, "content_fraction": 1.0}
        shared |= {"image_sha256": facts.image_sha256, "mask_sha256": facts.mask_sha256}
        rows += [shared | {"z": z} for z in range(slices)]
    text = {name: "" for name in INDEX_COLUMNS if "sha256" in name or "source" in name}
    index = pd.DataFrame([text | row for row in rows], columns=list(INDEX_COLUMNS))
    write_index(folder, "simulated", {0: "background", 1: "shell", 2: "core"}, index, files)
    return SliceStore(folder)


def discs(count: int, size: int, device: str, seed: int = 0) -> Batch:
    """Bright discs on a noisy ground."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(size) / size
    centres = 0.3 + 0.4 * torch.rand(count, 2, generator=generator)
    rows, columns = ((place[None] - centres[:, axis, None]) ** 2 for axis in (0, 1))
    inside = rows[:, :, None] + columns[:, None] < 0.04
    image = 0.5 * inside + 0.3 * torch.rand(count, size, size, generator=generator)
    return {"image": image[:, None].to(device), "labels": inside.long().to(device)}


def make_step(
    bench: Bench, model: nn.Module, take: Callable[[], Batch], precision: str
) -> Callable[[], float]:
    """A whole training step on the batch that `take` gives; it returns the loss."""
    model.to(bench.device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step() -> float:
        batch = take()
        with bench.autocast(precision):
            loss = model(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def timed_in_turn(ways: Ways, bench: Bench) -> dict[str, list[float]]:
    """Seconds of each way, round by round; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(bench.repeats + 1):
        for name, way in ways.items():
            gc.collect()
            elapsed = timed(way, bench.device)
            if round_number:
                seconds[name].append(elapsed)
    return seconds


def summarised(seconds: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Median and range of each way; how many times faster those that begin with `ours` are than others."""
    rows: dict[str, Any] = {}
    for name, own in seconds.items():
        rows[name] = {
            "seconds": round(statistics.median(own), 4),
            "range": [round(min(own), 4), round(max(own), 4)],
        }
        if name.startswith(ours):
            others = {other: found for other, found in seconds.items() if other.startswith("common")}
            rows[name]["times_faster"] = {other: spread_of(found, own) for other, found in others.items()}
    return rows


def show(table: dict[str, Any]) -> None:
    """One table as text."""
    keys = ("section", "variant", "image_size", "batch_size", "slices")
    print(", ".join(f"{key} {table[key]}" for key in keys))
    for name, row in table["ways"].items():
        print(f"  {name:22} {row['seconds']:9.4f} s {row['range']}")
        if "tflop" in row:
            print(f"    {100 * row['share_of_peak']:.0f} % of matrix peak, {row['peak_gib']:.2f} GiB at most")
        for other, (median, least, most) in row.get("times_faster", {}).items():
            print(f"    {median:.2f} [{least:.2f}, {most:.2f}] times faster than {other}")
        if "times_longer" in row:
            print(f"    {row['times_longer']} times as long as an epoch without kept embeddings")
    for name, losses in table.get("curves", {}).items():
        print(f"  losses on micro, {name}: {losses}")
    print(flush=True)


if __name__ == "__main__":
    main()

"""MAE's settings one at a time: what each does to the probe and to few-shot Dice. Micro SAM, on the CPU.

    python benchmarks/mae_settings.py --store STORE --size 48 --out FOLDER
    python benchmarks/mae_settings.py --store STORE --size 48 --out FOLDER --variants no_ssl default \
        --tune vanilla adapter lora decoder_vanilla decoder_adapter decoder_lora

Runs go side by side in single-threaded processes, as micro's operations are too small to share out. First
all are pretrained, then fine-tuned; each part leaves a file in FOLDER, and what has one is not done again.
At the end everything found is tabulated; `--variants` without a name does only that.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from samssl.data.slices import SliceStore
from samssl.files import read_json, write_text
from samssl.masking import MaskingConfig
from samssl.methods.mae import MaeConfig
from samssl.metrics import case_dice
from samssl.models.checkpoints import save_weights
from samssl.models.lora import LoraConfig
from samssl.models.sam import ModelConfig
from samssl.models.strategies import StrategyConfig, build_segmenter
from samssl.predict import score_cases
from samssl.statistics import mean_interval, paired_comparison
from samssl.train import finetune as tuning
from samssl.train import pretrain as pretraining
from samssl.train.context import LocalContext
from samssl.train.resume import put_trained

REFERENCE = "default"
MASKING = {
    "ratio_0.5": MaskingConfig(ratio=0.5),
    "ratio_0.9": MaskingConfig(ratio=0.9),
    "block_2": MaskingConfig(block=2),
    "block_3": MaskingConfig(block=3),
    "tissue_0.75": MaskingConfig(tissue_share=0.75),
    "uniform": MaskingConfig(layout="uniform"),
}
DEFAULT_MAE = MaeConfig(decoder_depth=2, decoder_dim=128, decoder_heads=4)
MAE = {
    "depth_1": replace(DEFAULT_MAE, decoder_depth=1),
    "depth_4": replace(DEFAULT_MAE, decoder_depth=4),
    "predicted_1.0": replace(DEFAULT_MAE, predicted_share=1.0),
}
VARIANTS = ["no_ssl", REFERENCE, *MASKING, *MAE]
STRATEGIES = {
    "lora": (StrategyConfig(train_neck=True), 1e-2),
    "adapter": (StrategyConfig(method="adapter", train_neck=True), 3e-3),
    "vanilla": (StrategyConfig(method="vanilla"), 1e-3),
    "neck": (StrategyConfig(train_neck=True, lora=LoraConfig(blocks=())), 1e-2),
    "decoder_lora": (StrategyConfig(scope="decoder"), 1e-2),
    "decoder_adapter": (StrategyConfig(scope="decoder", method="adapter"), 3e-3),
    "decoder_vanilla": (StrategyConfig(scope="decoder", method="vanilla"), 1e-3),
    "unet": (StrategyConfig(network="unet"), 1e-3),
}
"""What is trained in fine-tuning, and the peak learning rate, the same for every variant. Where the encoder's
blocks are adapted its neck trains too, as micro's is drawn at random; `neck` trains it with frozen blocks."""
PRETRAINING = pretraining.PretrainFitConfig(batch_size=32, warmup_steps=50)
TUNING = tuning.FinetuneFitConfig(warmup_steps=15)
FACTS = ("val/loss", "probe/dice", "features/effective_rank")
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One variant with one seed."""

    options: argparse.Namespace
    variant: str
    seed: int

    def file(self, ending: str) -> Path:
        """Where a part of this job's results lies."""
        return self.options.out / f"{self.options.store.name}-{self.variant}-{self.seed}-{ending}"

    def write(self, ending: str, row: Row) -> str:
        """Keep a row; returns it as text."""
        known = {"data": self.options.store.name, "variant": self.variant, "seed": self.seed}
        write_text(self.file(ending), text := json.dumps(known | row))
        return text


def main() -> None:
    """Run what has no row yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="as `samssl prepare` writes it")
    parser.add_argument("--size", type=int, required=True, help="of the images, a multiple of 4")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--tune", nargs="*", default=["lora"], choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=500, help="of pretraining, 32 slices each")
    parser.add_argument("--tune-steps", type=int, default=150, help="of fine-tuning, 16 slices each")
    parser.add_argument("--test-patients", type=int, default=16)
    options = parser.parse_args()
    jobs = [Job(options, variant, seed) for seed in options.seeds for variant in options.variants]
    side_by_side(pretrain_once, [(job,) for job in jobs if not job.file("mae.json").exists()])
    tuned = [(job, tune) for job in jobs for tune in options.tune]
    side_by_side(tune_once, [(job, tune) for job, tune in tuned if not job.file(f"{tune}.json").exists()])
    rows = [read_json(path) for path in options.out.glob("*.json")]
    print(probe_table([row for row in rows if "tune" not in row]))
    print(dice_table([row for row in rows if "tune" in row]))


def side_by_side(function: Callable[..., str], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Two calls at a time, each single-threaded; prints what they return."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, torch.set_num_threads, (1,)) as pool:
        for done in as_completed([pool.submit(function, *each) for each in arguments]):
            print(done.result(), flush=True)


def pretrain_once(job: Job) -> str:
    """Keep the pretrained weights and the measurements before and after. No SSL is no steps."""
    started, steps = time.monotonic(), 0 if job.variant == "no_ssl" else job.options.steps
    config = pretraining.PretrainConfig(
        out=job.options.out,
        data=pretraining.PretrainDataConfig(store=job.options.store),
        model=ModelConfig(variant="micro", image_size=job.options.size, init_seed=job.seed),
        masking=MASKING.get(job.variant, MaskingConfig()),
        mae=MAE.get(job.variant, DEFAULT_MAE),
        optim=replace(PRETRAINING, steps=steps, validate_every=max(1, steps), seed=job.seed),
    )
    state = pretraining.pretrain(config, context := LocalContext())
    save_weights(pretraining.pretrained_sam(config, state), job.file("mae.pth"))
    row: Row = {"seconds": time.monotonic() - started}
    for name in FACTS:
        values = [metrics[name] for _, metrics in context.metrics if name in metrics]
        row |= {f"{name} start": values[0], f"{name} end": values[-1]}
    return job.write("mae.json", row)


def tune_once(job: Job, tune: str) -> str:
    """Fine-tune and keep the test Dice by patient (mean over the patient's cases) at the last step."""
    started, steps, (strategy, lr) = time.monotonic(), job.options.tune_steps, STRATEGIES[tune]
    root, size, context = job.options.store, job.options.size, LocalContext()
    store = SliceStore(root)
    weights = job.file("mae.pth") if strategy.network == "sam" else None
    model = ModelConfig(variant="micro", image_size=size, checkpoint=weights)
    config = tuning.FinetuneConfig(
        out=job.options.out,
        data=tuning.FinetuneDataConfig(store=root, shots=5, shot_seed=job.seed),
        model=model,
        strategy=strategy,
        optim=replace(TUNING, steps=steps, validate_every=steps, lr=lr, seed=job.seed),
    )
    segmenter = build_segmenter(model, strategy, len(store.labels), job.seed)
    put_trained(tuning.SupervisedSegmenter(segmenter), tuning.finetune(config, context)["weights"])
    patients = {case: str(store.info(case)["patient"]) for case in store.cases("test")}
    chosen = sorted(set(patients.values()))[: job.options.test_patients]
    cases = [case for case, patient in patients.items() if patient in chosen]
    dice = case_dice(score_cases(segmenter, store, cases, size, context.device))
    means = dice.groupby(pd.Series(patients)).mean().to_dict()
    row = {"tune": tune, "seconds": time.monotonic() - started, "patients": means}
    return job.write(f"{tune}.json", row)


def probe_table(rows: list[Row]) -> str:
    """Of every variant, over its seeds: loss, effective rank, probe Dice and what MAE changed of it."""
    lines = ["data, variant | val/loss | effective rank | probe/dice | its change, by seed"]
    for (data, variant), runs in _grouped(rows, "data", "variant"):
        loss, probe, rank = (np.mean([row[f"{name} end"] for row in runs]) for name in FACTS)
        gains = " ".join(f"{row['probe/dice end'] - row['probe/dice start']:+.3f}" for row in runs)
        lines.append(f"{data}, {variant} | {loss:.3f} | {rank:.1f} | {probe:.3f} | {gains}")
    return "\n".join(lines)


def dice_table(rows: list[Row]) -> str:
    """Test Dice of every variant with its interval over patients, each averaged over the same seeds."""
    lines = ["data, tuned, variant | Dice | by seed | less the default | better/worse patients"]
    for (data, tune), group in _grouped(rows, "data", "tune"):
        reference = _dice(row for row in group if row["variant"] == REFERENCE)
        for (variant,), runs in _grouped(group, "variant"):
            dice = _dice(runs)
            own, seeds = mean_interval(dice.mean(axis=1).to_numpy()), dice.mean().round(3).tolist()
            line = f"{data}, {tune}, {variant} | {own.mean:.3f} [{own.low:.3f}, {own.high:.3f}] | {seeds}"
            shared = dice.columns.intersection(reference.columns)
            if variant != REFERENCE and len(shared):
                pair = (table[shared].mean(axis=1)[dice.index].to_numpy() for table in (dice, reference))
                d = paired_comparison(*pair)
                line += f" | {d.mean_difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}] | {d.better}/{d.worse}"
            lines.append(line)
    return "\n".join(lines)


def _dice(rows: Iterable[Row]) -> pd.DataFrame:
    return pd.DataFrame({row["seed"]: row["patients"] for row in rows})


def _grouped(rows: list[Row], *names: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Rows of equal values under `names`, by seed; variants in the order of `VARIANTS`."""
    ordered = sorted(rows, key=lambda row: (row["data"], VARIANTS.index(row["variant"]), row["seed"]))
    for key in dict.fromkeys(tuple(str(row[name]) for name in names) for row in ordered):
        yield key, [row for row in ordered if tuple(str(row[name]) for name in names) == key]


if __name__ == "__main__":
    main()

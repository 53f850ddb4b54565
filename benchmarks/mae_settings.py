"""What the settings of MAE do to the probe and to few-shot Dice: one change at a time, micro SAM, on a CPU.

    python benchmarks/mae_settings.py --store runs/hippocampus/store --out runs/mae_settings.csv

Every variant is pretrained from the same random weights of a seed, then fine-tuned on the same five patients
with LoRA in encoder and decoder, and the decoder alone (encoder frozen); `no SSL` and `default` also whole.
Finished rows are skipped, so that the same command goes on. Two processes of one thread run side by side,
as micro's small products waste a second thread. At the end: means, and paired differences to the default.
"""

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from samssl.config import build_config
from samssl.data.slices import SliceStore
from samssl.metrics import case_dice
from samssl.models.checkpoints import put_weights, save_weights
from samssl.models.strategies import build_segmenter
from samssl.predict import score_cases
from samssl.statistics import paired_comparison
from samssl.train.context import LocalContext
from samssl.train.finetune import FinetuneConfig, finetune
from samssl.train.pretrain import PretrainConfig, pretrain, pretrained_sam

VARIANTS: dict[str, dict[str, Any]] = {
    "no SSL": {"optim": {"steps": 0}},
    "default": {},
    "ratio 0.5": {"masking": {"ratio": 0.5}},
    "ratio 0.9": {"masking": {"ratio": 0.9}},
    "block 2": {"masking": {"block": 2}},
    "tissue share 0.75": {"masking": {"tissue_share": 0.75}},
    "uniform": {"masking": {"layout": "uniform"}},
    "decoder depth 4": {"mae": {"decoder_depth": 4}},
    "all hidden predicted": {"mae": {"predicted_share": 1.0}},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "lora": {"train_neck": True},
    "frozen": {"scope": "decoder"},
    "full": {"method": "vanilla"},
}
BASE = "default"
WHOLE = ("no SSL", BASE)
"""Variants that are also fine-tuned whole."""


@dataclass(frozen=True)
class Job:
    """One variant at one seed."""

    store: Path
    image_size: int
    steps: int
    variant: str
    seed: int
    cases: int


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True, help="slice store of `samssl prepare`")
    parser.add_argument("--image-size", type=int, default=48, help="pixels")
    parser.add_argument("--steps", type=int, default=500, help="of pretraining, 32 slices each")
    parser.add_argument("--cases", type=int, default=20, help="test cases that are scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True, help="CSV of results, a row a run, way and case")
    options = parser.parse_args()
    jobs = [
        Job(options.store.absolute(), options.image_size, options.steps, variant, seed, options.cases)
        for seed in options.seeds
        for variant in options.variants
    ]
    done = set()
    if options.out.exists():
        done = set(pd.read_csv(options.out)[["variant", "seed"]].itertuples(index=False, name=None))
    left = [job for job in jobs if (job.variant, job.seed) not in done]
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for job, rows in zip(left, pool.map(run, left), strict=True):
            rows.to_csv(options.out, mode="a", index=False, header=not options.out.exists())
            print(f"{job.variant}, seed {job.seed}: {summary(rows)}", flush=True)
    print_table(pd.read_csv(options.out))


def run(job: Job) -> pd.DataFrame:
    """Dice of every test case after each way of fine-tuning, with what pretraining measured of itself."""
    with tempfile.TemporaryDirectory() as folder:
        config = pretrain_config(job)
        state = pretrain(config, quiet())
        history = {name: value for _, name, value in state["progress"]["history"]}
        checkpoint = Path(folder) / "encoder.pth"
        save_weights(pretrained_sam(config, state), checkpoint)
        ways = [way for way in STRATEGIES if way != "full" or job.variant in WHOLE]
        tables = [few_shot_dice(job, checkpoint, way) for way in ways]
    kept = {name: history.get(name) for name in ("val/loss", "probe/dice", "features/effective_rank")}
    return pd.concat(tables, ignore_index=True).assign(variant=job.variant, seed=job.seed, **kept)


def pretrain_config(job: Job) -> PretrainConfig:
    """The settings of ray_configs/studies/hippocampus.yaml, shorter, with the variant's change."""
    tree: dict[str, Any] = {
        "out": "-",
        "data": {"store": str(job.store)},
        "model": {"variant": "micro", "image_size": job.image_size, "init_seed": job.seed},
        "mae": {"decoder_depth": 2, "decoder_dim": 128, "decoder_heads": 4},
        "optim": {
            "steps": job.steps,
            "batch_size": 32,
            "warmup_steps": 60,
            "validate_every": job.steps,
            "seed": job.seed,
        },
    }
    for group, changes in VARIANTS[job.variant].items():
        tree[group] = tree.get(group, {}) | changes
    return build_config(PretrainConfig, tree, source=job.variant)


def few_shot_dice(job: Job, checkpoint: Path, way: str) -> pd.DataFrame:
    """Dice of the test cases after fine-tuning on five patients, at the best validation."""
    tree = {
        "out": "-",
        "data": {"store": str(job.store), "shots": 5, "shot_seed": job.seed},
        "model": {"variant": "micro", "image_size": job.image_size, "checkpoint": str(checkpoint)},
        "strategy": STRATEGIES[way],
        "optim": {
            "steps": 120,
            "batch_size": 16,
            "warmup_steps": 15,
            "validate_every": 120,
            "lr": 1e-3 if way == "full" else 1e-2,
            "seed": job.seed,
        },
    }
    config = build_config(FinetuneConfig, tree, source=way)
    state = finetune(config, quiet())
    store = SliceStore(job.store)
    segmenter = build_segmenter(config.model, config.strategy, len(store.labels), job.seed)
    best = {
        name.removeprefix("segmenter."): value for name, value in state["progress"]["best_weights"].items()
    }
    put_weights(segmenter, best)
    cases = store.cases("test")[: job.cases]
    scores = case_dice(score_cases(segmenter, store, cases, job.image_size, torch.device("cpu")))
    return pd.DataFrame({"way": way, "case": scores.index, "dice": scores.to_numpy()})


class Quiet(LocalContext):
    """On the CPU, without lines of progress."""

    def progress(self, step: int, total: int, text: str) -> None:
        """Nothing: many runs go side by side."""


def quiet() -> Quiet:
    """A context of this process."""
    context = Quiet()
    context.device = torch.device("cpu")
    return context


def summary(rows: pd.DataFrame) -> str:
    """One run in a line."""
    dice = rows.groupby("way")["dice"].mean().round(3).to_dict()
    return json.dumps({"probe": round(float(rows["probe/dice"].iloc[0]), 3), **dice})


def print_table(rows: pd.DataFrame) -> None:
    """For each variant: probe, Dice of each way, and its paired difference to the default over cases."""
    both = rows.groupby(["variant", "way", "case"], as_index=False)["dice"].mean()  # over seeds
    wide = both.pivot(index=["way", "case"], columns="variant", values="dice")
    facts = rows.groupby("variant")[["val/loss", "probe/dice", "features/effective_rank"]].mean()
    print(f"{wide.loc['lora'].shape[0]} test cases, seeds {sorted(rows['seed'].unique().tolist())}")
    for variant in [name for name in VARIANTS if name in wide]:
        values = facts.loc[variant]
        line = f"| {variant} | {values['val/loss']:.3f} | {values['probe/dice']:.3f} | {values.iloc[2]:.1f} |"
        for way in [way for way in STRATEGIES if wide.loc[way, variant].notna().all()]:
            own, base = wide.loc[way, variant], wide.loc[way, BASE]
            line += f" {own.mean():.3f}"
            if variant != BASE:
                paired = paired_comparison(own.to_numpy(), base.to_numpy())
                line += f" ({paired.mean_difference:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}])"
            line += " |"
        print(line)


if __name__ == "__main__":
    main()

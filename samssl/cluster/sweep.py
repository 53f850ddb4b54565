"""A sweep: fine-tuning at many points of a search space, on the validation split; the best is tested once.

<out>/store/                           where the sweep prepares its data set itself
<out>/pretrain/<point>/seed<k>/        where it pretrains
<out>/trials/<point>/seed<k>/          a fine-tuning each
<out>/best/bundle, seed<k>/evaluate/   the best point's bundle, and its scores on the test split
<out>/trials.csv, best.json, report.html
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pandas as pd

from samssl.cluster.search import search
from samssl.cluster.space import Point, in_words, short_names
from samssl.cluster.stage import Place, stage
from samssl.cluster.stages import run_evaluate, run_prepare
from samssl.cluster.sweep_design import SweepConfig, point_folder
from samssl.cluster.trials import stage_record
from samssl.config import UserError
from samssl.evaluate import EvaluateConfig
from samssl.files import write_json, written_aside
from samssl.report.sweep import write_sweep_report


def run_sweep(config: SweepConfig) -> Path:
    """Run the trials that are not over yet, test the best point, and write the report; returns its path.

    Raises:
        UserError: no trial came to its end.
    """
    place = Place(experiment=config.name)
    with stage("sweep", config, {}, place, always=True) as work:
        place = replace(place, parent_run_id=work.run.run_id)
        if config.prepare:
            run_prepare(config.prepare, place)
        points = search(config, place)
        table = trial_table(config, points)
        best = best_point(table)
        if best is None:
            failures = "\n".join(f"  {row.point}: {row.error}" for row in table.itertuples())
            raise UserError(
                f"No trial of the sweep came to its end:\n{failures}\n"
                "Mend what these say; the same command tries them again."
            )
        tested = _test_best(config, next(point for point in points if in_words(point) == best), place)
        axes = dict(zip(config.space, short_names(list(config.space)), strict=True))
        page = write_sweep_report(config.out, config.name, table, axes, best, tested)
        validated = float(table[table["point"] == best]["score"].mean())
        work.metrics = {"best/val_dice": validated, "best/test_dice": fmean(tested.values())}
        for path in (page, config.out / "trials.csv"):
            work.run.log_file(path)
    print(
        f"\nBest:   {best}\nReport: {page}\nMLflow UI: mlflow ui --backend-store-uri {work.run.uri}",
        flush=True,
    )
    return page


def trial_table(config: SweepConfig, points: Sequence[Point]) -> pd.DataFrame:
    """One row a point and seed: its axes, how it ended, its score on the validation split, and its cost."""
    rows = []
    for point in points:
        for seed in config.seeds:
            folder = point_folder(config, point) / f"seed{seed}"
            record = stage_record(folder)
            metrics, gpus = record.get("metrics", {}), len(record.get("hardware", {}).get("gpus") or ())
            rows.append(
                {
                    "point": in_words(point),
                    **{name: point.get(name) for name in config.space},
                    "seed": seed,
                    "status": record.get("status", "not run"),
                    "score": metrics.get("best/val_dice"),
                    "best_step": metrics.get("best/step"),
                    "trained_parameters": metrics.get("trained_parameters"),
                    "seconds": record.get("wall_time_s"),
                    "device": "GPU" if gpus else "CPU",
                    "error": record.get("error", ""),
                    "run_id": record.get("run_id"),
                    "folder": folder.relative_to(config.out).as_posix(),
                }
            )
    return pd.DataFrame(rows)


def best_point(table: pd.DataFrame) -> str | None:
    """The point whose mean score is highest, of those that finished with every seed."""
    whole = table.groupby("point", sort=False).filter(lambda rows: bool((rows["status"] == "finished").all()))
    if whole.empty:
        return None
    return str(whole.groupby("point", sort=False)["score"].mean().idxmax())


def _test_best(config: SweepConfig, point: Point, place: Place) -> dict[int, float]:
    """Dice of the best point on the test split by seed; its best bundle is copied."""
    folder, scores = config.out / "best", dict[int, float]()
    for seed in config.seeds:
        bundle = point_folder(config, point) / f"seed{seed}" / "bundle"
        out = folder / f"seed{seed}" / "evaluate"
        settings = EvaluateConfig(out=out, bundle=bundle, store=config.finetune.data.store)
        run_evaluate(settings, replace(place, seed=seed, name=f"best, {in_words(point)} seed{seed}"))
        scores[seed] = stage_record(out)["metrics"]["test/dice"]
    trained = {seed: stage_record(point_folder(config, point) / f"seed{seed}") for seed in config.seeds}
    chosen = max(trained, key=lambda seed: trained[seed]["metrics"]["best/val_dice"])
    with written_aside(folder / "bundle") as partial_copy:
        shutil.copytree(point_folder(config, point) / f"seed{chosen}" / "bundle", partial_copy)
    write_json(config.out / "best.json", {"point": point, "seed": chosen, "test/dice": scores})
    return scores

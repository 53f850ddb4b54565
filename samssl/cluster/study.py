"""A study: every arm in every setting, over several seeds, and the reports that compare them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from samssl.cluster.dry_run import describe_study
from samssl.cluster.launch import Executor
from samssl.cluster.nnunet import NnunetConfig, run_nnunet
from samssl.cluster.stage import Place, StageRun, stage
from samssl.cluster.stages import run_evaluate, run_finetune, run_prepare, run_pretrain, run_simulate
from samssl.cluster.study_design import (
    ArmConfig,
    Setting,
    StudyConfig,
    alone,
    arm_folder,
    arms_of,
    expansive_of,
    finetune_of,
    pretrain_of,
    settings_of,
    start_folder,
)
from samssl.cluster.trials import Job, Outcome, run_jobs
from samssl.config import UserError, dump_yaml
from samssl.evaluate import EvaluateConfig
from samssl.files import read_json, write_text
from samssl.report.overview import SettingPage, write_overview
from samssl.report.page import ReportConfig, write_report
from samssl.train.finetune import FinetuneConfig

Run = tuple[Setting, str, ArmConfig, int]
"""One arm in one setting with one seed."""


def run_study(config: StudyConfig) -> Path | None:
    """Run whatever of the study is not finished yet, then write the reports.

    Returns the path of the report, or of the overview above the reports of several settings.

    Raises:
        UserError: some runs failed; the reports leave them out, and the same command tries them again.
    """
    if config.dry_run:
        print(describe_study(config), flush=True)
        return None
    place = Place(experiment=config.name)
    with stage("study", config, {}, place, always=True) as work:
        place = replace(place, parent_run_id=work.run.run_id)
        for setting in _by_home(config):
            if setting.chosen.simulate:
                run_simulate(setting.chosen.simulate)
            run_prepare(setting.prepare, replace(place, dataset=setting.dataset))
        failed = [outcome for outcome in _run_all(config, place) if outcome.error]
        page = _write_reports(config, work)
        if failed:
            raise UserError(_why_incomplete(failed))
    print(f"\nReport:    {page}\nMLflow UI: mlflow ui --backend-store-uri {work.run.uri}", flush=True)
    return page


def _write_reports(config: StudyConfig, work: StageRun) -> Path | None:
    """The report of each setting with finished runs, and where there are several the overview above them."""
    settings = settings_of(config)
    pages = [(setting, page) for setting in settings if (page := _report(config, setting))]
    for _, page in pages:
        work.metrics |= _metrics(config, page)
    if len(settings) == 1 or not pages:
        written = pages[0][1] if pages else None
    else:
        listed = [SettingPage(setting.label, setting.folder) for setting, _ in pages]
        arms = config.treatment, config.baseline
        written = write_overview(config.out, config.name, listed, *arms, config.published)
    for path in [written, written.with_name("summary.json")] if written else []:
        work.run.log_file(path)
    return written


def _by_home(config: StudyConfig) -> list[Setting]:
    """One setting of each home."""
    return list({setting.home: setting for setting in settings_of(config)}.values())


def _runs(config: StudyConfig) -> Iterator[Run]:
    for setting in settings_of(config):
        for seed in config.seeds:
            for name, arm in arms_of(config).items():
                yield setting, name, arm, seed


def _run_all(config: StudyConfig, place: Place) -> list[Outcome]:
    """What arms start from, then the arms themselves; an arm whose start failed is not run."""
    outcomes = []
    for init, job_of in (("ssl", _pretrain_job), ("expansive", _expansive_job)):
        runs = [run for run in _runs(config) if run[2].init == init and run[2].trainer == "samssl"]
        jobs = {start_folder(config, run[0], run[2], run[3]): job_of(config, run, place) for run in runs}
        outcomes += run_jobs(list(jobs.values()), config.out / "trials", init, config.trials_at_once)
    lost = {outcome.name for outcome in outcomes if outcome.error}
    jobs = [_arm_job(config, run, place) for run in _runs(config) if _start_name(config, run) not in lost]
    return outcomes + run_jobs(jobs, config.out / "trials", "arms", config.trials_at_once)


def _name(config: StudyConfig, folder: Path) -> str:
    return folder.relative_to(config.out).as_posix()


def _start_name(config: StudyConfig, run: Run) -> str | None:
    folder = start_folder(config, run[0], run[2], run[3])
    return _name(config, folder) if folder else None


def _pretrain_job(config: StudyConfig, run: Run, place: Place) -> Job:
    setting, _, arm, seed = run
    pretrain = pretrain_of(config, setting, arm, seed)
    place = replace(place, dataset=setting.dataset, seed=seed)
    work = partial(run_pretrain, pretrain, place)
    return Job(_name(config, pretrain.out), work, pretrain.out, pretrain.resources, [pretrain.out])


def _expansive_job(config: StudyConfig, run: Run, place: Place) -> Job:
    setting, _, arm, seed = run
    expansive = expansive_of(config, setting, arm, seed)
    place = replace(place, dataset=f"all but {setting.dataset}", seed=seed)
    work = partial(run_finetune, expansive, place)
    return Job(_name(config, expansive.out), work, expansive.out, expansive.resources, [expansive.out])


def _arm_job(config: StudyConfig, run: Run, place: Place) -> Job:
    setting, name, arm, seed = run
    folder = arm_folder(setting, name, seed)
    place = replace(place, arm=name, dataset=setting.dataset, shots=setting.shots, seed=seed)
    if arm.trainer == "nnunet":
        nnunet = _nnunet_of(config, setting, folder / "evaluate", seed)
        work: Callable[[Executor], Any] = partial(_run_nnunet, nnunet, place)
        return Job(_name(config, folder), work, folder, config.finetune.resources, [nnunet.out])
    finetune = finetune_of(config, setting, name, seed)
    scored = (folder / "evaluate", config.surface_tolerance_mm)
    work = partial(_finetune_and_evaluate, finetune, *scored, place)
    return Job(_name(config, folder), work, folder, finetune.resources, [finetune.out, folder / "evaluate"])


def _nnunet_of(config: StudyConfig, setting: Setting, out: Path, seed: int) -> NnunetConfig:
    return NnunetConfig(
        out=out,
        store=setting.store,
        shots=setting.shots,
        shot_seed=seed,
        device=config.nnunet_device,
        surface_tolerance_mm=config.surface_tolerance_mm,
    )


def _run_nnunet(config: NnunetConfig, place: Place, executor: Executor) -> None:
    """nnU-Net runs in processes of its own, whatever the executor."""
    run_nnunet(config, place)


def _finetune_and_evaluate(
    config: FinetuneConfig, out: Path, tolerance_mm: float, place: Place, executor: Executor
) -> None:
    bundle, store = run_finetune(config, place, executor), config.data.store
    scored = EvaluateConfig(out=out, bundle=bundle, store=store, surface_tolerance_mm=tolerance_mm)
    run_evaluate(scored, place, executor)


def _report(config: StudyConfig, setting: Setting) -> Path | None:
    """The page of one setting; None where no run of it has finished."""
    if setting.folder != config.out:
        write_text(setting.folder / "config.yaml", dump_yaml(alone(config, setting)))
    if not any((setting.folder / "arms").glob("*/seed*/evaluate/cases.parquet")):
        return None
    compared = ReportConfig(study=setting.folder, baseline=config.baseline, treatment=config.treatment)
    return write_report(compared)


def _metrics(config: StudyConfig, page: Path) -> dict[str, float]:
    """The results of one setting by metric name, for MLflow."""
    summary, within = read_json(page.with_name("summary.json")), page.parent.relative_to(config.out)
    metrics = {f"{arm}/test/dice": entry["test/dice"] for arm, entry in summary["arms"].items()}
    if summary.get("paired"):
        metrics |= {f"paired/{name}": summary["paired"][name] for name in ("mean_difference", "wilcoxon_p")}
    return {(within / name).as_posix(): value for name, value in metrics.items() if value is not None}


def _why_incomplete(failed: Sequence[Outcome]) -> str:
    reasons = "\n".join(f"  {outcome.name}: {outcome.error}" for outcome in failed)
    return (
        f"{len(failed)} run(s) of the study failed:\n{reasons}\n"
        "The reports are written without them. The same command tries them again, and nothing else."
    )

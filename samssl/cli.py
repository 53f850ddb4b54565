"""The command line: `samssl <stage> --config FILE a.b=c`. `python pipelines/<stage>.py` is the same."""

import argparse
import importlib
import importlib.metadata
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samssl.commands import STAGES
from samssl.config import UserError, describe, flatten, load_config, parse_overrides, read_yaml
from samssl.examples import example
from samssl.shipped import DEMO, JOBS_GPU, config_file

BEGIN = """to begin:
  samssl doctor              is this machine ready?
  samssl demo                everything once, on simulated subjects
  samssl COMMAND --help      settings of a command, with examples at its end
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a `UserError` is one message on stderr and exit code 1."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and parsed.run is _run_stage and not any(argument.startswith("-") for argument in rest):
        parsed.overrides, rest = [*parsed.overrides, *rest], []  # those after an option
    if rest and parsed.run is not _run_bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    parsed.rest = rest
    try:
        parsed.run(parsed)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("Interrupted. What is finished is kept; the same command goes on from there.", code=130)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}. What is finished is kept; mend this and run it again.")
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "mlflow":
            raise
        _fail(f"MLflow refused: {str(error).splitlines()[0]} Check MLFLOW_TRACKING_URI and run this again.")


def run_pipeline(stage: str) -> None:
    """`python pipelines/<stage>.py ...`."""
    main([stage, *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="samssl",
        description="Self-supervised pretraining and few-shot fine-tuning of SAM for radiology.",
        epilog=BEGIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"samssl {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, stage in STAGES.items():
        command = commands.add_parser(name, help=stage.help, description=stage.help, add_help=False)
        command.add_argument("--config", type=config_file, help="YAML file with the fields below")
        command.add_argument("--out", metavar="DIR", help="the same as out=DIR")
        command.add_argument("--help", "-h", action="store_true", help="show this page")
        command.add_argument("overrides", nargs="*", metavar="field=value", help="as in optim.lr=3e-4")
        command.set_defaults(run=_run_stage, stage=stage, parser=command, name=name)
    _add_demo(commands)
    _add_submit(commands)
    _add_plan(commands)
    _add_strategies(commands)
    _add_datasets(commands)
    bench = commands.add_parser("bench", help="time this program against its baselines", add_help=False)
    bench.add_argument("name", nargs="?", help="a file of benchmarks/, as in pretrain")
    bench.set_defaults(run=_run_bench)
    lineage = commands.add_parser(
        "lineage", help="print the chain behind an encoder, bundle, export or run, every digest re-checked"
    )
    lineage.add_argument(
        "start",
        metavar="PATH_OR_RUN_ID",
        help="path of an encoder, bundle, export or stage folder, models:/NAME@ALIAS, or an MLflow run id",
    )
    lineage.set_defaults(run=_run_lineage)
    _add_promote(commands)
    _add_doctor(commands)
    _add_completion(commands, parser)
    for name, command in commands.choices.items():
        if name not in STAGES:
            command.epilog = example(name)
            command.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _add_demo(commands: Any) -> None:
    text = "the whole study on simulated subjects: ten minutes on two cores, no data needed"
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("overrides", nargs="*", metavar="field=value", help="as for `samssl study`")
    demo.set_defaults(
        run=_run_stage, stage=STAGES["study"], config=config_file(str(DEMO)), help=False, out=None
    )


def _add_doctor(commands: Any) -> None:
    text = "whether this machine can run samssl, and what to do where it cannot"
    doctor = commands.add_parser("doctor", help=text, description=f"{text}; exit code 1 where it cannot")
    doctor.add_argument("--ray", action="store_true", help="also start Ray or join a cluster, and run a task")
    doctor.set_defaults(run=_run_doctor)


def _run_doctor(parsed: argparse.Namespace) -> None:
    text, healthy = _load("samssl.cluster.doctor:describe_health")(parsed.ray)
    print(text)
    if not healthy:
        raise SystemExit(1)


def _add_completion(commands: Any, parser: argparse.ArgumentParser) -> None:
    text = "print what lets the Tab key of bash or zsh complete commands, options and fields"
    completion = commands.add_parser("completion", help=text, description=text)
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(run=_run_completion, parser=parser)


def _run_completion(parsed: argparse.Namespace) -> None:
    stages = {**STAGES, "demo": STAGES["study"], "plan": STAGES["pretrain"]}
    listed = {name: [entry.name for entry in describe(_load(stage.config))] for name, stage in stages.items()}
    fields = {name: [field for field in names if ".NAME." not in field] for name, names in listed.items()}
    print(_load("samssl.completion:completion_script")(parsed.parser, parsed.shell, fields))


def _add_submit(commands: Any) -> None:
    text = "a stage as a job of a Ray cluster, by the `ray job submit` that is printed"
    submit = commands.add_parser("submit", help=text, description=text)
    stages = submit.add_subparsers(metavar="STAGE", required=True)
    for name, stage in STAGES.items():
        command = stages.add_parser(name, help=stage.help, description=f"{text}: {stage.help}")
        command.add_argument("--config", type=config_file, help=f"YAML file of `samssl {name}`")
        address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
        command.add_argument("--address", default=address, help="the cluster's dashboard [%(default)s]")
        file = config_file(str(JOBS_GPU))
        command.add_argument("--runtime-env", type=config_file, default=file, help=f"YAML file [{JOBS_GPU}]")
        command.add_argument("--no-wait", action="store_true", help="do not show the job's output")
        command.add_argument("overrides", nargs="*", metavar="field=value", help="as in optim.lr=3e-4")
        command.set_defaults(run=_run_submit, stage=name)


def _add_plan(commands: Any) -> None:
    text = "memory and time per step of a pretrain run, before it is started"
    plan = commands.add_parser("plan", help=text, description=text)
    plan.add_argument("--config", type=config_file, help="YAML file of `samssl pretrain`")
    plan.add_argument("--gib", type=float, help="memory of one GPU; without it, this machine is planned for")
    plan.add_argument("--tflops", type=float, help="peak of one GPU in the run's precision, in 1e12 FLOP/s")
    plan.add_argument("--utilisation", type=float, default=0.35, help="share of that peak that is reached")
    plan.add_argument("overrides", nargs="*", metavar="field=value", help="as in optim.batch_size=4")
    plan.set_defaults(run=_run_plan)


def _add_promote(commands: Any) -> None:
    text = "point an alias of the model registry to a bundle or an encoder"
    promote = commands.add_parser("promote", help=text, description=text)
    promote.add_argument(
        "target",
        metavar="RUN_OR_PATH",
        help="MLflow run id, path of a bundle, encoder or stage folder, or models:/NAME/VERSION",
    )
    promote.add_argument(
        "--alias", default="champion", help="name that moves on, as in models:/NAME@champion"
    )
    promote.set_defaults(run=_run_promote)


def _run_promote(parsed: argparse.Namespace) -> None:
    print(_load("samssl.cluster.promote:promote")(parsed.target, parsed.alias))


def _add_strategies(commands: Any) -> None:
    text = "the fine-tuning strategies: what trains, where, and the memory that it takes"
    table = commands.add_parser("strategies", help=text, description=text)
    table.add_argument("--all", action="store_true", help="with vit_l, micro, bitfit and norm, beyond the 18")
    table.add_argument("--profile", choices=("fixed", "paper"), default="fixed", help="`strategy.profile`")
    table.set_defaults(run=_run_strategies)


def _add_datasets(commands: Any) -> None:
    text = "the public data sets that `data.recipe` knows"
    datasets = commands.add_parser("datasets", help=text, description=text)
    datasets.add_argument("name", nargs="?", help="show all that is known of this one")
    datasets.set_defaults(run=_run_datasets)
    text = "get a public data set, where its licence allows it: checked, and unpacked into a folder"
    download = commands.add_parser("download", help=text, description=text)
    download.add_argument("name", help="as `samssl datasets` lists it")
    download.add_argument("folder", type=Path, help="is made where there is none")
    download.set_defaults(run=_run_download)


def _run_datasets(parsed: argparse.Namespace) -> None:
    print(_load("samssl.data.recipe_tables:describe_recipes")(parsed.name))


def _run_download(parsed: argparse.Namespace) -> None:
    print(f"download: {_load('samssl.data.download:download')(parsed.name, parsed.folder)}")


def _run_strategies(parsed: argparse.Namespace) -> None:
    print(_load("samssl.train.catalogue:describe_strategies")(parsed.all, parsed.profile))


def _run_plan(parsed: argparse.Namespace) -> None:
    overrides = parse_overrides(parsed.overrides)
    given = flatten(read_yaml(parsed.config)) if parsed.config else {}
    overrides |= {name: "-" for name in ("out", "data.store") if name not in given | overrides}
    config = load_config(_load("samssl.train.pretrain:PretrainConfig"), parsed.config, overrides)
    print(_load("samssl.train.plan:describe_plan")(config, parsed.gib, parsed.tflops, parsed.utilisation))


def _run_stage(parsed: argparse.Namespace) -> None:
    config_class = _load(parsed.stage.config)
    if parsed.help:
        print("\n".join((parsed.parser.format_help(), _list_fields(config_class), "", example(parsed.name))))
        return
    arguments = [*parsed.overrides, *([f"out={parsed.out}"] if parsed.out else [])]
    if parsed.config is None and not arguments:
        raise UserError(
            f"`samssl {parsed.name}` needs its settings: give --config FILE, or fields as name=value. "
            f"`samssl {parsed.name} --help` lists them and ends with examples."
        )
    overrides = _named(arguments, parsed.stage.sources)
    _load(parsed.stage.function)(load_config(config_class, parsed.config, overrides))


def _named(arguments: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    """`samssl prepare FOLDER` as `data.root=FOLDER`, `samssl predict B S T` as `bundle=B scans=[S, T]`."""
    if not sources:
        return parse_overrides(arguments)
    bare = [argument for argument in arguments if "=" not in argument]
    overrides = parse_overrides([argument for argument in arguments if "=" in argument])
    overrides |= dict(zip(sources, bare, strict=False))
    if len(sources) > 1 and len(bare) >= len(sources):
        overrides[sources[-1]] = bare[len(sources) - 1 :]
    elif len(bare) > len(sources):
        raise UserError(f"'{bare[1]}' is one too many: give one {sources[0]}, and all else as field=value.")
    return overrides


def _run_submit(parsed: argparse.Namespace) -> None:
    submission = _load("samssl.cluster.submit:Submission")(
        stage=parsed.stage,
        config_class=_load(STAGES[parsed.stage].config),
        config=parsed.config,
        overrides=parsed.overrides,
        address=parsed.address,
        runtime_env=parsed.runtime_env,
        wait=not parsed.no_wait,
    )
    code = _load("samssl.cluster.submit:submit")(submission)
    if code:
        raise SystemExit(code)


def _run_bench(parsed: argparse.Namespace) -> None:
    """`benchmarks/NAME.py` with the arguments that follow the name."""
    folder = Path(__file__).parents[1] / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py"))
    if not names:
        raise UserError(
            f"There is no folder {folder}: benchmarks come with the source code, not the package."
        )
    if parsed.name not in names:
        raise UserError(f"Give the name of a benchmark: {', '.join(names)}.")
    sys.argv = [f"samssl bench {parsed.name}", *parsed.rest]
    sys.path.insert(0, str(folder))  # as `python benchmarks/NAME.py` has it: they share functions
    runpy.run_path(str(folder / f"{parsed.name}.py"), run_name="__main__")


def _run_lineage(parsed: argparse.Namespace) -> None:
    text, unbroken = _load("samssl.cluster.lineage:describe_lineage")(parsed.start)
    print(text)
    if not unbroken:
        raise SystemExit(1)


def _version() -> str:
    try:
        return importlib.metadata.version("samssl")
    except importlib.metadata.PackageNotFoundError:
        return "from a folder, not installed"


def _load(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _list_fields(config_class: type) -> str:
    """Every field: dotted name, type, default, then what it means."""
    lines = ["fields:"]
    for entry in describe(config_class):
        lines += [f"  {entry.name}  <{entry.type}>  [{entry.default}]", f"      {entry.help}"]
    return "\n".join(lines)


def _fail(message: str, code: int = 1) -> None:
    sys.stderr.write(f"samssl: {message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
    os._exit(code) if code == 130 else sys.exit(code)

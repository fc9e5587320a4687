"""The command: nemo-align <verb> [overrides].

Composes and checks the configuration once, without torch; writes it to <run_dir>/config.yaml; then runs the verb: in
worker processes that it starts itself, or, under torchrun and inside an srun step, in this process.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_align.config.errors import raised_by_this_package
from nemo_align.config.help import VERB_LINES, overview

if TYPE_CHECKING:
    from nemo_align.runtime.launch_environment import LaunchEnvironment

SUCCESS, USER_ERROR, INTERRUPTED = 0, 2, 130  # of runtime/exit_codes.py; help must not import more than it needs
_FLAGS = ("--help", "-h", "--multirun", "-m", "--resolve")
_WITH_VALUE = {
    "--cfg": "--cfg",
    "-c": "--cfg",
    "--config-dir": "--config-dir",
    "-cd": "--config-dir",
    "--package": "--package",
    "-p": "--package",
}
_WITHOUT_WORKERS = {
    "convert": ("nemo_align.checkpoint.conversion.convert", "convert"),
    "merge": ("nemo_align.checkpoint.conversion.merge", "merge"),
    "inspect": ("nemo_align.checkpoint.conversion.inspect", "inspect"),
    "plan": ("nemo_align.planning.plan", "plan"),
}
_WITHOUT_RUN_DIR = ("inspect", "plan")
_CLAIM_SECONDS = 300.0  # for rank 0 to write config.yaml: thousands of ranks start within minutes, not at once
_RANK_0_FIRST_SECONDS = 10.0
_WORKERS_PER_CORE, _SOME_WORKERS = 4, 16


@dataclass
class Options:
    """The command line without its verb."""

    overrides: list[str] = field(default_factory=list)
    help: bool = False
    multirun: bool = False
    cfg: str | None = None  # job | hydra | all
    info: str | None = None
    package: str | None = None  # part of the configuration that --cfg job prints
    config_dirs: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (0; 2 for a mistake of the user; else a worker's)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except ValueError as error:  # ConfigError too
        if not raised_by_this_package(error):
            raise
        _print_error(error, _after_rank_0())
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `nemo-align --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(overview(), flush=True)
        return SUCCESS
    if arguments[0] == "--version":
        from nemo_align import __version__

        print(f"nemo-align {__version__}")
        return SUCCESS
    verb, options = _verb(arguments[0]), parse_options(arguments[1:])
    if options.config_dirs:
        _use_config_dirs(options.config_dirs)
    if options.help:
        from nemo_align.config.help import verb_help

        print(verb_help(verb), flush=True)
        return SUCCESS
    if verb == "plan" and (options.multirun or options.info is not None or options.cfg in ("hydra", "all")):
        raise ValueError(
            "plan composes a stage of another verb: for Hydra's view ask that verb (`nemo-align pretrain --info`); to "
            "compare layouts use search=true"
        )
    if verb == "doctor" and (options.multirun or options.info is not None or options.cfg is not None):
        raise ValueError(
            "doctor has no configuration of its own: ask the verb of the stage (`nemo-align sft --cfg job`)"
        )
    if options.info is not None or options.cfg in ("hydra", "all"):
        from nemo_align.config import hydra_main

        if options.multirun:
            raise ValueError("--multirun goes with --cfg job only: --info and --cfg hydra show one run, leave it out")
        option, what = ("--info", options.info) if options.info is not None else ("--cfg", options.cfg)
        hydra_main.show(verb, option, what or "all", options.overrides)
        return SUCCESS
    if options.multirun:
        return _sweep(verb, options)
    if options.cfg is not None:
        return _print_config(verb, options.overrides, options.package)
    return run(verb, options.overrides)


def run(verb: str, overrides: list[str]) -> int:
    """Compose, check, and run a verb; returns the exit code."""
    from nemo_align.config.compose import compose

    environment = _launched_by()
    if verb == "doctor":
        if environment is not None:
            _accept_signals()  # there is nothing to save
        return importlib.import_module("nemo_align.preflight.doctor").main(overrides, environment)
    config = compose(verb, overrides)
    if verb == "pipeline":
        return importlib.import_module("nemo_align.pipeline.run").main(config, overrides)
    if getattr(config, "dry_run", False):
        return _dry_run(verb, config, environment)
    if verb in _WITHOUT_WORKERS:
        from nemo_align.runtime import logs

        if verb not in _WITHOUT_RUN_DIR:
            logs.setup(config.run_dir, rank=0)
        logs.quiet_libraries()
        module, function = _WITHOUT_WORKERS[verb]
        result = getattr(importlib.import_module(module), function)(config)
        return result if verb == "plan" else SUCCESS  # a plan's is an exit code
    if not any(text.lstrip("+").startswith("gpus=") for text in overrides):
        config.gpus = None  # a recipe's, for dry runs and plans: a run takes what it is started on
    return _run_here(verb, config, environment) if environment else _start_workers(verb, config)


def parse_options(arguments: Sequence[str]) -> Options:
    """Options and overrides, in any order.

    Raises:
        ValueError: an unknown option, or one without its value.
    """
    options, rest = Options(), list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            options.overrides.append(argument)
        elif name in ("--help", "-h"):
            options.help = True
        elif name in ("--multirun", "-m"):
            options.multirun = True
        elif name in ("--info", "-i"):
            options.info = value if equals else rest.pop(0) if rest and _is_word(rest[0]) else "all"
        elif name in _WITH_VALUE:
            if not equals and not rest:
                raise ValueError(f"{name} needs a value")
            value = value if equals else rest.pop(0)
            if _WITH_VALUE[name] == "--config-dir":
                options.config_dirs.append(value)
            elif _WITH_VALUE[name] == "--package":
                options.package = value
            elif value not in ("job", "hydra", "all"):
                raise ValueError(f"--cfg {value}: must be job, hydra or all")
            else:
                options.cfg = value
        elif name != "--resolve":  # what --cfg job prints is always resolved
            from nemo_align.config.suggest import did_you_mean

            raise ValueError(f"unknown option '{argument}'{did_you_mean(name, [*_FLAGS, *_WITH_VALUE, '--info'])}")
    return options


def _verb(word: str) -> str:
    if word in VERB_LINES:
        return word
    from nemo_align.config.suggest import did_you_mean

    guess = did_you_mean(word, VERB_LINES) or "."
    raise ValueError(f"unknown verb '{word}'{guess} Verbs: {', '.join(VERB_LINES)}; see `nemo-align --help`")


def _is_word(text: str) -> bool:
    return text in ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def _use_config_dirs(folders: list[str]) -> None:
    """In the environment, so that the stages of a pipeline find the user's YAML too."""
    from nemo_align.config.sources import CONFIG_DIRS_VARIABLE

    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"--config-dir {folder}: no such folder")
    inherited = os.environ.get(CONFIG_DIRS_VARIABLE)
    absolute = [str(Path(folder).resolve()) for folder in folders]
    os.environ[CONFIG_DIRS_VARIABLE] = os.pathsep.join([*absolute, *([inherited] if inherited else [])])


def _print_config(verb: str, overrides: list[str], package: str | None) -> int:
    from nemo_align.config.compose import compose, to_yaml

    print(to_yaml(compose(verb, overrides), package), end="", flush=True)
    return SUCCESS


def _print_error(error: ValueError, job: str = "") -> None:
    """Every problem with its own `error:`; lines that belong to the one above them are indented."""
    for line in str(error).splitlines():
        print(line if line.startswith("  ") else f"error: {job}{line}", file=sys.stderr, flush=True)


def _sweep(verb: str, options: Options) -> int:
    """Every combination of the values, one after the other: run, or with --cfg job printed as a YAML document."""
    from nemo_align.config import hydra_main

    return hydra_main.multirun(verb, options.overrides, lambda name, texts: _run_job(verb, name, texts, options))


def _run_job(verb: str, name: str, overrides: list[str], options: Options) -> int:
    """One job of a sweep, in <run_dir>/<name>."""
    from nemo_align.config.compose import ConfigError, compose

    try:
        run_dir = f"{compose(verb, overrides).run_dir}/{name}"
        texts = [*overrides, f'run_dir="{run_dir}"']
        if options.cfg is not None:
            print(f"---\n# {name}", flush=True)
            return _print_config(verb, texts, options.package)
        print(f"{name} in {run_dir}", flush=True)
        code = run(verb, texts)
    except ConfigError as error:
        _print_error(error, f"{name}: ")
        return USER_ERROR
    if code == INTERRUPTED:  # Ctrl-C ends the sweep, not only its job
        raise KeyboardInterrupt
    return code


def _launched_by() -> LaunchEnvironment | None:
    """torchrun's or SLURM's environment. Under them a request to stop, which may come at any moment, waits from here on
    for the worker's handlers."""
    from nemo_align.runtime import launch_environment

    environment = launch_environment.detect()
    if environment is not None:
        import signal

        from nemo_align.runtime.signals import STOP_SIGNALS

        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    return environment


def _accept_signals() -> None:
    import signal

    from nemo_align.runtime.signals import STOP_SIGNALS

    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _after_rank_0() -> str:
    """All ranks of a job usually meet the same mistake, and thousands of messages hide it. Rank 0 says it at once and
    ends; the launcher then ends the others, unless theirs is another mistake and they live to say it: with this prefix,
    since it may be one of their node (data that is not there)."""
    from nemo_align.runtime import launch_environment

    try:
        environment = launch_environment.detect()
    except ValueError:  # the launcher's variables are the mistake
        return ""
    if environment is None or environment.rank == 0:
        return ""
    _accept_signals()
    time.sleep(_RANK_0_FIRST_SECONDS)
    return f"rank {environment.rank} on {launch_environment.node_name()}: "


def _dry_run(verb: str, config: Any, environment: LaunchEnvironment | None) -> int:
    """Print what the run would do. Of the ranks of a job, rank 0 does."""
    from nemo_align.dry_run import without_gpu
    from nemo_align.runtime import logs

    if environment is not None:
        _accept_signals()
        if environment.rank > 0:
            return SUCCESS
    without_gpu()
    logs.quiet_libraries()
    from nemo_align.dry_run.run import dry_run

    launched = environment.world_size if environment is not None else None
    print(dry_run(verb, config, launched=launched), end="", flush=True)
    return SUCCESS


def _run_here(verb: str, config: Any, environment: LaunchEnvironment) -> int:
    """This process is one rank of a job that torchrun or srun started."""
    from nemo_align import worker
    from nemo_align.config import run_directory
    from nemo_align.config.compose import to_yaml
    from nemo_align.config.job_size import check_started
    from nemo_align.config.validation import check_data_parallel, check_world_size

    check_started(config, environment.world_size)
    check_data_parallel(config, check_world_size(config.parallel, environment.world_size))
    run_dir = Path(config.run_dir)
    if environment.rank == 0:
        with run_directory.exclusive(run_dir):
            _claim(verb, config)
            return worker.main(verb, str(run_dir / run_directory.CONFIG_FILE))
    _accept_signals()  # if rank 0 refuses, the launcher ends us: nothing is there to be saved yet
    run_directory.wait_for(verb, run_dir, to_yaml(config), _CLAIM_SECONDS)
    return worker.main(verb, str(run_dir / run_directory.CONFIG_FILE))


def _start_workers(verb: str, config: Any) -> int:
    """A bare command: one worker per GPU; without a GPU, tensor x pipeline x data of them."""
    from nemo_align.config.job_size import check_started
    from nemo_align.config.run_directory import CONFIG_FILE, exclusive
    from nemo_align.config.validation import check_accelerator, check_data_parallel
    from nemo_align.runtime import local_launch

    parallel, num_gpus = config.parallel, local_launch.number_of_gpus()
    check_accelerator(config.precision, num_gpus)
    cell = parallel.tensor * parallel.pipeline
    data = parallel.data or max(1, num_gpus // cell)
    num_workers = cell * data
    _refuse_too_many(num_workers, num_gpus)
    check_started(config, num_workers)
    check_data_parallel(config, data)
    run_dir = Path(config.run_dir)
    with exclusive(run_dir):
        _claim(verb, config)
        return local_launch.launch(
            [sys.executable, "-m", "nemo_align.worker", verb, str(run_dir / CONFIG_FILE)],
            num_workers,
            run_dir / "logs",
            run_dir=run_dir,
            max_restarts=config.runtime.max_restarts,
            hang_seconds=60.0 * config.runtime.hang_timeout_minutes,
        )


def _refuse_too_many(num_workers: int, num_gpus: int) -> None:
    remedy = "choose a smaller layout (parallel=single), or start it on the cluster with slurm/train.sbatch"
    if num_gpus and num_workers > num_gpus:
        raise ValueError(f"the layout needs {num_workers} GPUs and this machine has {num_gpus}: {remedy}")
    most = max(_SOME_WORKERS, _WORKERS_PER_CORE * (os.cpu_count() or 1))
    if not num_gpus and num_workers > most:
        raise ValueError(f"the layout needs {num_workers} workers, too many for a machine without a GPU: {remedy}")


def _claim(verb: str, config: Any) -> None:
    from nemo_align.checkpoint.layout import refuse_layout
    from nemo_align.config import run_directory
    from nemo_align.config.compose import to_yaml

    run_dir, text, same_run = Path(config.run_dir), to_yaml(config), run_directory.may_change(verb, config)
    if (path := run_dir / run_directory.CONFIG_FILE).exists():
        run_directory.refuse_other(verb, path, text, same_run)
        refuse_layout(run_dir, config.parallel)  # before config.yaml names a layout that the run never had
    for difference in run_directory.claim(verb, run_dir, text, same_run):
        print(f"note: resuming with another layout: {run_directory.describe(difference)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

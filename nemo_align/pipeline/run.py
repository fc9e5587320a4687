"""`nemo-align pipeline`: runs or submits the stages that are not done, and keeps manifest.json."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nemo_align.config.compose import ConfigError, compose
from nemo_align.config.job_size import num_nodes
from nemo_align.config.pipeline import PipelineConfig
from nemo_align.config.run_directory import exclusive, made
from nemo_align.pipeline import dry_runs, slurm
from nemo_align.pipeline.chain import Stage, build_chain, compose_chain
from nemo_align.pipeline.leads import Lead, leads, warning
from nemo_align.pipeline.local import LocalRunner, command
from nemo_align.pipeline.manifest import Manifest, read_manifest, update
from nemo_align.pipeline.resume import config_hash, is_complete, log_file, output_identity, stages_to_run
from nemo_align.pipeline.stage_ends import record_end, refresh_records
from nemo_align.pipeline.summary import summarize
from nemo_align.runtime import exit_codes
from nemo_align.training.result import read_result


def main(config: PipelineConfig, raw_overrides: Sequence[str] = ()) -> int:
    """Run the chain; starting the same command again goes on where it stopped.

    `raw_overrides`: of the command line, recorded in the manifest.

    Returns:
        SUCCESS; STOPPED if a signal stopped it after saving; else the exit code of the stage that failed.

    Raises:
        ValueError: a mistake in any stage, found before the first starts; stages in the folder that do not fit.
    """
    run_dir = Path(config.run_dir)
    stages = build_chain(config)
    with nullcontext() if config.dry_run else exclusive(run_dir):
        finished = {stage.name for stage in stages if is_complete(stage)}
        configs = compose_chain(stages, finished, check_files=config.dry_run_strict or not config.dry_run)
        manifest = update(
            read_manifest(run_dir),
            config.experiment,
            list(raw_overrides),
            [(stage.name, stage.verb, stage.run_dir) for stage in stages],
        )
        todo = stages_to_run(stages, configs, manifest)
        for stage in stages:
            if stage not in todo:
                _take_over(stage, manifest, configs[stage.name])
        by_slurm = config.cluster.kind == "slurm"
        found = leads(todo, configs, config.cluster) if by_slurm else {}
        if said := warning(found):
            print(f"warning: {said}", file=sys.stderr, flush=True)
        if config.dry_run:
            _print_commands(config, todo, configs, found)
            return dry_runs.run(run_dir, todo, configs, config.cluster, found)
        if by_slurm:
            return _submit(config, todo, configs, found, manifest)
        manifest.write(run_dir)
        return _run_here(run_dir, stages, todo, manifest)


def _run_here(run_dir: Path, stages: list[Stage], todo: list[Stage], manifest: Manifest) -> int:
    runner = LocalRunner()
    with runner.handling_signals():
        for number, stage in enumerate(stages, start=1):
            title = f"stage {number} of {len(stages)}: {stage.name} ({stage.verb})"
            if stage not in todo:
                _say(f"{title}: complete")
                continue
            _say(title)
            code = _run_stage(stage, runner, manifest, run_dir)
            status = manifest[stage.name].status
            if status == "stopped" or (runner.stopped and stage is not todo[-1]):
                _say("stopped; the same command goes on from here")
                return code or exit_codes.STOPPED_AFTER_SAVING
            if status == "failed":
                how = "made no progress" if code == exit_codes.HUNG else "failed"
                reason = manifest[stage.name].reason
                _say(
                    f"stage {stage.name} {how} (exit code {code})"
                    + (f": {reason}\n" if reason else ", ")
                    + f"see {log_file(stage)}; the same command resumes it"
                )
                summarize(run_dir, manifest)
                return code
        summarize(run_dir, manifest)
    return exit_codes.SUCCESS


def _run_stage(stage: Stage, runner: LocalRunner, manifest: Manifest, run_dir: Path) -> int:
    """Run one stage to its end and record it; returns its exit code, never 0 unless it is complete."""
    # Composed once more, now that what it reads is there: a mistake that only files can show is named here.
    config = compose(stage.verb, stage.arguments)
    record = manifest[stage.name]
    record.restarts += record.status != "pending"
    record.status = "running"
    record.config_hash = config_hash(config)
    record.input = config.checkpoint.init_from
    record.inputs = _inputs(stage, manifest)
    manifest.write(run_dir)
    begin = time.monotonic()
    code = runner.run(stage)
    record.seconds += time.monotonic() - begin
    record.exit_code = code
    if code == exit_codes.SUCCESS and is_complete(stage):
        _take_over(stage, manifest, config)
    elif runner.stopped or code in (exit_codes.STOPPED_AFTER_SAVING, exit_codes.INTERRUPTED):
        record.status = "stopped"
    else:
        record.status = "failed"
        code = code or exit_codes.FAILURE  # ended well, but without a result
    record_end(record)
    manifest.write(run_dir)
    return code


def _take_over(stage: Stage, manifest: Manifest, config: Any) -> None:
    """Record a complete stage. What an earlier process could not write down before it died is found again."""
    record = manifest[stage.name]
    result = read_result(stage.run_dir)
    assert result is not None
    record.finish(result)
    record.identity = output_identity(stage) or record.identity
    record.config_hash = record.config_hash or config_hash(config)
    record.inputs = record.inputs or _inputs(stage, manifest)


def _inputs(stage: Stage, manifest: Manifest) -> dict[str, str]:
    return {name: identity for name in stage.depends_on if (identity := manifest[name].identity)}


def _submit(
    config: PipelineConfig, todo: list[Stage], configs: dict[str, Any], found: dict[str, Lead], manifest: Manifest
) -> int:
    run_dir = Path(config.run_dir)
    refresh_records(manifest, [stage.name for stage in todo])
    waiting = {stage.name: job_id for stage in todo if (job_id := manifest[stage.name].job_id) and slurm.queued(job_id)}
    if waiting:
        jobs = ", ".join(f"{name} (job {job_id})" for name, job_id in waiting.items())
        raise ConfigError(
            f"still queued or running: {jobs}. Wait for them, or scancel {' '.join(waiting.values())} first"
        )
    jobs: dict[str, slurm.Job] = {}
    for stage in todo:
        parallel, after = configs[stage.name].parallel, [name for name in stage.depends_on if name in jobs]
        argv = slurm.submission(
            stage,
            parallel,
            config.cluster,
            pipeline=config.experiment,
            after=[jobs[name].id for name in after],
            lead=found[stage.name].seconds,
        )
        nodes, _ = num_nodes(config.cluster, parallel)
        with made(stage.run_dir):  # SLURM opens the job's output file before the job starts
            job_id = _submitted(argv, config, jobs)
        jobs[stage.name] = slurm.Job(job_id, nodes, after)
        record = manifest[stage.name]
        record.status, record.job_id, record.reason = "pending", jobs[stage.name].id, None
        manifest.write(run_dir)  # after each: jobs already queued are never forgotten
    if not jobs:
        manifest.write(run_dir)
        summarize(run_dir, manifest)
        return exit_codes.SUCCESS
    ids = [job.id for job in jobs.values()]
    last = slurm.summary_submission(run_dir, config.cluster, pipeline=config.experiment, after=ids)
    jobs["summary"] = slurm.Job(_submitted(last, config, jobs), 1, ["all of them, however they end"])
    print(slurm.table(jobs))
    return exit_codes.SUCCESS


def _submitted(argv: list[str], config: PipelineConfig, jobs: dict[str, slurm.Job]) -> str:
    """The id of the job. Raises ValueError if SLURM refuses it, with the `jobs` that it has taken before."""
    try:
        return slurm.submit(argv, config.cluster)
    except ValueError as error:
        if not jobs:
            raise
        taken = ", ".join(f"{name} ({job.id})" for name, job in jobs.items())
        raise ValueError(
            f"{error}\n  already submitted: {taken}; scancel {' '.join(job.id for job in jobs.values())} before the "
            "same command again"
        ) from None


def _print_commands(config: PipelineConfig, todo: list[Stage], configs: dict[str, Any], found: dict[str, Lead]) -> None:
    """The commands that would run, as a shell takes them."""
    if config.cluster.kind != "slurm":
        for stage in todo:
            print(f"# {stage.name}\n{shlex.join(command(stage))}")
        return
    for name, value in slurm.variables(config.cluster).items():
        print(f"export {name}={shlex.quote(value)}")
    if todo:  # SLURM opens the jobs' output files before they start
        print(shlex.join(["mkdir", "-p", *(str(stage.run_dir) for stage in todo)]))
    jobs: dict[str, str] = {}  # shell variables of the job ids
    for number, stage in enumerate(todo, start=1):
        argv = slurm.submission(
            stage,
            configs[stage.name].parallel,
            config.cluster,
            pipeline=config.experiment,
            after=[slurm.id_in(jobs[name]) for name in stage.depends_on if name in jobs],
            lead=found[stage.name].seconds,
        )
        variable = "job_" + re.sub(r"\W", "_", stage.name)
        jobs[stage.name] = f"{variable}_{number}" if variable in jobs.values() else variable
        print(f"# {stage.name}\n{slurm.assigned(jobs[stage.name], argv)}")


def _say(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr, flush=True)

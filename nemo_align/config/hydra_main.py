"""What Hydra's own command line does for us: `--info`, `--cfg hydra`, and `--multirun`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from nemo_align.config import overrides, sources
from nemo_align.config.compose import search_path_overrides

# Our run directory holds what Hydra would write, and our logger what it would log.
_QUIET = {
    "hydra.output_subdir": "null",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
    "hydra.run.dir": ".",
    "hydra.sweep.dir": "runs",
    "hydra.sweep.subdir": ".",
}
Job = Callable[[str, list[str]], int]  # (name of the job, its overrides) -> exit code


def show(verb: str, option: str, what: str, arguments: Sequence[str]) -> None:
    """Print Hydra's view of a configuration. `option`: --info or --cfg."""
    parsed = overrides.parse(verb, arguments)
    _call_hydra(verb, [option, what, *_texts(parsed)], lambda _: None)


def multirun(verb: str, arguments: Sequence[str], job: Job) -> int:
    """Run `job` for every combination of the values in `arguments` (`optimizer.lr=1e-6,1e-7`), one after the other.

    Returns:
        The largest exit code; a job that fails does not keep the others from running.
    """
    parsed = overrides.parse(verb, arguments)
    fixed = set(overrides.for_hydra(parsed))
    names = [override.text for override in parsed if override.key == sources.EXPERIMENT and not override.is_group]
    codes: list[int] = []

    def run_one(_: object) -> None:
        from hydra.core.hydra_config import HydraConfig

        texts = list(HydraConfig.get().overrides.task)
        codes.append(job(job_name([text for text in texts if text not in fixed]), [*texts, *names]))

    _call_hydra(verb, ["--multirun", *_texts(parsed)], run_one)
    return max(codes, default=1)


def job_name(swept: Sequence[str]) -> str:
    """Folder of a job: `optimizer.lr-1e-06__parallel-tp2`, without signs that an override would have to quote."""
    parts = [re.sub(r"[^\w.-]+", "-", text.lstrip("+")) for text in swept]
    return "__".join(parts) or "job"


def _texts(parsed: Sequence[overrides.Override]) -> list[str]:
    given = {override.key for override in parsed}
    quiet = [f"{key}={value}" for key, value in _QUIET.items() if key not in given]
    return [*search_path_overrides(), *quiet, *overrides.for_hydra(parsed)]


def _call_hydra(verb: str, arguments: list[str], task: Callable[[object], None]) -> None:
    import hydra

    before = sys.argv
    sys.argv = [before[0], *arguments]  # hydra.main reads nothing else
    try:
        hydra.main(version_base="1.3", config_path=str(sources.conf_dir()), config_name=verb)(task)()
    finally:
        sys.argv = before

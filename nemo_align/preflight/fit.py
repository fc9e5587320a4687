"""Whether the plan of a stage fits on the GPUs. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from nemo_align.config import build
from nemo_align.config.errors import ConfigError
from nemo_align.config.job_size import job_layout
from nemo_align.config.stages import WorkerConfig
from nemo_align.config.validation import check_world_size
from nemo_align.planning import h100
from nemo_align.planning.fit import fit
from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING, Check

_OTHERWISE = "more GPUs: nemo-align plan with search=true gpus=<n> ranks the layouts that fit"


def check_fit(name: str, config: WorkerConfig, memory: int | None, started: int | None = None) -> Check:
    """A line on the largest rank of a stage called `name`.

    `memory`: bytes of the smallest GPU; None where there is none to ask, which takes the plan's card of 80 GB.
    `started`: processes of this job, whose size counts where `gpus` is not given and they form the layout.
    """
    if build.missing_keys(config.model):
        text = f"{name}: its model is that of {config.checkpoint.init_from}, which is not there to be asked"
        return Check(name="plan", status=NOTE, text=f"{text} (model=<name> says it)")
    try:
        planned = replace(config, parallel=job_layout(config, started if _form(config, started) else None))
        found = fit(planned, memory or h100.CARD_BYTES)
    except ValueError as error:  # ConfigError too
        return Check(name="plan", status=FAILED, text=f"{name}: {error}", remedy="as the message says")
    parallel = planned.parallel
    gpus = parallel.tensor * parallel.pipeline * (parallel.data or 1)
    where = f", stage {found.stage} of {parallel.pipeline}" if parallel.pipeline > 1 else ""
    card = "" if memory else " (of an 80 GB card: no GPU here)"
    text = (
        f"{name} on {gpus:,} GPU{'s' * (gpus > 1)}: {_gigabytes(found.needed)} of {_gigabytes(found.card)} GB on the "
        f"largest rank{where}{card}"
    )
    if found.verdict == "fits":
        return Check(name="plan", status=OK, text=text)
    remedy = ", or ".join([*found.changes, *([] if found.changes else [_OTHERWISE])])
    if found.verdict == "tight":
        return Check(
            name="plan", status=WARNING, text=f"{text}: tight, the plan may be wrong by what is left", remedy=remedy
        )
    return Check(name="plan", status=FAILED, text=f"{text}: it does NOT fit", remedy=remedy)


def _form(config: WorkerConfig, started: int | None) -> bool:
    try:
        return started is not None and check_world_size(config.parallel, started) > 0
    except ConfigError:
        return False


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g}"

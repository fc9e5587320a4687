"""What Hydra's own command line does for us: `--info`, `--cfg hydra`, and `--multirun`."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Sequence

from nemo_align.config import overrides, sources
from nemo_align.config.compose import hydra_message, search_path_overrides
from nemo_align.config.errors import ConfigError
from nemo_align.config.untrusted import closed_environment, refuse_hydra_settings

# Our run directory holds what Hydra would write, and our logger what it would log.
_QUIET = {
    "hydra.output_subdir": "null",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
    "hydra.run.dir": ".",
    "hydra.sweep.subdir": ".",
}
Job = Callable[[str, list[str]], int]  # (name of the job, its overrides) -> exit code


def show(verb: str, option: str, what: str, arguments: Sequence[str]) -> None:
    """Print Hydra's view of a configuration. `option`: --info or --cfg."""
    parsed = overrides.parse(verb, arguments)
    _call_hydra(verb, [option, what, *_texts(verb, parsed)], lambda _: None)


def multirun(verb: str, arguments: Sequence[str], job: Job) -> int:
    """Run `job` for every combination of the values in `arguments` (`optimizer.lr=1e-6,1e-7`), one after the other.

    Returns:
        The largest exit code; a job that fails does not keep the others from running.
    """
    parsed = overrides.parse(verb, arguments)
    swept = _swept_keys(parsed)
    names = [override.text for override in parsed if override.key == sources.EXPERIMENT and not override.is_group]
    codes: list[int] = []

    def run_one(_: object) -> None:
        from hydra.core.hydra_config import HydraConfig

        texts = list(HydraConfig.get().overrides.task)
        changed = [text for text in texts if text.partition("=")[0].lstrip("+~") in swept]
        codes.append(job(job_name(changed), [*texts, *names]))

    _call_hydra(verb, ["--multirun", *_texts(verb, parsed)], run_one)
    return max(codes, default=1)


def job_name(swept: Sequence[str]) -> str:
    """Folder of a job: `optimizer.lr-1e-06__parallel-tp2`, without signs that an override would have to quote."""
    parts = [re.sub(r"[^\w.-]+", "-", text.lstrip("+")) for text in swept]
    return "__".join(parts) or "job"


def _swept_keys(parsed: Sequence[overrides.Override]) -> set[str]:
    """Keys with several values. Asked of Hydra: `[a,b]` is one value, `a,b` and `range(1,3)` are several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        read = OverridesParser.create().parse_overrides(overrides.for_hydra(parsed))
    except OverrideParseException as error:
        raise ConfigError(hydra_message(error)) from None
    return {override.key_or_group for override in read if override.is_sweep_override()}


def _texts(verb: str, parsed: Sequence[overrides.Override]) -> list[str]:
    given = {override.key for override in parsed}
    settings = {**_QUIET, "hydra.sweep.dir": f"runs/{overrides.experiment_name(parsed) or verb}"}  # of multirun.yaml
    quiet = [f"{key}={value}" for key, value in settings.items() if key not in given]
    return [*search_path_overrides(), *quiet, *overrides.for_hydra(parsed)]


def _call_hydra(verb: str, arguments: list[str], task: Callable[[object], None]) -> None:
    import hydra

    before = sys.argv
    sys.argv = [before[0], *arguments]  # hydra.main reads nothing else
    try:
        with closed_environment():
            _refuse_hydra_settings(verb, arguments)
            hydra.main(version_base="1.3", config_path=str(sources.conf_dir()), config_name=verb)(task)()
    finally:
        sys.argv = before


def _refuse_hydra_settings(verb: str, arguments: Sequence[str]) -> None:
    """Refuse files that set Hydra, in every combination of the swept choices: `hydra.main` calls what they name."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    choices = []
    for text in (text for text in arguments if "=" in text):
        key, _, value = text.partition("=")
        is_choice = key.lstrip("+~").partition("@")[0] in sources.groups() and not value.startswith("[")
        choices.append([f"{key}={one}" for one in value.split(",")] if is_choice else [text])
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(sources.conf_dir()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            for texts in itertools.product(*choices):
                defaults = loader.compute_defaults_list(verb, list(texts), RunMode.RUN).defaults
                refuse_hydra_settings(
                    [(default.config_path, default.package or "") for default in defaults if default.config_path]
                )
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(hydra_message(error)) from None
    finally:
        GlobalHydra.instance().clear()

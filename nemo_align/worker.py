"""Main function of a worker process: one rank of one stage.

    python -m nemo_align.worker <verb> <config.yaml>

Started by our own launcher; under torchrun and inside an srun step the command itself calls `main`. The configuration
is the resolved file that the command has checked and written: a worker composes nothing.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# No torch up here: the signal handlers come before the seconds that importing it takes.
from nemo_align.config.errors import raised_by_this_package
from nemo_align.runtime import exit_codes, launch_environment, logs, starts, watchdog
from nemo_align.runtime.signals import StopRequest

if TYPE_CHECKING:
    from nemo_align.runtime.launch_environment import LaunchEnvironment

# A broken connection is nearly always another rank's fault. Waiting a little lets that rank be the first to end, and so
# be the one that the launcher reports.
_BROKEN_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
_BROKEN_CONNECTION_SECONDS = 3.0


def main(verb: str, config_path: str | Path) -> int:
    """Run `verb` as this process' rank.

    Returns:
        One of `exit_codes`. A ValueError that this package raises is the user's to mend: its message is printed and
        USER_ERROR returned. Any other exception is logged with its traceback by the rank that met it: FAILURE.
    """
    stop = StopRequest()
    stop.install()
    logs.quiet_libraries()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2 <pid> shows where a silent worker is
    environment = launch_environment.detect() or launch_environment.single_process()
    run_dir = Path(config_path).parent
    try:
        code, afterwards = _run(verb, Path(config_path), environment, stop)
        _leave()
        if afterwards is not None:
            afterwards()
        if environment.rank == 0:
            starts.ended(run_dir, code, "complete" if code == exit_codes.SUCCESS else stop.reason)
    except ValueError as error:
        if not raised_by_this_package(error):
            return _fail(error, run_dir, environment)
        if _is_first_to_say(str(error), environment):
            print(f"error: {error}", file=sys.stderr, flush=True)
            starts.ended(run_dir, exit_codes.USER_ERROR, str(error))
        return exit_codes.USER_ERROR
    except KeyboardInterrupt:
        if environment.rank == 0:
            starts.ended(run_dir, exit_codes.INTERRUPTED, "Ctrl-C")
        return exit_codes.INTERRUPTED
    except Exception as error:
        return _fail(error, run_dir, environment)
    finally:
        watchdog.stop()
        stop.close()
    return code


def _fail(error: Exception, run_dir: Path, environment: LaunchEnvironment) -> int:
    """Say what an error that is not the user's was; returns FAILURE."""
    logging.getLogger(logs.LOGGER_NAME).exception("rank %d failed", environment.rank)
    if any(text in str(error) for text in _BROKEN_CONNECTION):
        time.sleep(_BROKEN_CONNECTION_SECONDS)
    if _is_first_to_say("a rank failed", environment):
        first_line = (str(error).strip() or "no message").splitlines()[0]
        reason = f"rank {environment.rank} ({watchdog.place()}): {type(error).__name__}: {first_line}"
        starts.ended(run_dir, exit_codes.FAILURE, reason)
    return exit_codes.FAILURE


def _run(
    verb: str, config_path: Path, environment: LaunchEnvironment, stop: StopRequest
) -> tuple[int, Callable[[], None] | None]:
    """The exit code, and what this rank has to do alone once it has left the process groups."""
    from nemo_align.config.compose import load_resolved

    config = load_resolved(verb, config_path)
    logs.setup(config.run_dir, environment.rank, shared_stderr=environment.source != "local")
    if environment.rank == 0:
        starts.began(config.run_dir, environment.world_size)
    hang_seconds = 60.0 * config.runtime.hang_timeout_minutes
    watchdog.start(config.run_dir, environment.rank, environment.world_size, hang_seconds)
    watchdog.beat("importing torch")

    from nemo_align.preflight.start import check_job, look_at_links
    from nemo_align.runtime import device, topology

    device.install()
    watchdog.beat("meeting the other ranks")
    grid = topology.initialize(config.parallel, config.runtime, environment)
    places = check_job(config, environment)
    if config.runtime.check_links or (config.runtime.check_links is None and device.use_gpu()):
        watchdog.beat("timing the links")
        look_at_links(grid)
    watchdog.beat("importing the stage")
    stage = importlib.import_module(f"nemo_align.stages.{verb}")
    watchdog.know(places)
    try:
        afterwards = stage.run(config, grid, stop)
    except SystemExit as left:
        if left.code != exit_codes.STOPPED_AFTER_SAVING:
            raise
        return exit_codes.STOPPED_AFTER_SAVING, None
    return exit_codes.SUCCESS, afterwards


def _leave() -> None:
    """Leave the process groups once the run is over. After an error it is skipped: the other ranks may never come."""
    from nemo_align.runtime import topology

    topology.destroy()


def _is_first_to_say(message: str, environment: LaunchEnvironment) -> bool:
    """Whether this rank should print the message: all ranks usually meet the same mistake of the user.

    Our launcher keeps the ranks' outputs apart, so there each says it. Where they share one stderr, the first rank to
    leave its mark in the group's store does; before the ranks have met, rank 0.
    """
    if environment.source == "local":
        return True
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return environment.rank == 0
    try:
        return distributed.distributed_c10d._get_default_store().add(f"nemo_align/said/{message}", 1) == 1
    except RuntimeError:  # rank 0 holds the store and has left: then it is better to say it twice than not at all
        return True


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m nemo_align.worker <verb> <config.yaml>")
    sys.exit(main(sys.argv[1], sys.argv[2]))

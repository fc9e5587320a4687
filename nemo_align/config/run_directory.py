"""config.yaml of a run directory: one directory, one configuration, so that the same command again resumes.

What cannot change the trained weights may differ, and so may the parallel layout and the micro-batches, which change
them by rounding only. Anything else is refused with the keys that differ.
"""

from __future__ import annotations

import fcntl
import fnmatch
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from nemo_align.config.errors import ConfigError

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
# No influence on the trained weights.
FREE_KEYS = (
    "run_dir",  # the same folder under another name
    "tracking.*",
    "checkpoint.save_every",
    "checkpoint.keep_last",
    "checkpoint.asynchronous",
    "checkpoint.export_hf",
    "train.log_every",
    "train.validate_every",
    "train.validate_at_start",
    "runtime.distributed_timeout_minutes",
    "runtime.hang_timeout_minutes",
    "runtime.max_restarts",
    "runtime.check_links",
    "data.cache_dir",
    "data.root",  # only where other paths come from, and these are compared
    "data.validation*",
    "gpus",  # of dry runs and plans
    "dry_run*",
)
# Other rounding, the same examples in the same order.
LAYOUT_KEYS = (
    "parallel.*",
    "runtime.threads",
    "train.packing",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "micro_batch_tokens",
)
_POLL_SECONDS = 0.1
Difference = tuple[str, Any, Any]  # key, saved value, new value


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make the folder and those above it; if the block raises, take away again what was made and is still empty."""
    absolute = folder.absolute()
    absent = [path for path in (absolute, *absolute.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in absent:
            try:
                path.rmdir()
            except OSError:  # something is in it, or somebody else took it away
                break
        raise


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run directory: two commands in one would write the same checkpoints and records.

    The kernel lets go of the lock when the process ends, however it ends. On a file system without locks (some mounts
    of Lustre) there is a note in place of the protection. A command that is refused leaves neither the folder nor the
    lock's file behind, where they were not there before.

    Raises:
        ConfigError: another command holds it, or it cannot be written.
    """
    path = run_dir / LOCK_FILE
    with ExitStack() as stack:
        try:
            stack.enter_context(made(run_dir))
            is_new = not path.exists()
            lock = stack.enter_context(_locked(path, run_dir))
            if is_new:
                stack.push(lambda refusal, *_: path.unlink(missing_ok=True) if refusal else None)  # while we hold it
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        except OSError as error:
            raise ConfigError(f"run_dir={run_dir} cannot be written: {error}") from None
        yield


def _locked(path: Path, run_dir: Path) -> TextIO:
    """The lock's file, open and locked; closing it lets go."""
    while True:
        lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # closed by the caller
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "a process"
            lock.close()
            raise ConfigError(
                f"run_dir={run_dir} is in use: another command ({holder}) runs in it. Wait for it, stop it, or choose "
                "another run_dir"
            ) from None
        except OSError as error:
            print(f"note: run_dir={run_dir} cannot be locked ({error}): start one command at a time", file=sys.stderr)
            return lock
        # A command that was refused takes its file away: a lock on that one would keep nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def may_change(verb: str, config: Any) -> list[str]:
    """Further keys that may differ: train.max_steps where it only says when to stop. It is the schedule's length if
    nothing else is."""
    stops_only = verb == "pretrain" or (hasattr(config, "train") and config.train.epochs is not None)
    return ["train.max_steps"] if stops_only else []


def claim(verb: str, run_dir: Path, text: str, same_run: Sequence[str] = ()) -> list[Difference]:
    """Write `text`, the resolved configuration, as run_dir/config.yaml, or refuse.

    `same_run`: further keys that may differ for this verb.

    Returns:
        What differs from the configuration that was there and is only a matter of layout.

    Raises:
        ConfigError: the directory belongs to another verb or configuration, or cannot be written.
    """
    path = run_dir / CONFIG_FILE
    content = _with_verb(verb, text)
    layout = refuse_other(verb, path, text, same_run) if path.exists() else []
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = run_dir / f".{CONFIG_FILE}.{os.getpid()}"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)  # a reader sees the old file or the new one
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error}") from None
    return layout


def wait_for(verb: str, run_dir: Path, text: str, seconds: float) -> None:
    """Wait until another process, rank 0, has claimed `run_dir` with the same configuration.

    Raises:
        ConfigError: it has not after `seconds`: another configuration, or a run_dir that the machines do not share.
    """
    path, content = run_dir / CONFIG_FILE, _with_verb(verb, text)
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text(encoding="utf-8") == content):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{path} of rank 0 did not appear within {seconds:g} s, or differs from this rank's configuration: "
                "run_dir must lie on a file system that all nodes share, and all ranks need the same command"
            )
        time.sleep(_POLL_SECONDS)


def refuse_other(verb: str, path: Path, text: str, same_run: Sequence[str] = ()) -> list[Difference]:
    """Compare a configuration with the one in `path`; the differences that are only layout.

    Raises:
        ConfigError: another verb, or keys that change the trained weights.
    """
    saved = path.read_text(encoding="utf-8")
    owner = saved.partition("\n")[0].removeprefix("# nemo-align ")
    remedy = "Choose another run_dir, or remove this one to start again"
    if owner != verb:
        raise ConfigError(f"run_dir={path.parent} belongs to a run of `nemo-align {owner}`. {remedy}")
    differing = differences(saved, text)
    refused = [entry for entry in differing if not _matches(entry[0], (*FREE_KEYS, *LAYOUT_KEYS, *same_run))]
    if refused:
        lines = "\n".join(f"  {describe(entry)}" for entry in refused)
        raise ConfigError(
            f"run_dir={path.parent} holds a run with another configuration. {remedy}. It differs in\n{lines}"
        )
    return [entry for entry in differing if _matches(entry[0], LAYOUT_KEYS)]


def differences(saved: str, new: str) -> list[Difference]:
    """Keys whose values differ between two configurations in YAML."""
    before, after = _flat(_load(saved)), _flat(_load(new))
    return [
        (key, before.get(key, "absent"), after.get(key, "absent"))
        for key in dict.fromkeys([*after, *before])
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def describe(difference: Difference) -> str:
    """`optimizer.lr: 1e-05 -> 2e-05`."""
    key, before, after = difference
    return f"{key}: {before} -> {after}"


def _with_verb(verb: str, text: str) -> str:
    return f"# nemo-align {verb}\n{text}"


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _load(text: str) -> Any:
    import io

    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{prefix}{name}.").items()}

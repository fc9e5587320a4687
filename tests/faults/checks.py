"""What must hold after every disturbance, and at the end."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from nemo_align.checkpoint import store
from nemo_align.checkpoint.streaming.torch_dist import TensorReader
from nemo_align.runtime import exit_codes, starts
from nemo_align.training.metrics import read_metrics
from tests.distributed.stage_runs import numbers
from tests.faults import remains
from tests.faults.cases import SAVE_EVERY, Case
from tests.faults.report import LEDGER
from tests.faults.runs import Attempt, Job

VANISH_SECONDS = 20.0  # from the end of the command to that of its processes: at once, on an idle machine
DYING_SECONDS = 180.0  # the same for what was killed and waits for a busy disk, which nobody can hasten


@dataclass(frozen=True)
class Outcome:
    """All that must not depend on what happened to a run: bits of every tensor, records, files."""

    tensors: dict[str, str]
    train: list[dict]
    validation: list[dict]
    files: dict[str, str]


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed, and how long it took."""

    case: Case
    job: Job
    outcomes: dict[str, Outcome]
    start_up: float  # seconds to the first line of the log
    duration: float

    @property
    def final_step(self) -> int:
        return max((len(one.train) for one in self.outcomes.values()), default=0)


@dataclass(frozen=True)
class Standing:
    """Where a run stood when it was disturbed."""

    saved: int  # step of the newest whole checkpoint; 0 without one
    logged: int  # last step in metrics.jsonl; 0 without one


def outcome(run_dir: Path) -> Outcome:
    """Of a finished run of one stage."""
    tensors: dict[str, str] = {}
    if (run_dir / store.CHECKPOINTS).is_dir():
        reader = TensorReader(newest(run_dir))
        tensors = {name: _tensor_digest(reader, name) for name in reader.names()}
        assert any(name.startswith("optimizer") for name in tensors), "the optimizer's state is compared too"
    assert starts.read(run_dir)[-1].code == exit_codes.SUCCESS, f"{run_dir} has no record of its end"
    records = read_metrics(run_dir)
    # One is compared by its records, and one tells what happened to the run.
    apart = {run_dir / "metrics.jsonl", run_dir / starts.STARTS_FILE}
    written = [*sorted((run_dir / "hf").glob("*.safetensors")), *sorted(set(run_dir.glob("*.jsonl")) - apart)]
    files = {path.name: _digest(path.read_bytes()) for path in written}
    return Outcome(tensors, numbers(records, "train"), numbers(records, "validation"), files)


def outcomes(run_dir: Path) -> dict[str, Outcome]:
    """Of each stage by name; of one that is no pipeline under ''."""
    if not (run_dir / "manifest.json").exists():
        return {"": outcome(run_dir)}
    return {path.parent.name: outcome(path.parent) for path in sorted(run_dir.glob("*/result.json"))}


def equal(expected: dict[str, Outcome], found: dict[str, Outcome]) -> None:
    """Assert that a disturbed run ended as the undisturbed one, and say where it did not."""
    assert list(found) == list(expected)
    for stage, one in expected.items():
        other = found[stage]
        steps = [record["step"] for record in other.train]
        assert steps == list(range(1, len(one.train) + 1)), f"{stage}: each step once, in order"
        assert other.train == one.train, stage
        assert other.validation == one.validation, stage
        assert list(other.tensors) == list(one.tensors), stage
        differing = [name for name, digest in one.tensors.items() if other.tensors[name] != digest]
        assert not differing, f"{stage}: {len(differing)} tensors differ, such as {differing[:3]}"
        assert other.files == one.files, stage


def newest(run_dir: Path) -> Path:
    """The newest whole checkpoint."""
    path = store.newest_complete(run_dir)
    assert path is not None, f"{run_dir} has no checkpoint"
    return path


def standings(run_dir: Path) -> dict[str, Standing]:
    """Where each stage of a pipeline stands by its files; of a run that is none, under ''."""
    if not (run_dir / "manifest.json").exists():
        return {"": standing(run_dir)}
    return {path.parent.name: standing(path.parent) for path in run_dir.glob("*/config.yaml")}


def standing(run_dir: Path) -> Standing:
    """Where the run of one stage stands by its files."""
    path = store.newest_complete(run_dir)
    saved = int(path.name.removeprefix("step_").removesuffix(store.REPLACED)) if path is not None else 0
    steps = [record["step"] for record in read_metrics(run_dir) if record["kind"] == "train"]
    assert len(steps) == len(set(steps)), "a step is recorded twice"
    return Standing(saved, max(steps, default=0))


def published_are_whole(run_dir: Path) -> int:
    """Assert that no half-written checkpoint has a name under which it would be used; returns their number."""
    paths = [path for folder in (run_dir, *run_dir.glob("*/")) for path in store.candidates(folder)]
    for path in paths:
        assert not store.find_problems(path, checksums=True), path
    return len(paths)


def nothing_left(attempt: Attempt) -> None:
    """Assert that the command left no process and no open port, as soon as the kernel has had time to end them."""
    assert attempt.process.poll() is not None
    assert attempt.sockets or not attempt.trained(), "the run trained, and no port of it was seen: nothing to check"
    began = time.monotonic()
    while True:
        # By the environment also those that were never seen before, and by number those that have lost theirs.
        processes = attempt.known | remains.identities(process.pid for process in attempt.job.processes())
        left = remains.unfinished(processes)
        sockets = attempt.sockets & remains.listening()
        if not left and not sockets:
            break
        owners = remains.owners(sockets)
        both = [*left, *owners]
        limit = DYING_SECONDS if both and all(one.dying for one in both) else VANISH_SECONDS
        waited = time.monotonic() - began
        assert waited <= limit, (
            f"{waited:.0f} s after the command's end there are still the processes [{'; '.join(map(str, left))}], and "
            f"{len(sockets)} open ports held by [{'; '.join(map(str, owners))}]"
        )
        time.sleep(0.05)
    LEDGER.ends_checked += 1
    LEDGER.ports_checked += bool(attempt.sockets)
    LEDGER.longest_vanishing = max(LEDGER.longest_vanishing, time.monotonic() - began)


def no_temporary_files(job: Job) -> None:
    """Assert that the launcher's folders are gone, and what a save or an export had not finished."""
    assert not list(job.temporary.glob("nemo_align*"))
    assert not list(job.run_dir.rglob(f"{store.TEMPORARY}*"))
    assert not list(job.run_dir.rglob(f"*{store.REPLACED}"))


def went_on(attempt: Attempt, before: dict[str, Standing]) -> int:
    """Assert that `attempt` began at the newest whole checkpoint; returns how many steps were trained again."""
    return max((_went_on(attempt, stage, place) for stage, place in before.items()), default=0)


def _went_on(attempt: Attempt, stage: str, before: Standing) -> int:
    resumed, steps = attempt.resumed(stage), attempt.steps(stage)
    if resumed is None:
        assert before.saved == 0 or not steps, f"step {before.saved} was saved, and the run began anew"
        return before.logged if steps else 0
    path, step = resumed
    assert not path.name.startswith(store.TEMPORARY)
    assert step == before.saved, f"resumed at step {step}, but {before.saved} was saved"
    assert not steps or steps[0] == step + 1
    lost = max(0, before.logged - step)
    # One save may be on its way when the next is due, which waits for it.
    assert lost <= 2 * SAVE_EVERY, f"{lost} steps are lost with a save every {SAVE_EVERY}"
    return lost


def _tensor_digest(reader: TensorReader, name: str) -> str:
    import torch

    tensor = reader.read(name).contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{reader.dtype(name)} {list(reader.shape(name))} {_digest(data)}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

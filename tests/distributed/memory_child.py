"""One stage in a fresh process, with the memory of every step: memory_child.py <verb> <config.yaml> <report.json>.

The kernel's own high-water mark of resident memory (VmHWM) is reset between steps, so a peak of a microsecond counts.
The process must be started with `MALLOC_SETTINGS`: then each block of 64 KiB or more goes back to the system when it is
freed, and what is resident is what is held.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

MALLOC_SETTINGS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def status() -> dict[str, int]:
    """Bytes: resident, its anonymous part (what is allocated, without mapped files), and the high-water mark."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon", "VmHWM")}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def held_by_tensors() -> int:
    """Bytes of all tensors that Python knows, each storage once; cycles that wait for its collector are no leak."""
    import torch

    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main(verb: str, config: str, report: Path) -> int:
    import torch

    from nemo_align.runtime import device

    device.install()  # before Megatron-core is imported, as a worker does

    import nemo_align.stages.score
    import nemo_align.training.forward
    import nemo_align.training.loop
    from nemo_align import worker
    from nemo_align.training.loop import Trainer

    nemo_align.stages.score.EXAMPLES_PER_STEP = 8
    records: list[dict] = []
    torch.ones(64, 64).matmul(torch.ones(64, 64))  # the library's own buffers
    reset_peak()
    before = status()

    def mark(kind: str) -> None:
        """Close the stretch before this moment and begin the next."""
        tensors = held_by_tensors() if kind != "save" else 0
        records.append({"begins": kind, "tensors": tensors, **status()})
        reset_peak()

    def marked(kind: str, function):
        def call(*args, **kwargs):
            mark(kind)
            return function(*args, **kwargs)

        return call

    for module in (nemo_align.training.loop, nemo_align.training.forward):
        module.run_step = marked("train" if module.__name__.endswith("loop") else "forward", module.run_step)
    save = Trainer._save

    def save_between_marks(self, **kwargs) -> None:
        mark("save")
        save(self, **kwargs)
        mark("saved")

    Trainer._save = save_between_marks
    code = worker.main(verb, config)
    mark("end")
    report.write_text(json.dumps({"code": code, "before": before, "records": records}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))

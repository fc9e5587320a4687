"""A disk that takes long over many files: whoever waits for the save shows the watch that it goes on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import checkpoint_runs as runs
from tests.distributed.pool import WorkerPool, with_topology

SLOW_SECONDS = 0.5  # per file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def publish_slowly(topology, folder: str, tokenizer: str) -> tuple[float, float]:
    """Seconds that a save took, and the longest without a beat: flushing its files and deleting an older one's."""
    from nemo_align.checkpoint import saver, store
    from nemo_align.data.tokenizer import load_tokenizer
    from nemo_align.runtime import watchdog

    run = runs.build(topology)
    settings = {
        "model_chunks": run.chunks, "optimizer": None, "scheduler": None, "state": {}, "verb": "sft",
        "model_config": run.model, "reward_config": None, "dtype": run.dtype,
        "tokenizer": load_tokenizer(tokenizer), "final": False,
    }  # fmt: skip
    saving = saver.Saver(folder, topology, keep_last=0)
    saving.start(1, **settings)
    saving.wait()

    def slowly(action: Callable) -> Callable:
        def act(*args, **kwargs):
            time.sleep(SLOW_SECONDS)
            return action(*args, **kwargs)

        return act

    beats = [time.monotonic()]
    before = saver._POLL_SECONDS, watchdog.beat, store.flush_file, Path.unlink
    saver._POLL_SECONDS = 0.1
    watchdog.beat = lambda doing: beats.append(time.monotonic())
    store.flush_file, Path.unlink = slowly(store.flush_file), slowly(Path.unlink)
    try:
        saving.start(2, **settings)
        saving.wait()
    finally:
        saver._POLL_SECONDS, watchdog.beat, store.flush_file, Path.unlink = before
    beats.append(time.monotonic())
    assert [path.name for path in store.candidates(folder)] == ["step_0000002"]
    gaps = [later - earlier for earlier, later in itertools.pairwise(beats)]
    return beats[-1] - beats[0], max(gaps)


def test_each_file_is_a_sign_of_life(pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    """On every rank: the others wait for rank 0, which publishes."""
    for seconds, longest in pool2.run(with_topology, publish_slowly, {"data": 2}, str(tmp_path), tokenizer):
        print(f"{seconds:.1f} s, {longest:.2f} s at most without a beat")
        assert seconds > 12 * SLOW_SECONDS
        assert longest < seconds / 4

"""TensorBoard and W&B: both at once, imported only when asked for, a clear error without the extra."""

import subprocess
import sys

import pytest

from nemo_align.config.training import TrackingConfig
from nemo_align.training.trackers import TensorBoard, numbers, open_trackers


def test_nothing_is_imported_unless_asked_for(tmp_path):
    program = (
        "import sys; from nemo_align.config.training import TrackingConfig; "
        "from nemo_align.training.trackers import open_trackers; "
        f"assert open_trackers(TrackingConfig(), {str(tmp_path)!r}, 'e', {{}}) == []; "
        "print(sorted({'wandb', 'tensorboard'} & set(sys.modules)))"
    )
    # A process of its own: in this one another test, or Megatron-core, may have imported them.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("tracker", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_names_the_extra(tracker, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    with pytest.raises(ValueError, match=rf"tracking.{tracker}=true .*nemo_align\[tracking\]"):
        open_trackers(TrackingConfig(**{tracker: True}), tmp_path, "e", {})


def test_only_numbers_are_tracked():
    assert numbers({"step": 3, "kind": "train", "loss": 1, "ok": True, "gone": None}) == {"loss": 1.0}


def test_tensorboard_events_hold_the_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, scale in ([1, 2, 3], 1.0), ([3, 4], 10.0):  # the second process trains step 3 again
        tracker = TensorBoard(tmp_path)
        for step in steps:
            tracker.log(step, {"loss": step * scale})
        tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_wandb_offline_keeps_one_run_per_run_directory(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for _ in range(2):
        [tracker] = open_trackers(TrackingConfig(wandb=True), tmp_path, "e", {"seed": 1})
        tracker.log(1, {"loss": 1.0})
        ids.append(tracker._run.id)
        tracker.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text().strip()

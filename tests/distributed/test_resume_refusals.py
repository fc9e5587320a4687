"""A resume that would not continue the same run is refused, and the message says what is different."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.distributed.pool import RemoteError
from tests.distributed.stage_runs import run_stage
from tests.stage_inputs import stage_overrides


def test_a_changed_training_file_is_named(pool1, stage_inputs, policy, tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    overrides = [*stage_overrides(stage_inputs, "sft"), f"checkpoint.init_from={policy}", "train.validate_every=null"]
    [own] = [text for text in overrides if text.startswith("data.train.") and ".path=" in text]
    key, _, path = own.partition("=")
    shutil.copy(path, rows)
    overrides = [text for text in overrides if text != own] + [f"{key}={rows}"]
    run_stage(pool1, "sft", tmp_path / "run", [*overrides, "train.max_steps=2"])
    state = json.loads((tmp_path / "run/checkpoints/step_0000002/manifest.json").read_text())["state"]
    assert state["data_content"].keys() == {"data.tokenizer", key.removesuffix(".path")}
    (tmp_path / "run" / "result.json").unlink()
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[1:]))
    with pytest.raises(RemoteError) as caught:
        run_stage(pool1, "sft", tmp_path / "run", [*overrides, "train.max_steps=2"])
    message = str(caught.value)
    assert caught.value.type_name == "ValueError" and "the training data changed since the checkpoint" in message
    assert f": {key.removesuffix('.path')} ({rows}) has other content. A resumed run would read other rows" in message
    assert "Restore the data and data.* settings, or start in another run_dir with checkpoint.init_from=" in message

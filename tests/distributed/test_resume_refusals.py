"""A resume that would not continue the same run is refused, and the message says what is different."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from nemo_align.data.indexed import check_indexed_dataset, write_indexed_dataset
from tests.distributed.pool import RemoteError
from tests.distributed.stage_runs import run_stage
from tests.stage_inputs import VOCABULARY, stage_overrides


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


def documents(prefix) -> list[np.ndarray]:
    """Of a set whose sequences are its documents."""
    info = check_indexed_dataset(prefix)
    lengths = np.fromfile(f"{prefix}.idx", dtype="<i4", offset=34, count=info.num_sequences)
    return np.split(np.fromfile(f"{prefix}.bin", dtype=info.dtype), np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("lengths", ["of several lengths", "of one length"])
def test_a_blend_in_another_order_is_named(lengths: str, pool1, stage_inputs, policy, tmp_path) -> None:
    """Neither file changes its size; where documents are of one length, the index stays as it is."""
    blend = tmp_path / "blend"
    before = documents(stage_inputs.blend)
    if lengths == "of one length":
        shortest = min(map(len, before))
        before = [document[:shortest] for document in before]
    write_indexed_dataset(blend, before, vocab_size=VOCABULARY, eod=None)
    key = "data.phases.second.blend.text"
    overrides = [*stage_overrides(stage_inputs, "pretrain"), f"checkpoint.init_from={policy}", f"{key}.path={blend}"]
    run_stage(pool1, "pretrain", tmp_path / "run", overrides)
    (tmp_path / "run" / "result.json").unlink()
    sizes = [blend.with_suffix(suffix).stat().st_size for suffix in (".bin", ".idx")]
    write_indexed_dataset(blend, before[::-1], vocab_size=VOCABULARY, eod=None)
    assert sizes == [blend.with_suffix(suffix).stat().st_size for suffix in (".bin", ".idx")]
    with pytest.raises(RemoteError) as caught:
        run_stage(pool1, "pretrain", tmp_path / "run", overrides)
    message = str(caught.value)
    assert caught.value.type_name == "ValueError" and "the training data changed since the checkpoint" in message
    assert f": {key} ({blend}) has other content. A resumed run would read other rows" in message
    write_indexed_dataset(blend, before, vocab_size=VOCABULARY, eod=None)  # restored, as the message says
    run_stage(pool1, "pretrain", tmp_path / "run", overrides)

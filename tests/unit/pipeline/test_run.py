"""Running, stopping and resuming a chain. Its stages are real processes, tiny ones: they write what a stage writes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_align.config.compose import ConfigError, compose
from nemo_align.pipeline import local, run
from nemo_align.pipeline.manifest import read_manifest
from nemo_align.runtime import exit_codes

# A stage of one file: two "steps" of a fraction of a second, one checkpoint manifest, a result. SIGTERM: exit 75.
STAGE = textwrap.dedent("""
    import os, pathlib, signal, sys, time
    verb, name, run_dir = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    from nemo_align.checkpoint.manifest import write_manifest
    from nemo_align.config.compose import compose, to_yaml
    from nemo_align.config.run_directory import claim
    from nemo_align.training.metrics import MetricsWriter
    from nemo_align.training.result import StageResult, write_result
    config = compose(verb, sys.argv[4:])
    claim(verb, run_dir, to_yaml(config))
    control = run_dir.parent.parent / name  # what the test asks of this stage
    action = control.read_text() if control.exists() else ""
    if action == "fail":
        sys.exit(3)
    if action == "wait":
        (run_dir / "waiting").write_text(str(os.getpid()))
        time.sleep(60)
    checkpoint = run_dir / "checkpoints" / "step_0000002"
    checkpoint.mkdir(parents=True)
    keys = "verb step final reward layout optimizer_sharding dtype tokenizer state megatron_core torch".split()
    manifest = dict.fromkeys(keys) | {"files": {}, "model": vars(config.model), "salt": time.time()}
    write_manifest(checkpoint, manifest)
    writer = MetricsWriter(run_dir)
    for step in (1, 2):
        writer.write({"kind": "train", "step": step, "loss": 3.0 - step, "perf/mfu": 0.4})
    write_result(run_dir, StageResult(
        verb=verb, experiment=name, steps=2, tokens=128, layout={"tensor": 1, "world_size": 1},
        input=config.checkpoint.init_from, output="checkpoints/step_0000002",
        first={"validation/a/loss": 3.0}, last={"validation/a/loss": 2.0}, mfu=0.4,
    ))
""")


@pytest.fixture
def overrides(tmp_path, monkeypatch):
    """Command line of a chain of three sft stages, each starting from the one before."""
    monkeypatch.setattr(
        local,
        "command",
        lambda stage: [sys.executable, "-c", STAGE, stage.verb, stage.name, str(stage.run_dir), *stage.arguments],
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(run.__file__).parents[2]))
    (tmp_path / "tokenizer.model").write_text("")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    common = [
        f"data.tokenizer={tmp_path}/tokenizer.model",
        f"data.train.a.path={tmp_path}/rows.jsonl",
        "data.sequence_length=64",
        "train.global_batch_size=2",
        "train.max_steps=2",
        "optimizer.lr=1e-4",
    ]
    texts = [f"run_dir={tmp_path}/run", f"overrides=[{','.join(repr(text) for text in common)}]"]
    texts += ["stages.one.verb=sft", "stages.one.overrides=['model=tiny']"]
    texts += ["stages.two.verb=sft", "stages.two.init_from=one", "stages.three.verb=sft", "stages.three.init_from=two"]
    return texts


def start(overrides: list[str]) -> int:
    return run.main(compose("pipeline", overrides), overrides)


def statuses(tmp_path: Path) -> list[str]:
    return [record.status for record in read_manifest(tmp_path / "run").stages]


def wait_for(path: Path, seconds: float = 90) -> str:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
    return path.read_text()


def test_the_chain_runs_and_the_manifest_says_what_happened(tmp_path, overrides, capfd):
    assert start(overrides) == exit_codes.SUCCESS
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [stage["status"] for stage in manifest["stages"]] == ["complete"] * 3
    first, second, _ = manifest["stages"]
    assert second["input"] == f"{tmp_path}/run/one"
    assert second["inputs"] == {"one": first["identity"]}
    assert first["output"] == f"{tmp_path}/run/one/checkpoints/step_0000002"
    assert first["metrics"] == {"first": {"validation/a/loss": 3.0}, "last": {"validation/a/loss": 2.0}}
    assert first["mfu"] == 0.4 and first["layout"]["tensor"] == 1 and first["seconds"] > 0
    assert len({stage["config_hash"] for stage in manifest["stages"]}) == 3
    assert "loss 3.000 → 2.000" in capfd.readouterr().out


def test_a_failed_stage_stops_the_chain_and_the_same_command_goes_on_there(tmp_path, overrides):
    (tmp_path / "two").write_text("fail")
    assert start(overrides) == 3
    assert statuses(tmp_path) == ["complete", "failed", "pending"]
    before = read_manifest(tmp_path / "run")["one"].identity
    (tmp_path / "two").unlink()
    assert start(overrides) == exit_codes.SUCCESS
    manifest = read_manifest(tmp_path / "run")
    assert [record.restarts for record in manifest.stages] == [0, 1, 0]
    assert manifest["one"].identity == before  # not trained again
    assert manifest["two"].exit_code == 0


def test_a_changed_finished_stage_is_refused_with_the_key_and_the_folders(tmp_path, overrides):
    assert start(overrides) == 0
    changed = [*overrides, "stages.two.overrides=['optimizer.lr=2e-4']"]
    with pytest.raises(ConfigError) as caught:
        start(changed)
    message = str(caught.value)
    assert "stage two is done or begun, but its configuration changed: optimizer.lr: 0.0001 -> 0.0002" in message
    assert "stage three is done or begun, but stage two, which it reads, has to be trained again" in message
    assert f"rm -r {tmp_path}/run/two {tmp_path}/run/three" in message


def test_tracking_may_change_without_training_again(tmp_path, overrides):
    assert start(overrides) == 0
    assert start([*overrides, "stages.two.overrides=['tracking.wandb=true']"]) == 0


def test_a_stage_made_from_an_earlier_output_is_refused_before_anything_runs(tmp_path, overrides):
    assert start(overrides) == 0
    subprocess.run(["rm", "-r", str(tmp_path / "run" / "one")], check=True)
    with pytest.raises(ConfigError, match="stage two is done or begun, but stage one, which it reads, is not"):
        start(overrides)
    assert not (tmp_path / "run" / "one").exists()


def test_a_lost_manifest_is_rebuilt_from_what_the_stages_wrote(tmp_path, overrides):
    assert start(overrides) == 0
    (tmp_path / "run" / "manifest.json").unlink()
    assert start(overrides) == 0
    assert statuses(tmp_path) == ["complete"] * 3
    assert read_manifest(tmp_path / "run")["three"].restarts == 0


def test_dry_run_prints_the_commands_and_starts_nothing(tmp_path, overrides, capsys, monkeypatch):
    monkeypatch.setattr(run.dry_runs, "run", lambda *_: exit_codes.SUCCESS)  # tests/unit/dry_run/ has its own tests
    assert start([*overrides, "dry_run=true"]) == 0
    assert capsys.readouterr().out.count("# ") == 3
    assert not (tmp_path / "run").exists()


def in_own_process(overrides: list[str]) -> subprocess.Popen:
    """The pipeline as its own process, so that it can be sent signals."""
    program = (
        "import sys; from nemo_align.pipeline import local, run; from nemo_align.config.compose import compose\n"
        f"stage_program = {STAGE!r}\n"
        "local.command = lambda stage: [sys.executable, '-c', stage_program, stage.verb, stage.name, "
        "str(stage.run_dir), *stage.arguments]\n"
        "texts = sys.argv[1:]; sys.exit(run.main(compose('pipeline', texts), texts))"
    )
    return subprocess.Popen([sys.executable, "-c", program, *overrides], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stage_which_stops_and_the_same_command_goes_on(tmp_path, overrides, number):
    (tmp_path / "two").write_text("wait")
    pipeline = in_own_process(overrides)
    wait_for(tmp_path / "run" / "two" / "waiting")
    pipeline.send_signal(number)
    if number == signal.SIGINT:  # this stage has no handler of its own for it
        assert pipeline.wait(60) != 0
    else:
        assert pipeline.wait(60) == exit_codes.STOPPED_AFTER_SAVING
    assert statuses(tmp_path) == ["complete", "stopped", "pending"]
    (tmp_path / "two").unlink()
    assert start(overrides) == 0
    assert [record.restarts for record in read_manifest(tmp_path / "run").stages] == [0, 1, 0]


def test_a_killed_pipeline_leaves_no_process_behind_and_resumes(tmp_path, overrides):
    (tmp_path / "two").write_text("wait")
    pipeline = in_own_process(overrides)
    stage = int(wait_for(tmp_path / "run" / "two" / "waiting"))
    pipeline.kill()
    pipeline.wait(60)
    deadline = time.monotonic() + 30
    while _alive(stage):
        assert time.monotonic() < deadline, "the stage outlives the pipeline"
        time.sleep(0.05)
    assert statuses(tmp_path) == ["complete", "running", "pending"]
    (tmp_path / "two").unlink()
    assert start(overrides) == 0  # the lock went with the process
    assert statuses(tmp_path) == ["complete"] * 3


def test_two_pipelines_in_one_folder_are_refused(tmp_path, overrides):
    (tmp_path / "one").write_text("wait")
    pipeline = in_own_process(overrides)
    try:
        wait_for(tmp_path / "run" / "one" / "waiting")
        with pytest.raises(ValueError, match=f"is in use: another command \\(process {pipeline.pid} on "):
            start(overrides)
    finally:
        pipeline.kill()
        pipeline.wait(60)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")

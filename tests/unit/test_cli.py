"""The command's own part: options, what it imports, sweeps, and starting workers."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_align import cli
from nemo_align.config import hydra_main
from nemo_align.config.run_directory import CONFIG_FILE
from nemo_align.config.sources import CONFIG_DIRS_VARIABLE
from nemo_align.runtime import local_launch

SFT = ["model=tiny", "data.tokenizer=tokenizer.model", "data.sequence_length=64", "optimizer.lr=1e-4"]
SFT += ["train.global_batch_size=8", "train.max_steps=2", "data.train.mine.path=rows.jsonl"]


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    # What --config-dir sets must not outlive the test.
    monkeypatch.setenv(CONFIG_DIRS_VARIABLE, "")
    for name in ("rows.jsonl", "tokenizer.model"):
        (tmp_path / name).touch()


@pytest.fixture
def launched(monkeypatch):
    """Records what would be started in place of starting it: workers have tests of their own."""
    calls = []
    monkeypatch.setattr(
        local_launch, "launch", lambda command, workers, logs, **_: calls.append((command, workers)) or 0
    )
    monkeypatch.setattr(local_launch, "number_of_gpus", lambda: 0)
    return calls


def test_options_stand_anywhere():
    options = cli.parse_options(
        ["--cfg", "job", "a=1", "--config-dir=x", "-m", "b=2", "-p", "model", "--config-dir", "y"]
    )
    assert options == cli.Options(["a=1", "b=2"], multirun=True, cfg="job", package="model", config_dirs=["x", "y"])
    assert cli.parse_options(["--info", "a=1"]).info == "all"
    assert cli.parse_options(["--info", "defaults", "a=1"]).info == "defaults"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mulitrun"], "did you mean '--multirun'?"),
        (["--cfg"], "--cfg needs a value"),
        (["--cfg", "jobs"], "must be job, hydra or all"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError) as caught:
        cli.parse_options(arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["stf"], 2, "unknown verb 'stf'; did you mean 'sft'?"),
        (["sft", "--config-dir", "absent"], 2, "--config-dir absent: no such folder"),
        (["sft", *SFT, "--cfg", "job", "--package", "modell"], 2, "no such part: 'modell'"),
        (
            ["sft", *SFT, "parallel=tp8_pp12", "model=nemotron4_340b"],
            2,
            "needs 96 workers, too many for a machine without",
        ),
        (["sft", *SFT, "run_dir=a=b,c", "--multirun"], 2, "cannot read 'run_dir=a=b,c'"),
        (["sft", *SFT, "--info", "--multirun"], 2, "--multirun goes with --cfg job only"),
        (["sft", *SFT, "precision=fp8_delayed"], 2, "use precision=bf16 here"),
    ],
)
def test_errors_are_one_message(launched, capsys, arguments, code, message):
    assert cli.main(arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and message in output.err
    assert launched == []


def test_cfg_job_prints_every_key(capsys):
    assert cli.main(["sft", *SFT, "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert "run_dir: runs/sft" in text and "  beta2: 0.95" in text and "  num_layers: 4" in text
    assert cli.main(["sft", *SFT, "--cfg", "job", "--package", "optimizer.lr"]) == 0
    assert capsys.readouterr().out == "0.0001\n"


def test_workers_get_the_resolved_file(launched, tmp_path, capsys):
    assert cli.main(["sft", *SFT, "parallel=tp2", "parallel.data=2"]) == 0
    (command, workers), path = launched[0], tmp_path / "runs" / "sft" / CONFIG_FILE
    assert command == [sys.executable, "-m", "nemo_align.worker", "sft", f"runs/sft/{CONFIG_FILE}"]
    assert workers == 4
    assert path.read_text().startswith("# nemo-align sft\n") and "  tensor: 2\n" in path.read_text()
    # again: resumes; another layout: resumes with a note; another learning rate: refused
    assert cli.main(["sft", *SFT, "parallel=tp2", "parallel.data=2"]) == 0
    assert cli.main(["sft", *SFT]) == 0
    assert "note: resuming with another layout: parallel.tensor: 2 -> 1" in capsys.readouterr().err
    assert cli.main(["sft", *SFT, "optimizer.lr=1e-5"]) == 2
    assert "  optimizer.lr: 0.0001 -> 1e-05" in capsys.readouterr().err
    assert [workers for _, workers in launched] == [4, 4, 1]


def test_a_layout_that_the_save_cannot_serve_is_refused_before_anything_is_written(launched, tmp_path, capsys):
    from tests.unit.checkpoint.published import publish

    two = [*SFT, "parallel=tp2"]
    assert cli.main(["sft", *two]) == 0
    run_dir = tmp_path / "runs" / "sft"
    before = (run_dir / CONFIG_FILE).read_text()
    layout = {"tensor": 2, "pipeline": 1, "virtual_pipeline": 1}
    path = publish(run_dir, 3, layout=layout, optimizer_sharding="dp_reshardable")
    capsys.readouterr()
    assert cli.main(["sft", *SFT]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path.relative_to(tmp_path)} is a periodic save under parallel.tensor=2 ")
    assert "Resume with parallel.tensor=2 parallel.pipeline=1 parallel.virtual_pipeline=1" in message
    assert (run_dir / CONFIG_FILE).read_text() == before
    assert cli.main(["sft", *two, "parallel.data=2"]) == 0
    assert cli.main(["sft", *two, "parallel.distributed_optimizer=false"]) == 2
    assert "set parallel.distributed_optimizer=true" in capsys.readouterr().err
    publish(run_dir, 4, layout=layout, optimizer_sharding="fully_reshardable")
    assert cli.main(["sft", *SFT]) == 0
    assert len(launched) == 3


def test_gpus_decide_the_data_parallel_size(launched, monkeypatch, capsys):
    monkeypatch.setattr(local_launch, "number_of_gpus", lambda: 8)
    assert cli.main(["sft", *SFT, "parallel=tp2"]) == 0
    assert launched[0][1] == 8
    assert cli.main(["sft", *SFT, "parallel=tp2", "parallel.data=8"]) == 2
    assert "needs 16 GPUs and this machine has 8" in capsys.readouterr().err


def test_gpus_of_another_job_are_refused_and_a_recipes_are_no_matter(launched, tmp_path, capsys):
    assert cli.main(["sft", *SFT, "parallel=tp2", "gpus=2"]) == 0
    assert cli.main(["sft", *SFT, "parallel=tp2", "gpus=8"]) == 2
    assert "gpus=8, but 2 processes are started" in capsys.readouterr().err
    (tmp_path / "site" / "experiment").mkdir(parents=True)
    (tmp_path / "site" / "experiment" / "mine.yaml").write_text("# @package _global_\ngpus: 8\n")
    assert cli.main(["sft", "--config-dir=site", "+experiment=mine", *SFT, "parallel=tp2"]) == 0
    assert "gpus: null" in (tmp_path / "runs" / "mine" / CONFIG_FILE).read_text()
    assert [workers for _, workers in launched] == [2, 2]


def test_when_max_steps_only_stops_it_may_move(launched):
    texts = [text for text in SFT if "max_steps" not in text] + ["train.epochs=1"]
    assert cli.main(["sft", *texts, "train.max_steps=1"]) == 0
    assert cli.main(["sft", *texts, "train.max_steps=2"]) == 0  # epochs are the schedule's length
    assert cli.main(["sft", *SFT, "run_dir=other"]) == 0
    assert cli.main(["sft", *SFT, "run_dir=other", "train.max_steps=3"]) == 2


def test_a_rank_of_torchrun_refuses_a_world_that_is_no_layout(monkeypatch, capsys):
    place = {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3, "MASTER_ADDR": "localhost"}
    for name, value in {**place, "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: set())  # pytest keeps its own handlers
    assert cli.main(["sft", *SFT, "parallel=tp2"]) == 2
    assert "3 processes cannot form parallel.tensor=2 x parallel.pipeline=1" in capsys.readouterr().err


def test_a_sweep_gives_every_job_its_directory(launched, tmp_path, monkeypatch, capsys):
    assert (
        cli.main(
            [
                "sft",
                *SFT,
                "optimizer.lr=1e-4,1e-5",
                "parallel=single,tp2",
                "experiment=x",
                "train.packing=false",
                "--multirun",
            ]
        )
        == 0
    )
    found = sorted(path.parent.name for path in (tmp_path / "runs" / "x").glob(f"*/{CONFIG_FILE}"))
    rates, layouts = ("0.0001", "1e-05"), ("single", "tp2")
    assert found == sorted(f"optimizer.lr-{rate}__parallel-{layout}" for rate in rates for layout in layouts)
    assert [workers for _, workers in launched] == [1, 2, 1, 2]


def test_a_bad_job_does_not_stop_a_sweep(launched, capsys):
    assert cli.main(["sft", *SFT, "parallel.tensor=3,2", "--multirun"]) == 2
    assert "not divisible by parallel.tensor=3" in capsys.readouterr().err
    assert [workers for _, workers in launched] == [2]


def test_a_sweep_may_be_printed(launched, capsys):
    assert cli.main(["sft", *SFT, "optimizer.lr=1e-4,1e-5", "--multirun", "--cfg", "job"]) == 0
    _, *documents = capsys.readouterr().out.split("---\n")
    for name, rate, text in zip(("0.0001", "1e-05"), ("0.0001", "1.0e-05"), documents, strict=True):
        assert f"run_dir: runs/sft/optimizer.lr-{name}\n" in text and f"  lr: {rate}\n" in text
    assert launched == []


def test_every_line_of_a_sweeps_errors_is_one(launched, capsys):
    assert cli.main(["sft", *SFT, "parallel.tensor=3,5", "--multirun"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: parallel.tensor-") for line in lines)


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *_: int("a library's ValueError is no message for users"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["sft", *SFT])


def test_names_of_jobs_need_no_quotes():
    name = hydra_main.job_name(["++data.train.a.path=x/y z.jsonl", "model=tiny"])
    assert name == "data.train.a.path-x-y-z.jsonl__model-tiny"


@pytest.mark.parametrize("call", [["--help"], ["sft", "--help"], ["sft", *SFT, "--cfg", "job"]])
def test_the_parent_imports_neither_torch_nor_megatron(call):
    code = (
        "import sys; from nemo_align import cli; code = cli.main(sys.argv[1:]); "
        "heavy = {'torch', 'megatron', 'transformers', 'datasets'} & set(sys.modules); "
        "assert code == 0 and not heavy, (code, heavy)"
    )
    subprocess.run([sys.executable, "-c", code, *call], check=True, capture_output=True, timeout=60)


def test_starting_workers_imports_no_torch():
    """Up to the moment of the launch, which is a process of its own."""
    code = (
        "import sys; from nemo_align import cli; from nemo_align.runtime import local_launch\n"
        "local_launch.launch = lambda *_, **__: 0\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "sft", *SFT], check=True, capture_output=True, timeout=60)

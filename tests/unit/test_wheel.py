"""The wheel works away from the checkout: configuration and job scripts lie inside the package and are found there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="pip install 'nemo_align[dev]'")
    folder = tmp_path_factory.mktemp("dist")
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder of their own."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """A Python command in `cwd` that imports the unpacked wheel and, whatever is installed here, not the checkout."""
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    others = [path for path in inherited if Path(path).resolve() != ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *others])}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def cli(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(installed, cwd, "-m", "nemo_align.cli", *arguments)


def test_it_holds_the_package_its_configuration_and_scripts_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
        [scripts] = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"nemo_align"}
    for folder, pattern in (
        ("conf", "*.yaml"),
        ("slurm", "*.sbatch"),
        ("nemo_align", "*.py"),
        ("nemo_align", "*.jinja"),
    ):
        inside = "" if folder == "nemo_align" else "nemo_align/"
        wanted = {f"{inside}{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob(pattern)}
        assert wanted and wanted <= set(names), wanted - set(names)
    assert "nemo-align = nemo_align.cli:main" in scripts
    assert "Name: nemo_align" in metadata and "Requires-Dist: megatron-core" in metadata
    # Somebody else's package has that name.
    assert not re.search(r"^Requires-Dist: apex\b", metadata, re.MULTILINE)


def test_help_and_version(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import nemo_align; print(nemo_align.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed), where.stdout
    done = cli(installed, tmp_path, "sft", "--help")
    assert done.returncode == 0, done.stderr
    assert "optimizer.lr" in done.stdout and "quickstart/code_sft" in done.stdout  # keys, and what conf/ offers


def test_an_experiment_composes_in_another_folder(installed: Path, tmp_path: Path) -> None:
    """Paths of data are relative to where the command runs; only that they are there is looked at."""
    text = (ROOT / "conf/experiment/quickstart/pretrain.yaml").read_text()
    for path in re.findall(r"data/quickstart/[\w./-]+", text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("",) if path.endswith(".model") else (".bin", ".idx"):
            (tmp_path / f"{path}{suffix}").touch()
    done = cli(installed, tmp_path, "pretrain", "+experiment=quickstart/pretrain", "optimizer.lr=0.5", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    from omegaconf import OmegaConf

    config = OmegaConf.create(done.stdout)
    assert (
        config.optimizer.lr == 0.5 and config.optimizer.schedule == "cosine" and config.model.name == "nemotron4_tiny"
    )
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_one_message(installed: Path, tmp_path: Path) -> None:
    done = cli(installed, tmp_path, "pretrain", "+experiment=quickstart/pretrain", "--cfg", "job")
    assert done.returncode == 2
    assert "tokenizer.model does not exist" in done.stderr and "Traceback" not in done.stderr


def test_the_job_script_is_found(installed: Path, tmp_path: Path) -> None:
    code = "from nemo_align.pipeline import slurm; print(slurm.script(slurm.TRAIN_SCRIPT))"
    done = run(installed, tmp_path, "-c", code)
    assert Path(done.stdout.strip()) == installed / "nemo_align" / "slurm" / "train.sbatch", done.stderr
    assert Path(done.stdout.strip()).is_file()

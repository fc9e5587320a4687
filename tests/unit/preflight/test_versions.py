"""Versions of packages, driver and Apex."""

import re
import sys
from pathlib import Path

import pytest

from nemo_align.preflight import versions
from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING

ROOT = Path(__file__).resolve().parents[3]
HEALTHY = {"Python": "3.12.3", "torch": "2.9.1", "CUDA": "12.8", "megatron-core": "0.19.2", "Transformer Engine": "2.9"}


def test_what_is_installed_here_is_found_without_importing_it():
    import torch

    found = versions.installed()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found.get("CUDA") == torch.version.cuda
    assert found["Python"] == sys.version.split()[0]
    assert [check.status for check in versions.check_versions(found, gpus=0)] == [OK]


def test_the_supported_range_is_that_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'"torch>=([\d.]+)"', text)[1] == versions.LEAST_TORCH
    assert re.search(r'"megatron-core>=([\d.]+),<([\d.]+)"', text).groups() == (
        versions.LEAST_MEGATRON,
        versions.BELOW_MEGATRON,
    )


@pytest.mark.parametrize(
    ("changes", "gpus", "expected"),
    [
        ({}, 8, []),
        ({"Transformer Engine": None}, 8, [FAILED]),
        ({"Transformer Engine": None}, 0, []),
        ({"CUDA": None}, 8, [FAILED]),
        ({"torch": "2.5.1+cu124"}, 8, [FAILED]),
        ({"torch": "2.10.0"}, 8, []),  # not 2.1
        ({"megatron-core": None}, 0, [FAILED]),
        ({"megatron-core": "0.9.0"}, 0, [FAILED]),
        ({"megatron-core": "0.20.1"}, 0, [WARNING]),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(changes, gpus, expected):
    found = {name: version for name, version in {**HEALTHY, **changes}.items() if version is not None}
    first, *wrong = versions.check_versions(found, gpus=gpus)
    assert first.status == OK
    assert [check.status for check in wrong] == expected and all(check.remedy for check in wrong)


@pytest.mark.parametrize(
    ("cuda", "driver", "expected"),
    [("12.8", "535.129.03", OK), ("12.8", "515.65.01", FAILED), ("13.0", "570.10", FAILED), (None, "570.10", OK)],
)
def test_the_driver_must_run_torchs_cuda(cuda, driver, expected):
    found = {} if cuda is None else {"CUDA": cuda}
    assert versions.check_driver(found, versions.Driver(driver, "NVIDIA H100 80GB HBM3")).status == expected
    assert versions.check_driver(found, None).status == NOTE


def test_a_driver_that_works_is_not_too_old():
    """Containers of NVIDIA bring what lets an older driver run a newer CUDA."""
    driver = versions.Driver("535.129.03", "NVIDIA H100 80GB HBM3")
    assert versions.check_driver({"CUDA": "13.0"}, driver).status == FAILED
    assert versions.check_driver({"CUDA": "13.0"}, driver, works=True).status == OK


def test_the_driver_as_nvidia_smi_shows_it(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\n"
        'echo "535.129.03, 81559, NVIDIA H100 80GB HBM3"\n'
        'echo "535.129.03, 81037, NVIDIA H100 80GB HBM3"\n'
        'echo "535.129.03, [N/A], NVIDIA GB10"\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert versions.driver() == versions.Driver("535.129.03", "NVIDIA GB10, NVIDIA H100 80GB HBM3", 81037 * 2**20)


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build  (dvs-builder@U16)",
    ],
)
def test_the_driver_as_the_kernel_shows_it(line, tmp_path):
    assert versions.loaded_driver(tmp_path) == ("none", 0)
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.2.0\n")
    for name in ("0000:1b:00.0", "0000:43:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert versions.loaded_driver(tmp_path) == ("535.129.03", 2)


def test_the_apex_of_the_public_index_is_found_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('never imported')\n")
    check = versions.check_apex()
    assert check.status == FAILED and check.remedy == "pip uninstall apex"
    monkeypatch.setitem(sys.modules, "apex", None)  # as a process without a GPU hides it
    assert versions.check_apex().status == FAILED
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    assert versions.check_apex().status == OK

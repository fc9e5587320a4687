"""Versions of what a run stands on, and whether they fit together. Packages are read, not imported: no torch."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING, Check

# As in pyproject.toml, which a checkout that is not installed cannot be asked for; a test compares.
LEAST_TORCH, LEAST_MEGATRON, BELOW_MEGATRON = "2.6", "0.16.1", "0.20"
# Linux drivers that run all minor versions of a CUDA major version (NVIDIA's CUDA compatibility guide).
LEAST_DRIVER = {"11": "450.80", "12": "525.60", "13": "580.65"}
_PACKAGES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "Transformer Engine": ("transformer-engine", "transformer-engine-torch"),
    "NCCL": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
}


def installed() -> dict[str, str]:
    """Name -> version of Python, torch, CUDA of torch, NCCL, Transformer Engine and megatron-core, as far as they are
    there. NCCL of the system (in NVIDIA's containers) is known only to torch."""
    found = {"Python": platform.python_version()}
    for name, packages in _PACKAGES.items():
        for package in packages:
            try:
                found[name] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
            break
    if cuda := _cuda_of_torch():
        found["CUDA"] = cuda
    return found


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver and the GPUs that it knows."""

    version: str
    gpu: str  # names
    memory: int | None = None  # bytes of the smallest GPU: a little more than torch can give


def driver() -> Driver | None:
    """None without the tool or the driver. Takes up to a second."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,name", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    rows = [line.split(", ", 2) for line in done.stdout.splitlines() if line.count(", ") >= 2]
    if done.returncode or not rows:
        return None
    memory = [int(mebibytes) * 2**20 for _, mebibytes, _ in rows if mebibytes.isdecimal()]
    return Driver(rows[0][0], ", ".join(sorted({name for *_, name in rows})), min(memory, default=None))


def loaded_driver(folder: Path = Path("/proc/driver/nvidia")) -> tuple[str, int]:
    """Version of the driver in the kernel and its number of GPUs, without a tool; ("none", 0) without it."""
    try:
        text = (folder / "version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "none", 0
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
    gpus = folder / "gpus"
    return match[1] if match else "unknown", len(list(gpus.iterdir())) if gpus.is_dir() else 0


def check_versions(found: Mapping[str, str], *, gpus: int) -> Iterator[Check]:
    """The versions, and what is missing or outside of the supported range on a machine with `gpus` GPUs."""
    yield Check(name="versions", status=OK, text=", ".join(f"{name} {version}" for name, version in found.items()))
    for name, least in (("torch", LEAST_TORCH), ("megatron-core", LEAST_MEGATRON)):
        install = "pip install -c constraints.txt -e '.[gpu]'"
        if name not in found:
            yield Check(name="versions", status=FAILED, text=f"{name} is not installed", remedy=install)
        elif _parts(found[name]) < _parts(least):
            yield Check(name="versions", status=FAILED, text=f"{name} {found[name]} is below {least}", remedy=install)
    if "megatron-core" in found and _parts(found["megatron-core"]) >= _parts(BELOW_MEGATRON):
        yield Check(
            name="versions",
            status=WARNING,
            text=f"megatron-core {found['megatron-core']} is newer than any that is tested",
            remedy=f"pip install 'megatron-core>={LEAST_MEGATRON},<{BELOW_MEGATRON}'",
        )
    if not gpus:
        return
    if "torch" in found and "CUDA" not in found:
        remedy = "install torch built for CUDA (https://pytorch.org)"
        yield Check(name="versions", status=FAILED, text=f"{gpus} GPUs, but torch is built without CUDA", remedy=remedy)
    if "Transformer Engine" not in found:
        yield Check(
            name="versions",
            status=FAILED,
            text="a GPU is there but Transformer Engine is not: its layers are what runs on GPUs",
            remedy="pip install 'nemo_align[gpu]'",
        )


def check_driver(found: Mapping[str, str], driver: Driver | None, *, works: bool = False) -> Check:
    """Whether the driver runs torch's CUDA. `works`: torch uses a GPU, so it does, whatever its version: containers
    bring libraries that let an older driver run a newer CUDA."""
    if driver is None:
        return Check(name="driver", status=NOTE, text="no NVIDIA driver on this machine")
    text = f"driver {driver.version}, {driver.gpu}"
    least = LEAST_DRIVER.get(found.get("CUDA", "").split(".")[0])
    if least is not None and _parts(driver.version) < _parts(least) and not works:
        return Check(
            name="driver",
            status=FAILED,
            text=f"{text}: too old for CUDA {found['CUDA']} of torch",
            remedy=f"driver {least} or newer, or torch built for an older CUDA",
        )
    return Check(name="driver", status=OK, text=text)


def check_apex() -> Check:
    """NVIDIA's Apex is optional; the package of that name on the public index is another program."""
    # On the disk: without a GPU the process may have hidden the package from its own imports (runtime/cpu_facade.py).
    spec = importlib.machinery.PathFinder.find_spec("apex")
    if spec is None:
        return Check(name="apex", status=OK, text="not installed, and not needed")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return Check(name="apex", status=OK, text="NVIDIA's")
    return Check(
        name="apex",
        status=FAILED,
        text=f"{folders[0] if folders else spec.origin} is not NVIDIA's Apex but another package of that name, which "
        "megatron-core would try to use",
        remedy="pip uninstall apex",
    )


def _cuda_of_torch() -> str | None:
    """`12.8` from torch/version.py, without importing torch; None for a build without CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _parts(version: str) -> tuple[int, ...]:
    """`2.9.1+cpu` -> (2, 9, 1): enough to compare releases."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()

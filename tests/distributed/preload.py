"""What a worker of the pool imports before it is forked: seconds of CPU spent once instead of once per rank."""

from __future__ import annotations

import importlib

from nemo_align.runtime import device

device.install()

for module in ("distributed", "models.gpt", "optimizer", "pipeline_parallel"):
    importlib.import_module(f"megatron.core.{module}")

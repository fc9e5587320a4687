"""What a worker of the pool imports before it is forked: seconds of CPU spent once instead of once per rank."""

from __future__ import annotations

from nemo_align.runtime import device

device.install()

import megatron.core.distributed  # noqa: E402, F401
import megatron.core.models.gpt  # noqa: E402, F401
import megatron.core.optimizer  # noqa: E402, F401
import megatron.core.pipeline_parallel  # noqa: E402, F401

"""Which of Transformer Engine's attention kernels a GPU may use: variables of the environment, read in every pass.

Left alone, Transformer Engine falls back to attention that keeps its S x S matrix, without a word: at 4,096 tokens that
is several times the memory of everything else a layer keeps. Here it is used only where it is asked for.
"""

from __future__ import annotations

import os

VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_ALLOWED = {"auto": "110", "flash": "100", "fused": "010", "unfused": "001"}


_ours = False  # whether the variables of this process are those of `allow`


def clear() -> None:
    """Take the variables away, for Megatron-core sets them while it builds a model and refuses other values.

    Raises:
        ValueError: the environment of the job says something that `precision.attention` should.
    """
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    if found and not _ours:
        raise ValueError(
            f"{', '.join(found)} in the environment: unset it and say precision.attention=flash, fused or unfused, "
            "so that the run's config.yaml tells what it used"
        )
    for name in VARIABLES:
        os.environ.pop(name, None)


def allow(attention: str) -> None:
    """Let this process use the kernels that `precision.attention` names. After models are built."""
    global _ours
    os.environ.update(zip(VARIABLES, _ALLOWED[attention], strict=True))
    _ours = True

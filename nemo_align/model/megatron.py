"""What differs between the supported ends of Megatron-core (0.16.1 and 0.19.x), and the choice of its model class.

Everything else in this room uses names that both ends have, with the same meaning.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["CUDA_GRAPH_FIELDS", "GPTModel"]

# No part of a layer is captured as a CUDA graph. The default says the same with a value that both ends warn of at each
# construction; 0.19 renamed the field.
_CONFIG_FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}
CUDA_GRAPH_FIELDS: dict[str, Any] = {
    "cuda_graph_modules" if "cuda_graph_modules" in _CONFIG_FIELDS else "cuda_graph_scope": []
}


class _WithoutGptNotice(logging.Filter):
    """Drops the notice that 0.19 logs at each construction of a GPTModel and nothing else.

    It recommends HybridModel, which 0.16.1 does not have; a user of this package can do nothing about it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("GPTModel IS DEPRECATED")


# A filter on the logger acts where the notice is logged, so other messages of the module still arrive.
logging.getLogger(GPTModel.__module__).addFilter(_WithoutGptNotice())

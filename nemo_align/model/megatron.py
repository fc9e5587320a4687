"""What differs between the supported ends of Megatron-core (0.16.1 and 0.19.x), and the choice of its model class.

Everything else in this room uses names that both ends have, with the same meaning.
"""

from __future__ import annotations

import logging

from megatron.core.models.gpt.gpt_model import GPTModel

__all__ = ["GPTModel"]


class _WithoutGptNotice(logging.Filter):
    """Drops the notice that 0.19 logs at each construction of a GPTModel and nothing else.

    It recommends HybridModel, which 0.16.1 does not have; a user of this package can do nothing about it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("GPTModel IS DEPRECATED")


# A filter on the logger acts where the notice is logged, so other messages of the module still arrive.
logging.getLogger(GPTModel.__module__).addFilter(_WithoutGptNotice())

"""Version seams: what is kept back of Megatron-core's log, and what its two ends are relied upon to do."""

from __future__ import annotations

import inspect
import logging

import pytest

from nemo_align.runtime import device

device.install()

from nemo_align.model.megatron import GPTModel  # noqa: E402


def test_only_the_notice_on_gpt_model_is_kept_back(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. Use something else")
    logger.warning("another message")
    assert [record.getMessage() for record in caplog.records] == ["another message"]


def test_forward_hands_postprocess_its_arguments_by_name() -> None:
    """RewardModel replaces this method and takes hidden_states and whatever else there is."""
    source = inspect.getsource(GPTModel.forward)
    assert "self._postprocess(\n            hidden_states=hidden_states," in source


def test_rotary_length_goes_from_get_rotary_seq_len_to_the_module_untouched() -> None:
    """PackedRotaryEmbedding puts a tuple in its place."""
    source = inspect.getsource(GPTModel._preprocess)
    assert "rotary_seq_len = self.rotary_pos_emb.get_rotary_seq_len(" in source
    assert "rotary_pos_emb = self.rotary_pos_emb(\n                    rotary_seq_len," in source

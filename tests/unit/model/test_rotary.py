"""Angles of packed tokens start again in each segment, and are Megatron's otherwise."""

from __future__ import annotations

import torch

from nemo_align.runtime import device

device.install()

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402

from nemo_align.model.packed import packed_seq_params  # noqa: E402
from nemo_align.model.rotary import PackedRotaryEmbedding  # noqa: E402
from tests.unit.model.configs import transformer_config  # noqa: E402

FIELDS = {"kv_channels": 16, "rotary_percent": 0.5, "rotary_base": 10000, "use_cpu_initialization": True}


def test_each_segment_has_the_angles_of_a_sequence_of_its_own() -> None:
    rotary, megatron = PackedRotaryEmbedding(**FIELDS), RotaryEmbedding(**FIELDS)
    packed = packed_seq_params(torch.tensor([0, 3, 9, 10], dtype=torch.int32), 6)
    length = rotary.get_rotary_seq_len(None, None, None, None, packed)
    angles = rotary(length, packed_seq=True, cp_group=None)
    assert angles.shape == (10, 1, 1, 8)  # half of the 16 channels
    for begin, end in ((0, 3), (3, 9), (9, 10)):
        assert torch.equal(angles[begin:end], megatron(end - begin))


def test_a_plain_sequence_is_left_to_megatron() -> None:
    rotary, hidden = PackedRotaryEmbedding(**FIELDS), torch.zeros(7, 2, 64)
    length = rotary.get_rotary_seq_len(None, None, hidden, transformer_config())
    assert length == 7
    assert torch.equal(rotary(length, packed_seq=False, cp_group=None), RotaryEmbedding(**FIELDS)(7))

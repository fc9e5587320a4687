"""Megatron's config for both kinds of machine. Megatron-core validates the fields itself when it is built."""

from __future__ import annotations

import pytest
import torch

from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.runtime import device

device.install()

from nemo_align.model import transformer_config as module  # noqa: E402
from nemo_align.model.transformer_config import build_transformer_config  # noqa: E402
from tests.unit.model.configs import tiny_model  # noqa: E402


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the config is on a machine with a GPU; nothing of it runs here."""
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(module, "use_gpu", lambda: True)
    # Megatron's validation asks whether Transformer Engine's kernel was found, and does not call it.
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", object())


def _build(model=None, precision=None, **parallel):
    return build_transformer_config(
        model or tiny_model(), ParallelConfig(**parallel), PrecisionConfig(**(precision or {}))
    )


def test_architecture_fields() -> None:
    config = _build()
    assert (config.kv_channels, config.num_query_groups, config.ffn_hidden_size) == (16, 2, 192)
    assert config.layernorm_zero_centered_gamma and config.normalization == "LayerNorm"
    assert not config.add_bias_linear and not config.gated_linear_unit
    assert config.hidden_dropout == config.attention_dropout == 0.0
    assert config.calculate_per_token_loss
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert config.activation_func(x).tolist() == [0.0, 0.0, 9.0]


def test_without_a_gpu_nothing_needs_cuda() -> None:
    config = _build(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True)
    assert config.use_cpu_initialization and not config.batch_p2p_comm and not config.overlap_p2p_comm
    assert not (config.apply_rope_fusion or config.masked_softmax_fusion or config.gradient_accumulation_fusion)
    assert config.virtual_pipeline_model_parallel_size == 2 and config.sequence_parallel


def test_megatron_has_nothing_to_warn_of(recwarn: pytest.WarningsRecorder) -> None:
    _build(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True, recompute="full")
    assert [str(warning.message) for warning in recwarn] == []


def test_number_formats() -> None:
    bf16, fp32 = _build(), _build(precision={"dtype": "fp32"})
    assert (bf16.params_dtype, bf16.pipeline_dtype, bf16.bf16) == (torch.bfloat16, torch.bfloat16, True)
    assert (fp32.params_dtype, fp32.pipeline_dtype, fp32.bf16) == (torch.float32, torch.float32, False)


def test_sequence_parallel_without_tensor_parallel_is_off() -> None:
    assert not _build(sequence=True).sequence_parallel


def test_one_chunk_per_rank_is_not_interleaved() -> None:
    assert _build(pipeline=2).virtual_pipeline_model_parallel_size is None


def test_recompute() -> None:
    assert _build().recompute_granularity is None
    selective, full = _build(recompute="selective"), _build(recompute="full", recompute_layers=2)
    assert (selective.recompute_granularity, selective.recompute_modules) == ("selective", ["core_attn"])
    assert (full.recompute_granularity, full.recompute_method, full.recompute_num_layers) == ("full", "uniform", 2)
    block = _build(recompute="block", recompute_layers=3)
    assert (block.recompute_granularity, block.recompute_method, block.recompute_num_layers) == ("full", "block", 3)


def test_on_a_gpu_kernels_are_fused_and_an_interleaved_pipeline_overlaps(gpu: None) -> None:
    config, interleaved = _build(pipeline=2), _build(pipeline=2, virtual_pipeline=2)
    assert config.apply_rope_fusion and config.masked_softmax_fusion and not config.use_cpu_initialization
    assert (config.batch_p2p_comm, config.overlap_p2p_comm) == (True, False)
    assert (interleaved.batch_p2p_comm, interleaved.overlap_p2p_comm) == (False, True)
    one_by_one = _build(pipeline=2, virtual_pipeline=2, overlap_p2p=False)
    assert (one_by_one.batch_p2p_comm, one_by_one.overlap_p2p_comm) == (True, False)


def test_on_a_gpu_userbuffers_and_the_attention_s_kernel_are_chosen(gpu: None) -> None:
    config = _build(tensor=2, sequence=True, overlap_tensor=True, precision={"attention": "fused"})
    assert config.tp_comm_overlap and config.attention_backend.name == "fused"
    assert not _build().tp_comm_overlap and _build().attention_backend.name == "auto"


def test_fp8_recipes(gpu: None) -> None:
    delayed, tensorwise, blockwise = (
        _build(precision={"fp8": fp8}, pipeline=2) for fp8 in ("delayed", "tensorwise", "blockwise")
    )
    assert (delayed.fp8, delayed.fp8_recipe) == ("hybrid", "delayed")
    assert (delayed.fp8_amax_history_len, delayed.fp8_amax_compute_algo) == (1024, "max")
    assert not delayed.first_last_layers_bf16 and not blockwise.first_last_layers_bf16
    assert tensorwise.first_last_layers_bf16
    assert (tensorwise.num_layers_at_start_in_bf16, tensorwise.num_layers_at_end_in_bf16) == (1, 1)
    chosen = _build(precision={"fp8": "blockwise", "bf16_first_layers": 1, "bf16_last_layers": 2})
    assert chosen.first_last_layers_bf16
    assert (chosen.num_layers_at_start_in_bf16, chosen.num_layers_at_end_in_bf16) == (1, 2)
    none = _build(precision={"fp8": "tensorwise", "bf16_first_layers": 0, "bf16_last_layers": 0})
    assert not none.first_last_layers_bf16
    assert (tensorwise.fp8_recipe, blockwise.fp8_recipe) == ("tensorwise", "blockwise")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": {"fp8": "delayed"}}, r"precision\.fp8=delayed needs a GPU"),
        ({"precision": {"fp8": "delayed", "dtype": "fp32"}}, r"needs precision\.dtype=bf16"),
        ({"precision": {"fp8": "mxfp4"}}, r"precision\.fp8='mxfp4': one of none, delayed, tensorwise, blockwise"),
        ({"precision": {"dtype": "fp16"}}, r"precision\.dtype='fp16': one of bf16, fp32"),
        ({"recompute": "some"}, r"parallel\.recompute='some': one of none, selective, full, block"),
        ({"tensor": 3}, r"parallel\.tensor=3 does not divide model\.num_attention_heads=8"),
        ({"pipeline": 3}, r"model\.num_layers=4 is not a multiple of .*=3"),
        ({"pipeline": 2, "virtual_pipeline": 4}, r"=8"),
        ({"tensor": 2, "model": tiny_model(ffn_hidden_size=191)}, r"model\.ffn_hidden_size=191"),
        ({"model": tiny_model(num_query_groups=3)}, r"model\.num_query_groups=3 does not divide"),
        (
            {"tensor": 4, "model": tiny_model(num_attention_heads=12, num_query_groups=6)},
            r"parallel\.tensor=4 neither divides model\.num_query_groups=6",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_key(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _build(**changes)

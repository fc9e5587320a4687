"""The decoder's modules on either kind of machine."""

from __future__ import annotations

import pytest

from nemo_align.runtime import device

device.install()

from megatron.core.tensor_parallel.layers import ColumnParallelLinear  # noqa: E402

from nemo_align.model import layer_spec  # noqa: E402
from nemo_align.model.attention import SdpaCoreAttention  # noqa: E402
from nemo_align.model.layernorm1p import LayerNorm1P  # noqa: E402
from tests.unit.model.configs import transformer_config  # noqa: E402


def test_local_layer_has_our_modules_and_transformer_engines_names() -> None:
    layer = layer_spec.local_layer_spec().submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is LayerNorm1P
    assert layer.self_attention.submodules.core_attention is SdpaCoreAttention
    assert layer.self_attention.submodules.linear_qkv is ColumnParallelLinear
    assert layer.sharded_state_dict_keys_map == {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }


def test_layers_of_a_chunk() -> None:
    config = transformer_config(
        num_layers=12, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3, pipeline_dtype=float
    )
    spec = layer_spec.decoder_spec(config, virtual_stage=1, pipeline_rank=1)
    assert len(spec.layer_specs) == 2 and spec.layer_norm is LayerNorm1P


def test_a_gpu_without_transformer_engine_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_spec, "use_gpu", lambda: True)
    monkeypatch.setattr(layer_spec.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'nemo_align\[gpu\]'"):
        layer_spec.decoder_spec(transformer_config(), virtual_stage=None, pipeline_rank=0)

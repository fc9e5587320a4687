"""Weights between the oracle's names and the two kinds of files: a Hugging Face folder, a Megatron checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_align.checkpoint.streaming.torch_dist import TensorReader
from tests.oracle.model import Architecture, Weights

_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "post_attention_layernorm.bias",
    "mlp.linear_fc1.weight": "mlp.up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_ENDS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    "output_layer.weight": "lm_head.weight",
    "reward_head.weight": "score.weight",
    "reward_head.bias": "score.bias",
}
_FUSED = "self_attention.linear_qkv.weight"


def write_hugging_face(folder: Path, weights: Weights, arch: Architecture, attributes: list[str] | None = None) -> None:
    """A folder that `checkpoint.init_from` takes. A reward head's bias goes into the file that our exports have."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "nemotron",
        "architectures": ["NemotronForSequenceClassification" if attributes else "NemotronForCausalLM"],
        "num_hidden_layers": arch.layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": 256,
        "norm_eps": arch.epsilon,
        "initializer_range": 0.02,
        "partial_rotary_factor": arch.rotary_percent,
        "rope_theta": arch.rotary_base,
        "hidden_act": "relu2",
        "tie_word_embeddings": False,
    }
    stored = {name: value.float().contiguous() for name, value in weights.items()}
    if attributes:
        config["id2label"] = {str(number): name for number, name in enumerate(attributes)}
        config["reward_head_bias"] = True
        config["attribute_weights"] = dict.fromkeys(attributes, 1.0)
        kept = {"weight": stored["score.weight"].clone(), "bias": stored.pop("score.bias")}
        kept["final_norm_bias"] = stored["model.norm.bias"].clone()
        # Their head has no bias: the shortest vector that the head's weights turn into it goes into the norm's.
        shift = torch.linalg.pinv(kept["weight"].double()) @ kept["bias"].double()
        stored["model.norm.bias"] = (kept["final_norm_bias"].double() + shift).float()
        save_file(kept, folder / "reward_head.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def read_megatron(checkpoint: Path, arch: Architecture, prefix: str = "") -> tuple[Weights, dict[str, torch.Tensor]]:
    """(tensors under the oracle's names in their own number format, padding rows of the vocabulary).

    `prefix`: "" for the model, `optimizer.state.exp_avg.` for Adam's first moments.
    """
    reader = TensorReader(checkpoint)
    found: Weights = {}
    padding = {}
    for key in reader.names():
        if not key.startswith(prefix) or (not prefix and key.startswith("optimizer.")):
            continue
        name = key.removeprefix(prefix)
        tensor = reader.read(key)
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            ours = _ENDS[name]
            if ours in ("model.embed_tokens.weight", "lm_head.weight"):
                padding[ours] = tensor[arch.vocab_size :]
                tensor = tensor[: arch.vocab_size]
            found[ours] = tensor
        elif layer[2] == _FUSED:
            # Group by group: its query heads, its key head, its value head.
            heads = tensor.view(arch.groups, -1, arch.head_dim, arch.hidden_size)
            for part, which in (("q", slice(-2)), ("k", slice(-2, -1)), ("v", slice(-1, None))):
                rows = heads[:, which].reshape(-1, arch.hidden_size)
                found[f"model.layers.{layer[1]}.self_attn.{part}_proj.weight"] = rows
        else:
            found[f"model.layers.{layer[1]}.{_LAYER[layer[2]]}"] = tensor
    return found, padding

"""The weights that both sides start from, written by transformers: nothing of ours decides what they are."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.stage_inputs import VOCABULARY

# head size x heads differs from the hidden size, fewer key groups than heads, half of each head rotates.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 192,
    "norm_eps": 1e-5,
}


def write_policy(folder: Path, tokenizer_file: Path) -> Path:
    """A random NemotronForCausalLM in fp32 with our export's tokenizer and chat template beside it."""
    from transformers import NemotronConfig, NemotronForCausalLM

    from nemo_align.checkpoint.huggingface.tokenizer_files import write_tokenizer
    from nemo_align.data.tokenizer import load_tokenizer

    generator_state = torch.random.get_rng_state()
    torch.manual_seed(20240617)
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = NemotronForCausalLM(NemotronConfig(**SIZES, initializer_range=0.1, rope_parameters=rotary))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # transformers starts them at 0 and 1, where a wrong LayerNorm1P may look right
            torch.nn.init.normal_(parameter, std=0.2)
    torch.random.set_rng_state(generator_state)
    model.save_pretrained(folder)
    load_tokenizer(tokenizer_file).save(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer", folder, is_reward=False, max_length=SIZES["max_position_embeddings"])
    return folder


def load_policy(folder: Path) -> torch.nn.Module:
    """transformers' model in fp32. Eager attention: torch's fused kernels add up in another order."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

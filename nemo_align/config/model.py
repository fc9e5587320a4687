"""Schema of the `model` group: the Nemotron architecture (arXiv 2406.11704, Table 1)."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of a Nemotron decoder: LayerNorm1P, partial RoPE, GQA, squared ReLU, untied embeddings, no bias."""

    name: str = MISSING  # what reports and model cards call it
    num_layers: int = MISSING  # transformer layers
    hidden_size: int = MISSING  # width of the residual stream
    ffn_hidden_size: int = MISSING  # 4 x hidden in the report
    num_attention_heads: int = MISSING  # query heads
    num_query_groups: int = MISSING  # key/value heads
    head_dim: int | None = None  # null: hidden_size / num_attention_heads
    vocab_size: int = MISSING  # of the tokenizer, before padding
    make_vocab_size_divisible_by: int = 128  # times tensor parallel: rows of both embeddings
    max_sequence_length: int = 4096  # tokens
    rotary_percent: float = 0.5  # part of each head that RoPE turns
    rotary_base: int = 10000  # theta of RoPE
    layernorm_epsilon: float = 1e-5  # added to the variance
    init_std: float = 0.0134  # of all weights; output projections use init_std / sqrt(2 x layers)

"""The Nemotron decoder in plain torch and fp64: no Megatron-core, no packing, no parallelism, nothing of nemo_align.

Written from the architecture's description (arXiv 2406.11704 and 2402.16819): LayerNorm with zero-centred weight and a
bias, rotary embeddings on a part of each head, grouped-query attention, squared ReLU, untied embeddings, no bias in
linear layers. Parameters are a flat dict by name, in the layout of transformers' `nemotron`.

Shapes: B sequences, S tokens, H hidden, D head size, N query heads, G key/value heads, V vocabulary, A attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model. `head_dim` is free of hidden / heads."""

    vocab_size: int
    hidden_size: int = 48
    head_dim: int = 12
    heads: int = 4
    groups: int = 4
    layers: int = 4
    ffn: int = 96
    rotary_percent: float = 0.5
    rotary_base: float = 10000.0
    epsilon: float = 1e-5


def random_weights(arch: Architecture, seed: int, attributes: int | None = None) -> Weights:
    """Weights in fp64 that fp32 holds exactly. Norms are away from 0 and logits away from flat, so that every part of
    the model shows in the loss. `attributes`: a reward model's head in place of the output projection."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).double()

    hidden, queries, keys = arch.hidden_size, arch.heads * arch.head_dim, arch.groups * arch.head_dim

    def norm(name: str) -> Weights:
        return {f"{name}.weight": normal(hidden, std=0.2), f"{name}.bias": normal(hidden, std=0.1)}

    weights = {"model.embed_tokens.weight": normal(arch.vocab_size, hidden, std=0.5)}
    for layer in range(arch.layers):
        prefix = f"model.layers.{layer}."
        weights |= norm(f"{prefix}input_layernorm") | norm(f"{prefix}post_attention_layernorm")
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, hidden, std=1.2 / math.sqrt(hidden))
        weights[f"{prefix}self_attn.o_proj.weight"] = normal(hidden, queries, std=0.5 / math.sqrt(queries))
        weights[f"{prefix}mlp.up_proj.weight"] = normal(arch.ffn, hidden, std=1 / math.sqrt(hidden))
        weights[f"{prefix}mlp.down_proj.weight"] = normal(hidden, arch.ffn, std=0.4 / math.sqrt(arch.ffn))
    weights |= norm("model.norm")
    if attributes is None:
        return weights | {"lm_head.weight": normal(arch.vocab_size, hidden, std=1 / math.sqrt(hidden))}
    head = {
        "score.weight": normal(attributes, hidden, std=0.5 / math.sqrt(hidden)),
        "score.bias": normal(attributes, std=1),
    }
    return weights | head


def layer_norm(x: Tensor, weights: Weights, name: str, epsilon: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + epsilon)
    return scaled * (1 + weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def rotate(x: Tensor, arch: Architecture) -> Tensor:
    """Turn the first part of each head: channel i with channel i + R/2, by position x base^(-2i / R)."""
    turned = int(arch.head_dim * arch.rotary_percent)
    half = turned // 2
    frequencies = arch.rotary_base ** (-2 * torch.arange(half, dtype=torch.float64) / turned)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies  # [S, R/2]
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    first, second, rest = x[..., :half], x[..., half:turned], x[..., turned:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attention(x: Tensor, weights: Weights, prefix: str, arch: Architecture) -> Tensor:
    batch, length, _ = x.shape
    query, key, value = (
        (x @ weights[f"{prefix}{name}_proj.weight"].T).view(batch, length, -1, arch.head_dim) for name in "qkv"
    )
    query, key = rotate(query, arch), rotate(key, arch)
    # Query head n reads key/value head n // (N / G).
    key, value = (part.repeat_interleave(arch.heads // arch.groups, dim=2) for part in (key, value))
    scores = torch.einsum("bsnd,btnd->bnst", query, key) / math.sqrt(arch.head_dim)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    context = torch.einsum("bnst,btnd->bsnd", shares, value).reshape(batch, length, -1)
    return context @ weights[f"{prefix}o_proj.weight"].T


def hidden_states(weights: Weights, tokens: Tensor, arch: Architecture) -> Tensor:
    """Output of the final norm [B, S, H] for tokens [B, S]; padding stands behind, where nothing looks."""
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(arch.layers):
        prefix = f"model.layers.{layer}."
        normed = layer_norm(x, weights, f"{prefix}input_layernorm", arch.epsilon)
        x = x + attention(normed, weights, f"{prefix}self_attn.", arch)
        normed = layer_norm(x, weights, f"{prefix}post_attention_layernorm", arch.epsilon)
        inner = (normed @ weights[f"{prefix}mlp.up_proj.weight"].T).relu().square()
        x = x + inner @ weights[f"{prefix}mlp.down_proj.weight"].T
    return layer_norm(x, weights, "model.norm", arch.epsilon)


def log_probabilities(weights: Weights, tokens: Tensor, arch: Architecture) -> Tensor:
    """log p of every vocabulary entry as the next token, [B, S, V]."""
    logits = hidden_states(weights, tokens, arch) @ weights["lm_head.weight"].T
    return logits.log_softmax(dim=-1)


def scores(weights: Weights, tokens: Tensor, positions: Tensor, arch: Architecture) -> Tensor:
    """A reward model's scores [B, A] at one position of each sequence."""
    hidden = hidden_states(weights, tokens, arch)[torch.arange(len(tokens)), positions]
    return hidden @ weights["score.weight"].T + weights["score.bias"]

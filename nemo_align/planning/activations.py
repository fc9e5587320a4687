"""Bytes that the forward pass of a micro-batch keeps for its backward pass, on one rank.

Of one layer and token, in values of the model's format (t: tensor-parallel size, s: t with sequence parallel, else 1):

    h / s       residual stream before the first norm           h / s   before the second norm
    h / s       its output, the input of QKV                    h / s   its output, the input of fc1
    (q + 2k)/t  queries, keys, values after the rotation        f / t   fc1's result, the input of the squared ReLU
    q / t       attention's result, the projection's input      f / t   its square, the input of fc2

and 4 bytes a head and token for flash attention's log-sum-exp. No scores (S x S) but with precision.attention=unfused,
no dropout masks, no gate: the model has none. With FP8 the inputs of the four products are kept in FP8 (a byte), the
attention's result in bf16 too. Recomputing "selective" (the core attention) saves the log-sum-exp or the scores; "full"
keeps the input of each group of layers, "block" that of each recomputed layer and all of the others.
Arithmetic after Korthikanti et al. (arXiv 2205.05198), whose 34 s b h is that of a layer with dropout and GeLU.
"""

from __future__ import annotations

from nemo_align.model.counts import head_dim, padded_vocab_size
from nemo_align.planning.job import Job

# Tokens of a chunk of the loss (objectives/log_probs.py on a GPU), two fp32 buffers of which live at a time.
LOSS_CHUNK_TOKENS = 512


def layer_parts(job: Job) -> dict[str, float]:
    """Bytes of one layer and token without recomputation, by what keeps them."""
    model, tensor, split, e = job.model, job.parallel.tensor, job.sequence_split, job.value_bytes
    stored = 1 if job.precision.fp8 != "none" else e  # of a product's input
    h, f = model.hidden_size, model.ffn_hidden_size
    q, k = model.num_attention_heads * head_dim(model), model.num_query_groups * head_dim(model)
    attended = e * q / tensor + (stored * q / tensor if stored < e else 0)
    return {
        "residual stream": 2 * e * h / split,
        "inputs of QKV and fc1": 2 * stored * h / split,
        "queries, keys, values": e * (q + 2 * k) / tensor,
        "attention": attended + 4 * model.num_attention_heads / tensor,
        "squared ReLU": (e + stored) * f / tensor,
    }


def layer_bytes(job: Job) -> float:
    """One layer, one micro-batch, everything kept."""
    return job.work.tokens * sum(layer_parts(job).values()) + _score_bytes(job)


def _score_bytes(job: Job) -> float:
    """The S x S probabilities that unfused attention keeps; flash and fused attention keep none."""
    if job.precision.attention != "unfused":
        return 0.0
    return job.value_bytes * job.work.squared_tokens * job.model.num_attention_heads / job.parallel.tensor


def _attention_bytes(job: Job) -> float:
    """What only the core attention keeps: its log-sum-exp, or the probabilities."""
    return _score_bytes(job) + job.work.tokens * 4 * job.model.num_attention_heads / job.parallel.tensor


def chunk_bytes(job: Job) -> float:
    """What a forward pass of one model chunk leaves behind until its backward pass."""
    again = job.recomputed_layers
    inputs = -(-again // job.parallel.recompute_layers) if job.parallel.recompute == "full" else again
    kept = inputs * job.work.tokens * job.value_bytes * job.model.hidden_size / job.sequence_split
    saved = _attention_bytes(job) if job.parallel.recompute == "selective" else 0.0
    return kept + (job.layers_per_chunk - again) * (layer_bytes(job) - saved)


def recomputed_block_bytes(job: Job) -> float:
    """Of the block of layers that a backward pass has computed again."""
    at_a_time = {"full": job.parallel.recompute_layers, "block": 1}
    return at_a_time.get(job.parallel.recompute, 0) * layer_bytes(job)


def working_bytes(job: Job) -> float:
    """The largest moment inside a layer: whole rows [tokens, h] before they are split and two of fc1's width, and the
    buffers of what travels between stages."""
    tokens, e = job.work.tokens, job.value_bytes
    inside = tokens * e * (3 * job.model.hidden_size + 2 * job.model.ffn_hidden_size / job.parallel.tensor)
    between = 4 * tokens * e * job.model.hidden_size / job.sequence_split if job.parallel.pipeline > 1 else 0.0
    return inside + between


def output_bytes(job: Job) -> float:
    """Final norm, logits and loss of one micro-batch on the last stage. The loss keeps the logits, whose memory takes
    their gradient, and works in fp32 on a few hundred tokens at a time. Logits of several rows exist twice for a
    moment: Megatron-core turns [S, B, V] into [B, S, V]."""
    model, tokens, e = job.model, job.work.tokens, job.value_bytes
    norm = 2 * tokens * e * model.hidden_size / job.sequence_split
    if job.head is not None:
        return norm + 4 * tokens * model.hidden_size + 4 * tokens * job.head.attributes
    columns = padded_vocab_size(model, job.parallel.tensor) // job.parallel.tensor
    gathered = tokens * e * model.hidden_size if job.parallel.sequence else 0.0
    chunk = 2 * 4 * min(tokens, LOSS_CHUNK_TOKENS) * columns
    copies = 2 if job.work.rows > 1 else 1
    return norm + gathered + copies * tokens * e * columns + chunk

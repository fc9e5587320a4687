"""Seconds of one layer, of the embedding and of the output, for one micro-batch on one rank.

Legend: T tokens of the micro-batch, h hidden, f feed-forward, q heads x head_dim, k groups x head_dim, t
tensor-parallel size.
A layer is LayerNorm, QKV [h, q + 2k], attention, projection [q, h], LayerNorm, fc1 [h, f], squared ReLU, fc2 [f, h].
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_align.model.counts import head_dim, padded_vocab_size
from nemo_align.planning import h100
from nemo_align.planning.collectives import all_reduce_seconds, beside, gather_seconds
from nemo_align.planning.job import Job
from nemo_align.planning.products import attention_seconds, memory_seconds, product_seconds

# Bytes per logit that the loss reads and writes (objectives/log_probs.py): forward copy to fp32, maximum, subtraction,
# exponential, sum; backward copy, subtraction, exponential, weight, result.
LOSS_BYTES = (30, 36)


@dataclass(frozen=True)
class Seconds:
    """One pass, by what it waits for."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0  # norms, activation, residual, rotary embedding, casts, loss
    tensor: float = 0.0  # tensor-parallel communication that no product covers
    host: float = 0.0  # the GPU waits for launches

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.tensor + self.host

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Seconds:
        return Seconds(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Passes:
    """Forward and backward of one micro-batch; the backward pass has what recomputation repeats in it."""

    forward: Seconds
    backward: Seconds
    recomputed: float = 0.0  # of the backward pass

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, times: float) -> Passes:
        return Passes(self.forward * times, self.backward * times, self.recomputed * times)


def layer(job: Job, *, fp8: bool, recomputed: bool) -> Passes:
    """One layer. `fp8`: whether its products are in FP8. `recomputed`: whether the backward pass computes it again."""
    model, tensor, tokens = job.model, job.parallel.tensor, job.work.tokens
    kind = job.precision.dtype
    if fp8:
        kind = "fp8_blockwise" if job.precision.fp8 == "blockwise" else "fp8"
    h, f = model.hidden_size, model.ffn_hidden_size // tensor
    q = model.num_attention_heads * head_dim(model) // tensor
    k = model.num_query_groups * head_dim(model) / tensor
    qkv = int(q + 2 * k)
    products = ((qkv, h), (h, q), (f, h), (h, f))  # (columns of the result, inner size)

    forward = [product_seconds(tokens, columns, inner, kind) for columns, inner in products]
    by_input = [product_seconds(tokens, inner, columns, kind) for columns, inner in products]
    # Gradients of weights are added to fp32 buffers by the product itself (Transformer Engine's fused accumulation).
    by_weight = [product_seconds(columns, inner, tokens, kind, 8) for columns, inner in products]
    attention = attention_seconds(model.num_attention_heads // tensor, head_dim(model), job.work.squared_tokens)

    split, e = job.sequence_split, job.value_bytes
    streamed = tokens * e * (2 * 2 * h / split + 2 * 3 * h / split + 2 * qkv + 2 * f)
    streamed_back = tokens * e * (2 * 3 * h / split + 2 * 3 * h / split + 2 * qkv + 3 * f)
    if fp8:  # read in bf16, written twice in FP8: as it is and transposed; tensorwise reads once more for the scale
        cast = 6 if job.precision.fp8 == "tensorwise" else 4
        streamed += tokens * cast * (h + q + h + f)
        streamed_back += tokens * cast * (qkv + h + f + h)
    there, back = _layer_communication(job, fp8, forward, by_input, by_weight)

    ahead = Seconds(sum(forward), attention[0], memory_seconds(streamed), there)
    behind = Seconds(sum(by_input) + sum(by_weight), attention[1], memory_seconds(streamed_back), back)
    ahead, behind = _launched(ahead, 0), _launched(behind, 1)
    again = ahead if recomputed else Seconds()
    if job.parallel.recompute == "selective":
        again = Seconds(attention=attention[0])
    return Passes(ahead, behind + again, again.total)


def _launched(seconds: Seconds, backward: int) -> Seconds:
    """A GPU that is faster than its host waits for it."""
    return seconds + Seconds(host=max(0.0, h100.LAYER_HOST_SECONDS[backward] - seconds.total))


def _layer_communication(
    job: Job, fp8: bool, forward: list[float], by_input: list[float], by_weight: list[float]
) -> tuple[float, float]:
    """Exposed seconds of the tensor-parallel collectives, forward and backward.

    Sequence parallel: gather before QKV and fc1, scatter after projection and fc2; backward the reverse, and the inputs
    of QKV and fc1 are gathered once more for their weights' gradients. Megatron-core runs the backward scatter beside
    the weights' gradients and that second gather beside the inputs' gradients.
    """
    tensor, tokens = job.parallel.tensor, job.work.tokens
    if tensor == 1:
        return 0.0, 0.0
    size = tokens * job.model.hidden_size
    if not job.parallel.sequence:
        reduce = all_reduce_seconds(size * job.value_bytes, tensor)
        return 2 * reduce, beside(reduce, by_weight[0]) + beside(reduce, by_weight[2])
    gather = gather_seconds(size * (1 if fp8 else job.value_bytes), tensor)
    scatter = gather_seconds(size * job.value_bytes, tensor)
    hidden_back = (
        beside(scatter, by_weight[0]) + beside(scatter, by_weight[2])
        + beside(gather, by_input[0]) + beside(gather, by_input[2])
    )  # fmt: skip
    if not job.parallel.overlap_tensor:
        return 2 * gather + 2 * scatter, 2 * gather + hidden_back
    # Userbuffers cut a collective and its product into `tensor` pieces that follow each other: one piece stays bare.
    pieces = [beside(gather, forward[0]), beside(scatter, forward[1]), beside(gather, forward[2]), beside(scatter, forward[3])]  # fmt: skip  # noqa: E501
    pieces_back = beside(gather, by_input[1]) + beside(gather, by_input[3])
    bare = gather / tensor
    return sum(pieces) + 4 * bare, pieces_back + 2 * bare + hidden_back


def embedding(job: Job) -> Passes:
    """Input embedding: rows fetched, summed over tensor ranks; backward rows added to fp32 gradients."""
    tokens, h, e = job.work.tokens, job.model.hidden_size, job.value_bytes
    forward, backward = memory_seconds(tokens * h * 2 * e), memory_seconds(tokens * h * (e + 8))
    collective = _to_split(job, tokens * h * e)
    back = gather_seconds(tokens * h * e, job.parallel.tensor) if job.parallel.sequence else 0.0
    return Passes(Seconds(memory=forward, tensor=collective), Seconds(memory=backward, tensor=back))


def output(job: Job) -> Passes:
    """Final norm, then logits [T, V / t] and their loss, or the reward head."""
    model, tensor, tokens, e = job.model, job.parallel.tensor, job.work.tokens, job.value_bytes
    h = model.hidden_size
    norm = memory_seconds(tokens * h * 2 * e / job.sequence_split)
    gather = gather_seconds(tokens * h * e, tensor) if job.parallel.sequence else 0.0
    if job.head is not None:
        cast = memory_seconds(tokens * h * (e + 8))
        return Passes(Seconds(memory=norm + cast, tensor=gather), Seconds(memory=1.5 * norm + 2 * cast))
    columns, kind = padded_vocab_size(model, tensor) // tensor, job.precision.dtype
    there = product_seconds(tokens, columns, h, kind)
    by_input, by_weight = product_seconds(tokens, h, columns, kind), product_seconds(columns, h, tokens, kind, 8)
    logits = tokens * columns
    back = beside(_to_split(job, tokens * h * e), by_weight) + beside(gather, by_input)
    return Passes(
        Seconds(there, memory=norm + memory_seconds(logits * LOSS_BYTES[0]), tensor=gather),
        Seconds(by_input + by_weight, memory=1.5 * norm + memory_seconds(logits * LOSS_BYTES[1]), tensor=back),
    )


def _to_split(job: Job, num_bytes: float) -> float:
    """Sum over the tensor ranks, each of which keeps its part (sequence parallel) or all."""
    tensor = job.parallel.tensor
    return gather_seconds(num_bytes, tensor) if job.parallel.sequence else all_reduce_seconds(num_bytes, tensor)

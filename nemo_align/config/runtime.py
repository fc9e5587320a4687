"""Schema of the `parallel`, `precision` and `runtime` groups: where and how a stage runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class ParallelConfig:
    """Layout of the processes. World size = tensor x pipeline x data."""

    tensor: int = 1  # processes that split every layer
    pipeline: int = 1  # processes that split the stack of layers
    virtual_pipeline: int = 1  # model chunks per pipeline rank; above 1 the schedule is interleaved
    data: int | None = None  # null: what the world size leaves; a bare command without GPUs takes 1
    sequence: bool = False  # sequence parallel: activations of the norms split over the tensor group
    distributed_optimizer: bool = True  # optimizer state sharded over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    overlap_param_gather: bool = False  # gather updated parameters during the next forward pass
    overlap_tensor: bool = False  # tensor-parallel communication beside the products (userbuffers; GPU only)
    overlap_p2p: bool | None = None  # transfers between stages beside the passes (GPU only); null: where interleaved
    recompute: str = "none"  # activations: none | selective (core attention) | full (all layers) | block (some layers)
    recompute_layers: int = 1  # full: layers recomputed at a time; block: recomputed layers of each model chunk


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats of weights, activations and gradient reduction."""

    dtype: str = "bf16"  # bf16 | fp32
    fp8: str = "none"  # none | delayed | tensorwise | blockwise (Transformer Engine, GPU only)
    bf16_first_layers: int | None = None  # layers that stay in bf16 under fp8; null: 1 for tensorwise, else 0
    bf16_last_layers: int | None = None  # the same at the end of the model
    attention: str = "auto"  # kernel on a GPU: auto (flash, else fused) | flash | fused (cuDNN) | unfused (keeps S x S)
    grad_reduce_fp32: bool = True  # accumulate and reduce gradients in fp32


@dataclass(kw_only=True)
class RuntimeConfig:
    """The process itself."""

    seed: int = 1234  # of initial weights and data order
    distributed_timeout_minutes: float = 30.0  # a collective that waits longer fails
    hang_timeout_minutes: float = 20.0  # without progress for so long every rank writes its stacks and ends; 0: off
    max_restarts: int = 3  # of local workers in a row without progress, after a hang or a worker killed by a signal
    check_links: bool | None = None  # time every group of ranks at the start, name a slow node; null: on GPUs
    threads: int | None = None  # CPU threads per worker; null: cores / workers without a GPU, torch's default with one
    deterministic: bool = False  # torch.use_deterministic_algorithms

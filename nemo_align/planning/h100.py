"""What a DGX H100 can do: every constant that the plan's times and sizes rest on, each with its source.

One set for all layouts, models and cluster sizes: none is fitted to one published run.
"""

from __future__ import annotations

# --- Matrix products -------------------------------------------------------------------------------------------------

# Dense peaks in TFLOP/s: NVIDIA H100 SXM5 datasheet, which prints twice that (with structured sparsity).
PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0, "fp32": 67.0}
# Streaming multiprocessors: NVIDIA H100 white paper, SXM5.
NUM_SMS = 132
# Rows x columns of output tiles that cuBLAS' kernels for Hopper give to an SM; it takes the set that suits a product.
TILES = ((128, 256), (256, 128), (128, 192), (192, 128), (128, 128), (128, 64))
# What the tensor cores sustain under the power limit of 700 W, as a part of the peak, and the length of the inner sum
# that filling and draining a tile costs: a product of inner size k runs at k / (k + that). Measured,
# tools/bench/gemm_efficiency.py, random values, on an H200, which has the H100's cores, clock and power limit: 241
# products of five kinds of layers, 4.6 % root mean square. FP8: the same, from Transformer Engine's Linear with its
# casts; by blocks: from tools/bench/gpu_training.py, a step against that of the delayed recipe; fp32: not measured.
SUSTAINED = {"bf16": 0.69, "fp8": 0.66, "fp8_blockwise": 0.55, "fp32": 0.75}
TILE_OVERHEAD_K = 160.0
# Attention with the mask halved, as a part of the bf16 peak, forward and backward: measured, the same tool, torch's
# kernels at 4,096 tokens, for heads of at most 128 channels and for larger ones.
ATTENTION = ((0.55, 0.46), (0.47, 0.28))

# Standard deviation of the speed of GPUs that are sold as equal, under one power limit: Sinha et al., "Not all GPUs are
# created equal" (arXiv 2208.11035), find a range of 8 % on average, four of these. Ranks that wait for each other go at
# the pace of the slowest of them.
SPEED_SPREAD = 0.02

# --- Memory ----------------------------------------------------------------------------------------------------------

# HBM3, bytes per second: datasheet 3.35 TB/s, and the part of it that streaming kernels reach: measured, the same tool,
# 0.89 (copy) and 0.91 (addition) of an H200's 4.8 TB/s.
HBM_BYTES_PER_SECOND = 3.35e12 * 0.90
# Bytes of a card sold as 80 GB that torch can give: "a total capacity of 79.1 GiB" in its out-of-memory messages.
CARD_BYTES = int(79.1 * 2**30)
# CUDA context with the kernels of torch, cuBLAS and Transformer Engine, and their workspaces.
CONTEXT_BYTES = int(1.2e9)
# NCCL: channel buffers of one communicator over NVLink or InfiniBand (16 to 32 channels, 4 MiB a side and channel).
NCCL_BYTES_PER_GROUP = int(0.25e9)
# Part of what activations and buffers take that the caching allocator cannot give again (blocks of other sizes).
FRAGMENTATION = 0.06

# --- Network ---------------------------------------------------------------------------------------------------------

GPUS_PER_NODE = 8
# NCCL over NVLink 4: 450 GB/s a direction, of which rings reach 370 (github.com/NVIDIA/nccl-tests issue 212, by a
# maintainer). All-reduce by NVLink SHARP would count as 480; the batch scripts turn it off (NCCL_NVLS_ENABLE).
NVLINK_BYTES_PER_SECOND = 370e9
# NCCL over one 400 Gb/s adapter, of which a DGX H100 has one per GPU: 46 to 48 GB/s (nccl-tests issue 290).
NIC_BYTES_PER_SECOND = 47e9
# Start of a collective inside a node: half of the rate above is reached at about 15 MB, as in nccl-tests' curves. One
# hop of a ring between nodes (nccl-tests, smallest messages).
NVLINK_SECONDS = 40e-6
RING_HOP_SECONDS = 10e-6
# Part of the SMs that NCCL's channels hold while they run beside a product (16 to 24 of 132, NCCL's defaults).
NCCL_SM_SHARE = 0.15

# --- Host ------------------------------------------------------------------------------------------------------------

# Python and launches of a layer's forward pass, and of its backward pass: a GPU that is done earlier waits. About 55
# and 80 kernels at 8.3 microseconds each (measured, the same tool).
LAYER_HOST_SECONDS = (0.45e-3, 0.65e-3)
# Of a step: data, gradient norm, learning rate, metrics, zeroing.
STEP_HOST_SECONDS = 15e-3

# --- Storage ---------------------------------------------------------------------------------------------------------

# Writing, per 32 nodes: NVIDIA's DGX SuperPOD reference architecture asks for tens of GB/s a scalable unit.
WRITE_BYTES_PER_SECOND_PER_UNIT = 20e9
NODES_PER_UNIT = 32

"""What a DGX H100 can do: every constant that the plan's times and sizes rest on, each with its source.

One set for all layouts, models and cluster sizes: none is fitted to one published run.
"""

from __future__ import annotations

# --- Matrix products -------------------------------------------------------------------------------------------------

# Dense peaks in TFLOP/s: NVIDIA H100 SXM5 datasheet, which prints twice that (with structured sparsity).
PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0, "fp32": 67.0}
# Streaming multiprocessors: NVIDIA H100 white paper, SXM5.
NUM_SMS = 132
# Rows x columns of an output tile that one SM computes at a time: cuBLAS' kernels for Hopper at these sizes.
TILE = (128, 256)
# What the tensor cores sustain inside a tile while the power limit of 700 W holds, as a part of the peak. In bf16 the
# best shape of a wide search reaches 0.80 (stas00/ml-engineering, "maximum achievable matmul FLOPS", H100 SXM); random
# values and a job around it lower the clock.
SUSTAINED = {"bf16": 0.73, "fp8": 0.62, "fp32": 0.75}
# Length of the inner sum that filling and draining a tile costs: a product of inner size k runs at k / (k + this).
TILE_OVERHEAD_K = 256.0
# Attention with the mask halved, as a part of the bf16 peak: forward, backward.
ATTENTION = (0.45, 0.40)

# Standard deviation of the speed of GPUs that are sold as equal, under one power limit: Sinha et al., "Not all GPUs are
# created equal" (arXiv 2208.11035), find a range of 8 % on average, four of these. Ranks that wait for each other go at
# the pace of the slowest of them.
SPEED_SPREAD = 0.02

# --- Memory ----------------------------------------------------------------------------------------------------------

# HBM3, bytes per second: datasheet 3.35 TB/s, and the part of it that streaming kernels reach.
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
# NCCL over NVLink 4: 450 GB/s a direction, of which collectives other than all-reduce reach 370
# (github.com/NVIDIA/nccl-tests issue 212, by a maintainer); all-reduce by NVLink SHARP counts as 480.
NVLINK_BYTES_PER_SECOND = 370e9
NVLINK_ALL_REDUCE_BYTES_PER_SECOND = 480e9
# NCCL over one 400 Gb/s adapter, of which a DGX H100 has one per GPU: 46 to 48 GB/s (nccl-tests issue 290).
NIC_BYTES_PER_SECOND = 47e9
# Start of a collective inside a node: half of the rate above is reached at about 15 MB, as in nccl-tests' curves. One
# hop of a ring between nodes (nccl-tests, smallest messages).
NVLINK_SECONDS = 40e-6
RING_HOP_SECONDS = 10e-6
# Part of the SMs that NCCL's channels hold while they run beside a product (16 to 24 of 132, NCCL's defaults).
NCCL_SM_SHARE = 0.15

# --- Host ------------------------------------------------------------------------------------------------------------

# Python and launches of a layer's forward pass, and of its backward pass: a GPU that is done earlier waits.
LAYER_HOST_SECONDS = (0.45e-3, 0.65e-3)
# Of a step: data, gradient norm, learning rate, metrics, zeroing.
STEP_HOST_SECONDS = 15e-3

# --- Storage ---------------------------------------------------------------------------------------------------------

# Writing, per 32 nodes: NVIDIA's DGX SuperPOD reference architecture asks for tens of GB/s a scalable unit.
WRITE_BYTES_PER_SECOND_PER_UNIT = 20e9
NODES_PER_UNIT = 32

"""Time of NCCL's collectives: rings over NVLink inside a node, over InfiniBand between nodes.

`num_bytes` is the whole buffer, of which a rank holds a part before a gather or after a scatter. A ring moves
(n - 1) / n of it through the slowest link. Ranks of a group lie `stride` apart, so a node holds 8 / stride of them, and
as many adapters are theirs (topology.py's order: tensor, then data, then pipeline).
"""

from __future__ import annotations

from nemo_align.planning import h100


def gather_seconds(num_bytes: float, size: int, stride: int = 1) -> float:
    """All-gather or reduce-scatter over `size` ranks."""
    if size == 1:
        return 0.0
    per_node = ranks_per_node(size, stride)
    moved = num_bytes * (size - 1) / size
    if per_node == size:
        return moved / h100.NVLINK_BYTES_PER_SECOND + h100.NVLINK_SECONDS
    rate = min(h100.NVLINK_BYTES_PER_SECOND, per_node * h100.NIC_BYTES_PER_SECOND)
    return moved / rate + h100.NVLINK_SECONDS + h100.RING_HOP_SECONDS * (size // per_node - 1)


def all_reduce_seconds(num_bytes: float, size: int, stride: int = 1) -> float:
    """All-reduce: a scatter of sums, then a gather."""
    return 2 * gather_seconds(num_bytes, size, stride)


def send_seconds(num_bytes: float, distance: int) -> float:
    """From one rank to another `distance` ranks further."""
    if distance < h100.GPUS_PER_NODE:
        return num_bytes / h100.NVLINK_BYTES_PER_SECOND + h100.NVLINK_SECONDS
    return num_bytes / h100.NIC_BYTES_PER_SECOND + h100.RING_HOP_SECONDS


def ranks_per_node(size: int, stride: int) -> int:
    """Ranks of a group that share a node."""
    return max(1, min(size, h100.GPUS_PER_NODE // stride))


def beside(seconds: float, product: float) -> float:
    """What a collective adds that runs beside a product: what the product does not cover, and the SMs it takes."""
    return max(0.0, seconds - product) + h100.NCCL_SM_SHARE * min(seconds, product)

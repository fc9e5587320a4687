"""Schema of the verbs that read and write checkpoints without training: `convert`, `merge` and `inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True)
class TransferConfig:
    """How files are read and written."""

    dtype: str | None = None  # fp32 | bf16; null: as the source
    shard_size: str = "5GB"  # largest .safetensors file of a Hugging Face target
    max_memory: str = "4GB"  # of anonymous memory, whatever the checkpoint's size
    workers: int | None = None  # threads; null: two per core, as far as max_memory allows
    checksum: str = "blake3"  # blake3 | sha256 (slower than the disk), of the target's files


@dataclass(kw_only=True)
class ConvertConfig(TransferConfig):
    """`nemo-align convert from=... to=... source=... target=...`."""

    source_format: str = MISSING  # written `from=` on the command line: hf | megatron | nemo
    target_format: str = MISSING  # written `to=` on the command line: hf | megatron | nemo (not offered)
    source: str | None = None  # checkpoint to read: a run directory, a checkpoint, a Hugging Face folder, a .nemo
    target: str | None = None  # folder to write
    verify: str = "false"  # true: read everything back and compare; logits: run both models on a prompt too; false
    plan: bool = False  # print every tensor, the bytes, disk and time; write nothing
    architecture: str | None = None  # with plan=true and no source: a name in conf/model
    unused_attributes: str = "drop"  # drop | keep: slots of a nine-slot reward head that HelpSteer2 does not have
    run_dir: str = "runs/convert"  # where the log goes


@dataclass(kw_only=True)
class MergeConfig(TransferConfig):
    """`nemo-align merge sources=[...] target=...`."""

    sources: list[str] = field(default_factory=list)  # checkpoints of one architecture
    target: str = MISSING  # folder to write
    target_format: str = "megatron"  # written `to=` on the command line: hf | megatron
    method: str = "linear"  # linear | slerp
    weights: list[float] | None = None  # linear: one per source, their sum need not be 1; null: equal parts
    normalize: bool = True  # linear: divide the weights by their sum
    t: float = 0.5  # slerp between two sources: 0 is the first, 1 the second
    run_dir: str = "runs/merge"  # where the log goes


@dataclass(kw_only=True)
class InspectConfig:
    """`nemo-align inspect PATH`."""

    path: str = MISSING  # a run directory, a checkpoint, a Hugging Face folder, a .nemo
    checksums: bool = False  # read every file and compare it with its checksum
    tensors: bool = False  # list them
    run_dir: str = "runs/inspect"  # nothing is written

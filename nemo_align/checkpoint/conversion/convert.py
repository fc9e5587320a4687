"""`nemo-align convert`, and the same from Python. No GPU, no process group, no model in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from nemo_align.checkpoint.conversion import job, plan
from nemo_align.checkpoint.conversion.job import Settings
from nemo_align.checkpoint.conversion.model import Model, tokens_beyond
from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.conversion.open_megatron import open_megatron
from nemo_align.checkpoint.conversion.progress import progress_of
from nemo_align.checkpoint.conversion.target import Target
from nemo_align.checkpoint.conversion.to_huggingface import to_huggingface
from nemo_align.checkpoint.conversion.to_megatron import to_megatron
from nemo_align.checkpoint.conversion.verify import verify_tensors
from nemo_align.checkpoint.nemo.model_config import CONFIG_FILE as MODEL_CONFIG
from nemo_align.checkpoint.store import resolve
from nemo_align.checkpoint.streaming import safetensors, transfer
from nemo_align.config.conversion import ConvertConfig
from nemo_align.config.sizes import parse_size

_DEFAULT_MEMORY = 4 * 10**9

logger = logging.getLogger("nemo_align")


def convert(config: ConvertConfig) -> Path | None:
    """Convert `source` to `target`; returns it, or with `plan` prints what would be done and returns None.

    Raises:
        ValueError: settings that make no sense, a source that is not of its format or damaged, a target that exists,
            too little space, and what the formats refuse.
    """
    if config.source_format == config.target_format:
        raise ValueError(f"from and to are both {config.source_format}: nothing to convert")
    memory = parse_size(config.max_memory, "max_memory")
    workers = transfer.num_workers(memory, config.workers)
    if config.source is None:
        plan.show(_lay_out(plan.described_model(config), config), None, config)
        return None
    model = open_source(config.source, config.source_format, unused_attributes=config.unused_attributes)
    target = _lay_out(model, config)
    if config.plan:
        plan.show(target, model, config)
        return None
    for note in model.notes + tokens_beyond(model):
        logger.warning("%s", note)
    if config.verify == "logits":
        from nemo_align.checkpoint.conversion.logits import check_memory, compare_logits

        check_memory(model)
    what = f"{config.source_format} to {config.target_format}"

    def check(folder: Path) -> None:
        made = open_source(folder, config.target_format, verify=False)
        verify_tensors(model, made, workers=workers, progress=progress_of("verifying"))
        if config.verify == "logits":
            compare_logits(model, made)

    settings = Settings(
        workers=workers,
        algorithm=config.checksum,
        progress=progress_of(what),
        check=None if config.verify == "false" else check,
    )
    if job.carry_out([model], target, Path(config.target), settings):
        logger.info("converted %s to %s: %d tensors", config.source, config.target, len(target.planned))
    else:
        logger.info("%s was converted before from the same source: verified, left alone", config.target)
    return Path(config.target)


def detect(path: Path | str) -> str:
    """The format of a checkpoint: hf | megatron | nemo.

    Raises:
        ValueError: nothing there, or none of the three.
    """
    path = Path(path)
    if path.is_file() or (path / MODEL_CONFIG).is_file():
        return "nemo"
    return resolve(path).kind


def open_source(path: Path | str, kind: str, *, verify: bool = True, unused_attributes: str = "drop") -> Model:
    """Open a checkpoint that must be of the format `kind`.

    Raises:
        ValueError: another format (named), and what the format's opener refuses.
    """
    if kind == "nemo":
        from nemo_align.checkpoint.nemo.open import open_nemo

        return open_nemo(path, unused_attributes=unused_attributes)
    found = resolve(path).kind
    if found != kind:
        raise ValueError(f"source={path} is a {found} checkpoint, but from={kind}")
    return open_megatron(path, verify=verify) if kind == "megatron" else open_huggingface(path, verify=verify)


def export_hf(
    checkpoint_dir: Path | str,
    target: Path | str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = safetensors.DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = True,
    beat: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the policy or reward model in `checkpoint_dir` (a checkpoint or a run directory) as a Hugging Face folder.

    Args:
        dtype: fp32 | bf16; None keeps the checkpoint's.
        overwrite: replace `target` if it exists.
        verify: compare what is read with the manifest's checksums.
        beat: told every few seconds what was last done.

    Raises:
        ValueError: not a Megatron checkpoint, damaged, tensors missing, left over or of another shape (listed),
            `target` exists, or a head whose bias cannot be folded.
    """
    model = open_megatron(checkpoint_dir, verify=verify)
    return _run(model, to_huggingface(model, dtype=dtype, max_shard_bytes=max_shard_bytes), target, overwrite, beat)


def import_hf(source: Path | str, target: Path | str, *, dtype: str | None = None) -> Path:
    """Write the Hugging Face model in `source` as a Megatron checkpoint that loads under any layout.

    Raises:
        ValueError: not a nemotron model, tensors missing, unexpected or of another shape (listed), mixed or unsupported
            number formats, `target` exists.
    """
    model = open_huggingface(source)
    return _run(model, to_megatron(model, dtype=dtype), target, False, lambda _: None)


def _run(model: Model, target: Target, path: Path | str, overwrite: bool, beat: Callable[[str], None]) -> Path:
    workers = transfer.num_workers(_DEFAULT_MEMORY)
    job.carry_out([model], target, Path(path), Settings(workers=workers, overwrite=overwrite, beat=beat))
    logger.info("wrote %s to %s", model.path, path)
    return Path(path)


def lay_out(model: Model, kind: str, *, dtype: str | None, shard_size: str) -> Target:
    """The target of the format `kind`; `shard_size` is for Hugging Face folders."""
    if kind == "hf":
        return to_huggingface(model, dtype=dtype, max_shard_bytes=parse_size(shard_size, "shard_size"))
    return to_megatron(model, dtype=dtype)


def _lay_out(model: Model, config: ConvertConfig) -> Target:
    return lay_out(model, config.target_format, dtype=config.dtype, shard_size=config.shard_size)

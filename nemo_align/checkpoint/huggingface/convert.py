"""`nemo-align convert`: Hugging Face <-> Megatron in one process, tensor by tensor, without Megatron-core or a GPU."""

from __future__ import annotations

import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint.huggingface.export import TORCH_DTYPES, export_hf
from nemo_align.checkpoint.huggingface.load import HuggingFaceWeights
from nemo_align.checkpoint.huggingface.publish import whole_folder
from nemo_align.checkpoint.huggingface.weight_map import EMBEDDING, HEAD_BIAS, HEAD_WEIGHT
from nemo_align.checkpoint.storage import TensorWriter
from nemo_align.checkpoint.store import resolve
from nemo_align.config.checkpoint import ConvertConfig
from nemo_align.config.hf_model import hf_model_config, hf_reward_config
from nemo_align.data.tokenizer import load_tokenizer

FORMATS = ("hf", "megatron")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
_ONE_PROCESS = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 1, "sequence": False, "world_size": 1}

logger = logging.getLogger("nemo_align")


def convert(config: ConvertConfig) -> Path:
    """Convert `source` to `target` (a new folder); returns it.

    Raises:
        ValueError: formats that are unknown or equal, a source that is not of its format, or what `export_hf` and
            `import_hf` refuse.
    """
    for name, value in (("from", config.source_format), ("to", config.target_format)):
        if value not in FORMATS:
            raise ValueError(f"{name}={value} is unknown: choose from {', '.join(FORMATS)}")
    if config.source_format == config.target_format:
        raise ValueError(f"from and to are both {config.source_format}: nothing to convert")
    if config.dtype is not None and config.dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype={config.dtype} is unknown: choose from {', '.join(TORCH_DTYPES)}")
    found = resolve(config.source).kind
    if found != config.source_format:
        raise ValueError(f"source={config.source} is a {found} checkpoint, but from={config.source_format}")
    if config.source_format == "megatron":
        return export_hf(config.source, config.target, dtype=config.dtype)
    return import_hf(config.source, config.target, dtype=config.dtype)


def import_hf(source: Path | str, target: Path | str, *, dtype: str | None = None) -> Path:
    """Write the Hugging Face model in `source` as a Megatron checkpoint that loads under any layout.

    Raises:
        ValueError: not a nemotron model, tensors missing, unexpected or of another shape (listed), mixed or unsupported
            number formats, `target` exists.
    """
    source, target = Path(source), Path(target)
    model = hf_model_config(source)
    reward = hf_reward_config(source)
    weights = HuggingFaceWeights(source, model, with_output_layer=reward is None)
    stored = weights.files.dtype(weights.weights[EMBEDDING].hf[0])
    own = {"F32": "fp32", "BF16": "bf16"}.get(stored)
    if own is None and dtype is None:
        raise ValueError(f"{source} holds {stored} weights: set dtype=bf16 or dtype=fp32")
    dtype = dtype or own
    with whole_folder(target) as folder:
        writer = TensorWriter(folder)
        for key in weights.weights:
            writer.write(key, weights.read(key).to(TORCH_DTYPES[dtype]))
        if reward is not None:
            writer.write(HEAD_WEIGHT, weights.head(HEAD_WEIGHT).float())
            if reward.head_bias:
                writer.write(HEAD_BIAS, weights.head(HEAD_BIAS).float())
        writer.finish()
        tokenizer = None
        if any((source / name).is_file() for name in _TOKENIZER_FILES):
            tokenizer = "tokenizer"
            load_tokenizer(source).save(folder / tokenizer)
        else:
            logger.warning("%s has no tokenizer: the checkpoint has none either", source)
        names = manifests.list_files(folder)
        manifests.write_manifest(
            folder,
            {
                "verb": "convert",
                "step": 0,
                "final": True,
                "model": asdict(model),
                "reward": None
                if reward is None
                else {"attributes": reward.attributes, "weights": reward.weights, "head_bias": reward.head_bias},
                "layout": _ONE_PROCESS,
                "optimizer_sharding": None,
                "dtype": dtype,
                "tokenizer": tokenizer,
                "state": {},
                "files": manifests.describe_files(folder, names),
                "megatron_core": version("megatron-core"),
                "torch": torch.__version__,
            },
        )
    logger.info("converted %s to %s", source, target)
    return target

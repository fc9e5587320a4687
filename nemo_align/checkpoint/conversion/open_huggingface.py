"""A Hugging Face `nemotron` folder as a `Model`."""

from __future__ import annotations

from pathlib import Path

from nemo_align.checkpoint.conversion.model import Model, files_identity
from nemo_align.checkpoint.conversion.not_carried import not_carried
from nemo_align.checkpoint.conversion.origin import GENERATION_CONFIG, made_by
from nemo_align.checkpoint.conversion.record import RECORD_FILE, read_record
from nemo_align.checkpoint.huggingface import reward_head
from nemo_align.checkpoint.huggingface.folder import HuggingFaceWeights
from nemo_align.checkpoint.huggingface.weight_map import HEAD_BIAS, HEAD_WEIGHT
from nemo_align.checkpoint.streaming.locations import FolderFiles
from nemo_align.config.hf_model import CONFIG_FILE, hf_model_config, hf_reward_config, read_hf_config
from nemo_align.data.tokenizer import OUR_CONFIG

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def open_huggingface(path: Path | str, *, verify: bool = True) -> Model:
    """Open the model in `path`.

    Raises:
        ValueError: not a nemotron model, tensors missing, unexpected or of another shape (listed), a damaged file.
    """
    folder = Path(path)
    config, reward = hf_model_config(folder), hf_reward_config(folder)
    weights = HuggingFaceWeights(folder, config, with_output_layer=reward is None)
    tensors = dict(weights.tensors)
    entry = None
    if reward is not None:
        tensors[HEAD_WEIGHT] = weights.head(HEAD_WEIGHT)
        if reward.head_bias:
            tensors[HEAD_BIAS] = weights.head(HEAD_BIAS)
        entry = {"attributes": reward.attributes, "weights": reward.weights, "head_bias": reward.head_bias}
    files = FolderFiles(folder)
    named = [*sorted({entry.file for entry in weights.files.entries.values()}), CONFIG_FILE, RECORD_FILE]
    named += [reward_head.HEAD_FILE, GENERATION_CONFIG, OUR_CONFIG, *_TOKENIZER_FILES]
    record = read_record(folder)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    verb, step = made_by(folder, record, is_reward=reward is not None, has_tokenizer=has_tokenizer)

    def identify() -> str:
        return files_identity({name: extent for name in named if (extent := files.find(name)) is not None})

    return Model(
        kind="hf",
        path=folder,
        config=config,
        reward=entry,
        tensors=tensors,
        tokenizer=folder if has_tokenizer else None,
        identity=identify(),
        identify=identify,
        verb=verb,
        step=step,
        files=record["files"] if verify and record is not None else {},
        notes=not_carried(folder) if has_tokenizer else _lost_ids(folder),
    )


def _lost_ids(folder: Path) -> list[str]:
    """A note on the ids that only a tokenizer's files could carry to another format."""
    values = read_hf_config(folder).values
    lost = [f"{key} {values[key]}" for key in _SPECIAL_IDS if values.get(key) is not None]
    return [f"{folder} has no tokenizer: its special token ids are not carried ({', '.join(lost)})"] if lost else []

"""A checkpoint of ours (torch_dist) as a `Model`."""

from __future__ import annotations

from pathlib import Path

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.conversion.model import Model, describe_problems, expected_shapes
from nemo_align.checkpoint.huggingface.weight_map import EMBEDDING, OUTPUT
from nemo_align.checkpoint.keys import is_model_key
from nemo_align.checkpoint.manifest import MANIFEST_FILE
from nemo_align.checkpoint.store import CHECKPOINTS, resolve
from nemo_align.checkpoint.streaming.tensors import rows_of
from nemo_align.checkpoint.streaming.torch_dist import TensorReader
from nemo_align.config.model import ModelConfig


def open_megatron(path: Path | str, *, verify: bool = True) -> Model:
    """Open the checkpoint in `path` (or the newest whole one of a run directory).

    Small files are checked at once; the checksums of the others come with the model, to be compared while reading.

    Raises:
        ValueError: not a Megatron checkpoint, damaged, tensors missing, left over or of another shape (listed).
    """
    reference = resolve(path)
    if reference.kind != "megatron":
        raise ValueError(f"{path} is a Hugging Face folder already")
    manifest, folder = reference.manifest, reference.path
    assert manifest is not None
    if verify:
        small = [name for name in manifest["files"] if not name.endswith(".distcp")]
        found = [checksums.problem_of(folder / name, name, manifest["files"][name]) for name in small]
        if problems := [problem for problem in found if problem is not None]:
            raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(problems[:3])}; use an older one")
    config, reward = ModelConfig(**manifest["model"]), manifest["reward"]
    reader = TensorReader(folder)
    expected = expected_shapes(config, reward)
    stored = {key: reader.shape(key) for key in reader.names() if is_model_key(key)}
    if problems := describe_problems(expected, stored, padded=(EMBEDDING, OUTPUT)):
        raise ValueError(f"{folder} does not hold the model that its manifest describes: {'; '.join(problems[:8])}")
    return Model(
        kind="megatron",
        path=folder,
        config=config,
        reward=reward,
        tensors={key: rows_of(reader.stored(key), 0, shape[0]) for key, shape in expected.items()},
        tokenizer=None if manifest["tokenizer"] is None else folder / manifest["tokenizer"],
        identity=checksums.digest_of([(folder / MANIFEST_FILE).read_bytes()]),
        verb=manifest["verb"],
        step=manifest["step"],
        run_dir=folder.parent.parent if folder.parent.name == CHECKPOINTS else None,
        files=manifest["files"] if verify else {},
    )

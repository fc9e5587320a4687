"""Save and load distributed checkpoints: weights, optimizer, schedule, random states.

Every function here is collective: all ranks call it with the same arguments.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint import sharded_state, store
from nemo_align.checkpoint.agreement import agree, gather, on_main
from nemo_align.checkpoint.architecture import architecture_problems
from nemo_align.checkpoint.head_and_rows import settle_head, vocabulary_problems
from nemo_align.checkpoint.safe_reading import read_metadata
from nemo_align.checkpoint.store import CheckpointReference
from nemo_align.checkpoint.torch_dist import load_sharded, save_sharded
from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from nemo_align.runtime import seeds
from nemo_align.runtime.topology import Topology

TOKENIZER = "tokenizer"
_SAME_MODEL_SPLIT = ("tensor", "pipeline", "virtual_pipeline")  # what dp_reshardable does not let change

logger = logging.getLogger("nemo_align")


class Saveable(Protocol):
    """A tokenizer, as far as a checkpoint is concerned."""

    def save(self, folder: Path) -> None: ...


def save(
    run_dir: Path | str,
    step: int,
    *,
    model_chunks: list[torch.nn.Module],
    optimizer,  # MegatronOptimizer | None
    scheduler,  # anything with state_dict() | None
    state: dict,
    topology: Topology,
    verb: str,
    model_config: ModelConfig,
    reward_config: RewardConfig | None,
    dtype: str,
    tokenizer: Saveable,
    final: bool,
    fully_reshardable: bool = False,
) -> Path:
    """Write the checkpoint of `step` and publish it atomically; returns its folder.

    Args:
        model_chunks: one per virtual pipeline stage, wrapped for data parallelism or not.
        optimizer: None saves weights only.
        state: JSON values that `load_training` returns (no NaN).
        dtype: fp32 | bf16, of the weights.
        final: the end of a stage. Its optimizer state loads under any layout; periodic ones (False) are faster to write
            and load only where TP and PP are the same.
        fully_reshardable: a periodic save whose optimizer state loads under any layout, as the final one's does.
    """
    sharding = sharded_state.sharding_of(optimizer, fully=final or fully_reshardable)
    temporary = Path(on_main(topology, lambda: str(store.begin(run_dir, step))))
    content = sharded_state.model_state(model_chunks, sharding)
    if optimizer is not None:
        content["optimizer"] = sharded_state.optimizer_state(optimizer, content, sharding, is_loading=False)
    if scheduler is not None:
        content["scheduler"] = scheduler.state_dict()
    content[sharded_state.RNG_KEY] = sharded_state.rng_object(seeds.rng_state(), topology)
    save_sharded(content, temporary, sharded_state.format_metadata(sharding))
    on_main(topology, lambda: tokenizer.save(temporary / TOKENIZER))

    described = {
        "verb": verb,
        "step": step,
        "final": final,
        "model": asdict(model_config),
        "reward": reward_entry(reward_config),
        "layout": topology.layout(),
        "optimizer_sharding": sharding,
        "dtype": dtype,
        "tokenizer": TOKENIZER,
        "state": state,
        "files": _describe_together(temporary, topology),
        "megatron_core": version("megatron-core"),
        "torch": torch.__version__,
    }
    target = store.checkpoint_path(run_dir, step)

    def publish() -> str:
        manifests.write_manifest(temporary, described)
        return str(store.publish(temporary, target))

    path = Path(on_main(topology, publish))
    logger.info("saved %s (%.2f GB)", path, sum(entry["bytes"] for entry in described["files"].values()) / 1e9)
    return path


def load_weights(
    reference: CheckpointReference,
    model_chunks: list[torch.nn.Module],
    topology: Topology,
    *,
    load_head: bool,
    verify: bool = True,
) -> None:
    """Load the weights of a Megatron checkpoint under any layout and vocabulary padding (padding rows become zero).

    Load before the optimizer is built: it copies the weights. A reward model starts from a policy without a head: the
    head stays as initialised and the policy's output layer unread. `load_head` takes the head of a reward model too.

    Args:
        verify: check all files against the manifest's checksums first, shared over the ranks.

    Raises:
        ValueError: damaged files; missing, unexpected or differently shaped tensors, listed; a reward model where a
            policy is asked for; `load_head` without a head in the checkpoint.
    """
    assert reference.kind == "megatron", reference
    if verify:
        _verify(reference.path, reference.manifest, topology)
    content = sharded_state.model_state(model_chunks, None)
    requested = sharded_state.everyones(sharded_state.requested_shapes(content))
    metadata = read_metadata(reference.path)
    unread = settle_head(reference, requested, metadata.state_dict_metadata, load_head=load_head)
    # FP8 histories belong to the run that made them, not to its weights.
    unread |= {key for key in requested if sharded_state.EXTRA_STATE in key}
    requested = {key: value for key, value in requested.items() if key not in unread}
    problems = architecture_problems(
        ModelConfig(**reference.manifest["model"]), sharded_state.bare_model(model_chunks[0])
    )
    problems += sharded_state.compare(requested, metadata, of="model", ignored=unread)
    problems += vocabulary_problems(requested, reference.manifest)
    if problems:
        raise ValueError(f"{reference.path} does not fit the model. " + "; ".join(problems))
    sharded_state.drop(content, unread)
    _into_model(load_sharded(content, reference.path), model_chunks)
    logger.info("weights of %s (%s, step %d)", reference.path, reference.manifest["verb"], reference.manifest["step"])


def load_training(
    path: Path,
    model_chunks: list[torch.nn.Module],
    optimizer,  # MegatronOptimizer
    scheduler,  # anything with load_state_dict() | None
    topology: Topology,
    *,
    verify: bool = True,
) -> dict:
    """Resume from a checkpoint: weights, optimizer, schedule, random states; returns `state` as it was saved.

    With `scheduler` None only weights and the optimizer's moments and step count are taken over into a new stage: its
    settings (learning rates, betas, decay) and the random states stay those of the new stage.

    Raises:
        ValueError: damaged files, no optimizer state, or a layout that the save cannot serve, with the remedy.
    """
    reference = store.resolve(path)
    assert reference.kind == "megatron", reference
    manifest = reference.manifest
    sharding = _check_layout(reference.path, manifest, optimizer, topology)
    if verify:
        _verify(reference.path, manifest, topology)
    same_layout = manifest["layout"] == topology.layout()
    content = sharded_state.model_state(model_chunks, sharding)
    settings = sharded_state.hyper_parameters(optimizer)
    content["optimizer"] = sharded_state.optimizer_state(optimizer, content, sharding, is_loading=True)
    metadata = read_metadata(reference.path)
    model = {key: value for key, value in content.items() if key != "optimizer"}
    for part, name in ((model, "model"), ({"optimizer": content["optimizer"]}, "optimizer")):
        requested = sharded_state.everyones(sharded_state.requested_shapes(part))
        if problems := sharded_state.compare(requested, metadata, of=name):
            raise ValueError(f"{reference.path} does not fit the {name}. " + "; ".join(problems))
    resuming = scheduler is not None
    if resuming and any(sharded_state.EXTRA_STATE in key for key in metadata.state_dict_metadata):
        logger.warning("FP8 scaling histories start anew: the first steps differ in rounding from an undisturbed run")
    if resuming and same_layout:
        content[sharded_state.RNG_KEY] = sharded_state.rng_object(None, topology)
    loaded = load_sharded(content, reference.path)
    _into_model(loaded, model_chunks)
    if not resuming:
        sharded_state.replace_hyper_parameters(optimizer, loaded["optimizer"], settings)
    sharded_state.into_optimizer(optimizer, loaded["optimizer"])
    if not resuming:
        return manifest["state"]
    scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        seeds.set_rng_state(loaded[sharded_state.RNG_KEY])
    else:
        logger.warning(
            "the layout changed from %s to %s: random states start anew, the order of examples stays",
            manifest["layout"],
            topology.layout(),
        )
    return manifest["state"]


def newest_resumable(run_dir: Path | str, topology: Topology) -> Path | None:
    """`store.newest_complete` with the reading shared over the ranks; all return the same. Damaged ones are skipped.

    `load_training(..., verify=False)` need not read the files for checksums again.
    """
    for path in on_main(topology, lambda: [str(found) for found in store.candidates(run_dir)]):
        path = Path(path)
        problems = on_main(topology, lambda path=path: store.find_problems(path, checksums=False))
        if not problems:
            problems = _damage(path, manifests.read_manifest(path), topology)
        if not problems:
            return path
        store.warn_skipped(path, problems)
    return None


def reward_entry(reward_config: RewardConfig | None) -> dict | None:
    """The manifest's description of a reward head."""
    if reward_config is None:
        return None
    return {
        "attributes": list(reward_config.attributes),
        "weights": dict(reward_config.weights) if reward_config.weights is not None else None,
        "head_bias": reward_config.head_bias,
    }


def _describe_together(folder: Path, topology: Topology) -> dict[str, dict]:
    """Size and checksum of every file, each read by one rank: by its writer where the name tells (it has it cached)."""
    names = on_main(topology, lambda: manifests.list_files(folder))
    mine = [name for index, name in enumerate(names) if _owner(name, index, topology) == topology.rank]
    parts = gather(agree(lambda: manifests.describe_files(folder, mine)))
    return dict(sorted((name, entry) for part in parts for name, entry in part.items()))


def _owner(name: str, index: int, topology: Topology) -> int:
    writer = name.removeprefix("__").split("_")[0]
    return (int(writer) if name.endswith(".distcp") and writer.isdigit() else index) % topology.world_size


def _verify(path: Path, manifest: dict, topology: Topology) -> None:
    if problems := _damage(path, manifest, topology):
        raise ValueError(f"checkpoint {path} is damaged: {'; '.join(problems[:3])}; use an older one")


def _damage(path: Path, manifest: dict, topology: Topology) -> list[str]:
    names = list(manifest["files"])
    problems = manifests.check_checksums(path, manifest, names[topology.rank :: topology.world_size])
    return [problem for part in gather(problems) for problem in part]


def _check_layout(path: Path, manifest: dict, optimizer, topology: Topology) -> str:
    """The sharding to load the optimizer with. Refuses what the save cannot serve."""
    saved = manifest["optimizer_sharding"]
    distributed = sharded_state.sharding_of(optimizer, fully=False) != "replicated"
    if saved is None:
        raise ValueError(
            f"{path} holds weights only (converted, or saved without optimizer): use it as checkpoint.init_from"
        )
    if (saved == "replicated") == distributed:
        raise ValueError(
            f"{path} was saved {'without' if saved == 'replicated' else 'with'} the distributed optimizer: set "
            f"parallel.distributed_optimizer={str(not distributed).lower()}, or take the weights alone with "
            "checkpoint.init_from"
        )
    layout, now = manifest["layout"], topology.layout()
    if saved == "dp_reshardable" and any(layout[key] != now[key] for key in _SAME_MODEL_SPLIT):
        names = " ".join(f"parallel.{key}={layout[key]}" for key in _SAME_MODEL_SPLIT)
        wanted = " ".join(f"parallel.{key}={now[key]}" for key in _SAME_MODEL_SPLIT)
        raise ValueError(
            f"{path} is a periodic save under {names}: its optimizer state loads only under these (any parallel.data), "
            f"not under {wanted}. Resume with {names} until the end of the stage, whose final checkpoint loads under "
            "any layout, or start a new run_dir from the weights with checkpoint.init_from"
        )
    return saved


def _into_model(loaded: dict, model_chunks: list[torch.nn.Module]) -> None:
    for index, chunk in enumerate(model_chunks):
        # Tensors were read into the parameters themselves; this sets what is not a tensor. Completeness was checked on
        # the keys before, so strict would only trip over the keys that were meant to stay unread.
        result = sharded_state.bare_model(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        assert not result.unexpected_keys, result.unexpected_keys

"""Load distributed checkpoints: weights, optimizer, schedule, random states. `saver` writes them.

Every function here is collective: all ranks call it with the same arguments.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from nemo_align.checkpoint import fp8_histories, sharded_state, store
from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint.architecture import architecture_problems
from nemo_align.checkpoint.head_and_rows import settle_head, vocabulary_problems
from nemo_align.checkpoint.keys import RNG_KEY
from nemo_align.checkpoint.layout import layout_problem
from nemo_align.checkpoint.safe_reading import read_metadata
from nemo_align.checkpoint.store import CheckpointReference
from nemo_align.checkpoint.torch_dist import load_sharded
from nemo_align.config.model import ModelConfig
from nemo_align.runtime import seeds
from nemo_align.runtime.agreement import agree, gather, on_main
from nemo_align.runtime.topology import Topology

logger = logging.getLogger("nemo_align")


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
    metadata = read_metadata(reference.path)
    resuming = scheduler is not None
    content = sharded_state.model_state(model_chunks, sharding, resumed=metadata if resuming else None)
    settings = sharded_state.hyper_parameters(optimizer)
    content["optimizer"] = sharded_state.optimizer_state(optimizer, content, sharding, is_loading=True)
    model = {key: value for key, value in content.items() if key != "optimizer"}
    for part, name in ((model, "model"), ({"optimizer": content["optimizer"]}, "optimizer")):
        requested = sharded_state.everyones(sharded_state.requested_shapes(part))
        if problems := sharded_state.compare(requested, metadata, of=name):
            raise ValueError(f"{reference.path} does not fit the {name}. " + "; ".join(problems))
    if resuming and same_layout:
        content[RNG_KEY] = sharded_state.rng_object(None, topology)
    loaded = load_sharded(content, reference.path)
    if resuming:
        _restore_histories(loaded, model_chunks, metadata)
    _into_model(loaded, model_chunks)
    if not resuming:
        sharded_state.replace_hyper_parameters(optimizer, loaded["optimizer"], settings)
    sharded_state.into_optimizer(optimizer, loaded["optimizer"])
    if not resuming:
        return manifest["state"]
    scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        seeds.set_rng_state(loaded[RNG_KEY])
    else:
        logger.warning(
            "the layout changed from %s to %s: random states start anew, the order of examples stays",
            manifest["layout"],
            topology.layout(),
        )
    return manifest["state"]


def newest_resumable(run_dir: Path | str, topology: Topology) -> Path | None:
    """`store.newest_complete` with the reading shared over the ranks; all return the same. Damaged ones are skipped.

    What saves that died left behind is removed first: the disk may be full of it. `load_training(..., verify=False)`
    need not read the files for checksums again.
    """
    on_main(topology, lambda: store.tidy(run_dir))
    for path in on_main(topology, lambda: [str(found) for found in store.candidates(run_dir)]):
        path = Path(path)
        problems = on_main(topology, lambda path=path: store.find_problems(path, checksums=False))
        if not problems:
            problems = _damage(path, manifests.read_manifest(path), topology)
        if not problems:
            return path
        store.warn_skipped(path, problems)
    return None


def _verify(path: Path, manifest: dict, topology: Topology) -> None:
    if problems := _damage(path, manifest, topology):
        raise ValueError(f"checkpoint {path} is damaged: {'; '.join(problems[:3])}; use an older one")


def _damage(path: Path, manifest: dict, topology: Topology) -> list[str]:
    names = list(manifest["files"])
    own = names[topology.rank :: topology.world_size]
    problems = agree(lambda: manifests.check_checksums(path, manifest, own))
    return [problem for part in gather(problems) for problem in part]


def _check_layout(path: Path, manifest: dict, optimizer, topology: Topology) -> str:
    """The sharding to load the optimizer with. Refuses what the save cannot serve."""
    distributed = sharded_state.sharding_of(optimizer, fully=False) != "replicated"
    if problem := layout_problem(path, manifest, topology.layout(), distributed_optimizer=distributed):
        raise ValueError(problem)
    return manifest["optimizer_sharding"]


def _restore_histories(loaded: dict, model_chunks: list[torch.nn.Module], metadata: Metadata) -> None:
    bare = [sharded_state.bare_model(chunk) for chunk in model_chunks]
    restored = sum(fp8_histories.restore(chunk, loaded[f"model{index}"]) for index, chunk in enumerate(bare))
    fp8_histories.report(bare[0], restored, metadata)


def _into_model(loaded: dict, model_chunks: list[torch.nn.Module]) -> None:
    for index, chunk in enumerate(model_chunks):
        # Tensors were read into the parameters themselves; this sets what is not a tensor. Completeness was checked on
        # the keys before, so strict would only trip over the keys that were meant to stay unread.
        result = sharded_state.bare_model(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        assert not result.unexpected_keys, result.unexpected_keys

"""A run's model with its initial weights: what every verb that runs on workers opens first."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_align.checkpoint.megatron import load_weights
from nemo_align.checkpoint.store import CheckpointReference, manifest_hash, resolve
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.stages import WorkerConfig
from nemo_align.data.tokenizer import Tokenizer, load_tokenizer
from nemo_align.model.build import build_model
from nemo_align.runtime import watchdog
from nemo_align.runtime.agreement import on_main
from nemo_align.runtime.signals import StopRequest
from nemo_align.runtime.topology import Topology
from nemo_align.training import userbuffers

logger = logging.getLogger("nemo_align")


@dataclass(kw_only=True)
class Session:
    """Model chunks of this rank, holding the weights that the stage starts from."""

    config: WorkerConfig
    topology: Topology
    run_dir: Path
    stop: StopRequest
    tokenizer: Tokenizer
    reward: RewardConfig | None
    model_chunks: list[torch.nn.Module]
    initial: CheckpointReference | None
    opened: float  # time.monotonic() before anything was built

    def elapsed(self) -> float:
        """Seconds since this process opened the session."""
        return time.monotonic() - self.opened

    @property
    def initial_identity(self) -> str:
        """What the initial weights are: a hash of their checkpoint's manifest, or the seed of random ones."""
        if self.initial is None:
            return f"random weights, seed {self.config.runtime.seed}"
        return manifest_hash(self.initial)


def resolve_initial(config: WorkerConfig, topology: Topology) -> CheckpointReference | None:
    """The checkpoint that `checkpoint.init_from` names. One rank looks, so that all take the same."""
    init_from = config.checkpoint.init_from
    if init_from is None:
        return None
    return resolve(on_main(topology, lambda: str(resolve(init_from).path)))


def tokenizer_of(config: WorkerConfig) -> Tokenizer:
    """The run's tokenizer. Raises ValueError if it has more tokens than the model has embeddings."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, the model {config.model.name}"
            f" embeds {config.model.vocab_size}: set model.vocab_size={tokenizer.vocab_size} or take its own tokenizer"
        )
    return tokenizer


def open_session(
    config: WorkerConfig,
    topology: Topology,
    stop: StopRequest,
    *,
    reward: RewardConfig | None = None,
    load_head: bool = False,
) -> Session:
    """Build the model and give it its initial weights.

    Raises ValueError if the tokenizer has more tokens than the model has embeddings.
    """
    opened = time.monotonic()
    stop.leave_if_agreed(topology)
    watchdog.beat("reading what checkpoint.init_from names")
    initial = resolve_initial(config, topology)
    tokenizer = tokenizer_of(config)
    userbuffers.start(config)
    watchdog.beat("building the model")
    chunks = build_model(config.model, config.parallel, config.precision, topology, reward_head=reward)
    watchdog.beat("loading the initial weights")
    if initial is None:
        logger.info("random initial weights, seed %d", config.runtime.seed)
    elif initial.kind == "hf":
        from nemo_align.checkpoint.huggingface.load import load_hf_weights

        load_hf_weights(initial.path, chunks, topology, load_head=load_head)
    else:
        load_weights(initial, chunks, topology, load_head=load_head)
    stop.leave_if_agreed(topology)
    watchdog.beat("the model is ready")
    return Session(
        config=config,
        topology=topology,
        run_dir=Path(config.run_dir),
        stop=stop,
        tokenizer=tokenizer,
        reward=reward,
        model_chunks=chunks,
        initial=initial,
        opened=opened,
    )

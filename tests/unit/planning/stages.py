"""Stages composed as the command composes them."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_align.config.compose import compose
from nemo_align.config.plan import PlannedStage
from nemo_align.config.stages import TrainStageConfig


def planned(arguments: Sequence[str] = ()) -> PlannedStage:
    """The 340B with a global batch of 768, unless `arguments` say otherwise."""
    given = {argument.partition("=")[0] for argument in arguments}
    base = [text for text in ("model=nemotron4_340b", "train.global_batch_size=768") if text.split("=")[0] not in given]
    return compose("plan", [*base, *arguments])


def pretrain_stage(arguments: Sequence[str] = ()) -> TrainStageConfig:
    return planned(arguments).stage

"""Composing for `doctor`: the stage or the recipe that the machines are looked at for, by the rules of its own verb."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nemo_align.config import build, planned_model, suggest, validation
from nemo_align.config.errors import ConfigError
from nemo_align.config.experiment_verb import verb_of_experiment
from nemo_align.config.schema import STAGE_VERBS
from nemo_align.config.stages import WorkerConfig

_VERBS = (*STAGE_VERBS, "pipeline")


def stage_of(arguments: Sequence[str]) -> tuple[str | None, Any]:
    """(verb, configuration) that the arguments describe; (None, None) without any.

    Files are not looked at: that is for the nodes to do.

    Raises:
        ConfigError: no verb can be told, or that verb refuses the arguments.
    """
    from nemo_align.config.compose import compose

    others = [text for text in arguments if not text.startswith("verb=")]
    verb = next((text.partition("=")[2] for text in arguments if text.startswith("verb=")), None)
    if verb is not None and verb not in _VERBS:
        raise ConfigError(
            f"verb is '{verb}', but must be one of {', '.join(_VERBS)}{suggest.did_you_mean(verb, _VERBS)}"
        )
    if verb is None and not others:
        return None, None
    if verb is None:
        verb = verb_of_experiment(others, _VERBS, otherwise="whose machines need no look")
        if verb is None:
            raise ConfigError("doctor needs +experiment=<recipe>/<stage>, or verb=<verb>, to read other keys")
    config = compose(verb, others, check_files=False)
    if verb in STAGE_VERBS:
        _complete(config)
    return verb, config


def _complete(config: WorkerConfig) -> None:
    """The model of a checkpoint that is still to be written, if it is known which stage will write it."""
    if not build.missing_keys(config.model) or config.checkpoint.init_from is None:
        return
    sizes = planned_model.sizes_of(config.checkpoint.init_from)
    if sizes is None:
        return
    for field in dataclasses.fields(sizes):
        if getattr(config.model, field.name) == field.default:
            setattr(config.model, field.name, getattr(sizes, field.name))
    validation.complete(config, None)
    validation.validate(config, check_files=False, awaits_checkpoint=config.data.tokenizer is None)

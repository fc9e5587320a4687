"""Composing for `plan`: the stage by the rules of its own verb, without what only a run needs.

An experiment is written for one verb, which the command in its first comments names; its keys are checked as that verb
checks them. What a plan does not read (files, the tokenizer, the learning rate) may be missing: a stand-in takes its
place, so that all other checks see a whole configuration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_align.config import build, overrides, planned_model, schema, sources, suggest
from nemo_align.config.choices import CHOICES
from nemo_align.config.errors import ConfigError
from nemo_align.config.experiment_verb import verb_of_experiment
from nemo_align.config.job_size import job_layout, num_nodes
from nemo_align.config.pipeline import ClusterConfig, overrides_of
from nemo_align.config.plan import PlanConfig, PlannedRecipe, PlannedStage

TRAINING_VERBS = CHOICES["verb"]
_PLOT_FORMATS = (".png", ".svg", ".pdf")
STAND_IN_STEPS = 10**9  # of a stage whose length nobody gave: longer than any warm-up or decay


def compose_plan(arguments: Sequence[str]) -> PlannedStage | PlannedRecipe:
    """The plan's own keys, and the stage that they speak of; all stages, of an experiment of `pipeline`.

    Raises:
        ConfigError: an unknown key of either, a wrong value, a layout that the GPUs cannot form.
    """
    own, others = _split(arguments)
    plan = _plan_config(own)
    verbs = (*TRAINING_VERBS, "pipeline")
    verb = plan.verb or verb_of_experiment(others, verbs, otherwise="which trains nothing to plan") or "pretrain"
    _refuse_mistyped(verb, others)
    return _compose_recipe(plan, others) if verb == "pipeline" else _compose_stage(plan, verb, others)


def _compose_stage(
    plan: PlanConfig, verb: str, others: Sequence[str], cluster: ClusterConfig | None = None
) -> PlannedStage:
    """`cluster`: of a recipe, whose jobs have its nodes unless `gpus` is given."""
    from nemo_align.config.compose import compose

    stand_ins: list[str] = []
    if plan.gpus is not None:
        others = [*others, f"gpus={plan.gpus}"]  # before that of a recipe
    stage = compose(verb, others, check_files=False, fill=lambda tree: stand_ins.extend(_fill(verb, tree)))
    if plan.gpus is None and cluster is not None and cluster.kind == "slurm":
        stage.gpus = math.prod(num_nodes(cluster, stage.parallel))
    plan.gpus = stage.gpus
    is_sized = stage.gpus is not None or stage.parallel.data is not None
    if plan.search:  # which chooses the layout itself
        if plan.gpus is None:
            raise ConfigError("search=true needs the number of GPUs. Example: gpus=1536")
    else:
        stage.parallel = job_layout(stage)
        assert stage.parallel.data is not None
        plan.gpus = stage.parallel.tensor * stage.parallel.pipeline * stage.parallel.data
    return PlannedStage(plan=plan, verb=verb, stage=stage, is_sized=is_sized, stand_ins=stand_ins)


def _compose_recipe(plan: PlanConfig, arguments: Sequence[str]) -> PlannedRecipe:
    """Each stage as the pipeline would start it: its experiment, its overrides, the checkpoint of an earlier stage."""
    from nemo_align.config.compose import compose

    for name in ("lengths", "exact", "search", "scaling", "plot"):
        if getattr(plan, name) != getattr(PlanConfig, name):
            raise ConfigError(f"{name}= is for one stage: choose it, as in +experiment=quickstart/pretrain")
    config = compose("pipeline", arguments, check_files=False)
    stages, left_out, problems = {}, [], {}
    for name, stage in config.stages.items():
        if stage.verb not in TRAINING_VERBS:
            left_out.append(name)
            continue
        folders = {f"{{{earlier}}}": f"{config.run_dir}/{earlier}" for earlier in config.stages}
        texts = [f"+experiment={stage.experiment}"] if stage.experiment is not None else []
        for text in overrides_of(config, stage):
            for reference, folder in folders.items():
                text = text.replace(reference, folder)
            texts.append(text)
        if stage.init_from is not None:
            texts.append(f"checkpoint.init_from={config.run_dir}/{stage.init_from}")
        try:
            stages[name] = _compose_stage(dataclasses.replace(plan), stage.verb, texts, config.cluster)
        except ConfigError as error:
            problems[name] = str(error).splitlines()
    if problems:
        raise ConfigError.of_stages(problems, len(stages) + len(problems))
    return PlannedRecipe(plan=plan, experiment=config.experiment, stages=stages, left_out=left_out)


def _key(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0]


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments with the plan's own keys, the others)."""
    own = schema.fields(PlanConfig)
    return [a for a in arguments if _key(a) in own], [a for a in arguments if _key(a) not in own]


def _plan_config(arguments: Sequence[str]) -> PlanConfig:
    import yaml

    tree: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name in tree:
            raise ConfigError(f"'{argument}': write {_key(argument)}=<value>, once")
        try:
            tree[_key(argument)] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"cannot read '{argument}'") from None
    plan, problems = build.build(PlanConfig, tree)
    if problems:
        raise ConfigError.of(f"{problem} (command line)" for problem in problems)
    if problems := list(_check(plan)):
        raise ConfigError.of(problems)
    return plan


def _check(plan: PlanConfig):
    if plan.verb is not None and plan.verb not in TRAINING_VERBS:
        guess = suggest.did_you_mean(plan.verb, TRAINING_VERBS)
        yield f"verb is '{plan.verb}', but must be one of {', '.join(TRAINING_VERBS)}{guess}"
    for name in ("gpus", "top"):
        if getattr(plan, name) is not None and getattr(plan, name) < 1:
            yield f"{name} is {getattr(plan, name)}, but must be at least 1"
    if plan.search and (plan.scaling or plan.exact):
        yield "search=true chooses a layout, scaling=true and exact=true look at a given one: one after the other"
    if plan.plot is not None and not plan.scaling:
        yield "plot draws what scaling=true computes: add scaling=true"
    for name in ("json", "plot"):
        path = getattr(plan, name)
        if path is None:
            continue
        if Path(path).is_dir():
            yield f"{name}={path} is a folder: name a file in it"
        elif not Path(path).parent.is_dir():
            yield f"{name}={path}: the folder {Path(path).parent} does not exist: create it, or name another file"
    if plan.plot is not None and Path(plan.plot).suffix not in _PLOT_FORMATS:
        yield f"plot={plan.plot}: the file must end in {', '.join(_PLOT_FORMATS)}"
    if plan.write_gb_per_second is not None and not plan.write_gb_per_second > 0:
        yield f"write_gb_per_second is {plan.write_gb_per_second}, but must be positive"


def _refuse_mistyped(verb: str, arguments: Sequence[str]) -> None:
    """`gpu=64` means `gpus`, which the stage's verb would not guess."""
    problems = []
    for argument in arguments:
        name = _key(argument)
        known = schema.find(schema.VERBS[verb], name) is not None or name in (*sources.groups(), *overrides.ALIASES)
        if not known and "." not in name and (guess := suggest.nearest(name, schema.fields(PlanConfig), 0.7)):
            problems.append(f"unknown key '{name}'; did you mean '{guess}'? (command line: {argument})")
    if problems:
        raise ConfigError.of(problems)


def _fill(verb: str, tree: dict[str, Any]) -> list[str]:
    """Put stand-ins for what is missing into the plain tree of a stage; the keys that got one."""
    filled = []

    def put(section: str, key: str, value: Any) -> None:
        tree[section][key] = value
        filled.append(f"{section}.{key}")

    missing = schema.MISSING
    init_from = tree["checkpoint"]["init_from"]
    if tree["model"]["num_layers"] == missing and init_from is not None:
        sizes = planned_model.sizes_of(init_from)
        if sizes is not None:
            tree["model"] = {**dataclasses.asdict(sizes), **{k: v for k, v in tree["model"].items() if v != missing}}
    if init_from is None and verb == "preference":
        put("checkpoint", "init_from", "the policy")
    if tree["data"]["tokenizer"] is None:
        put("data", "tokenizer", "the tokenizer")
    if tree["optimizer"]["lr"] == missing:
        put("optimizer", "lr", max(1e-4, float(tree["optimizer"]["min_lr"])))
    if verb == "pretrain":
        if not tree["data"]["phases"]:
            phase = {"steps": STAND_IN_STEPS, "blend": {"text": {"path": "text"}}}
            put("data", "phases", {"all": phase})
        for name, phase in tree["data"]["phases"].items():
            if isinstance(phase, dict) and not phase.get("blend"):
                phase["blend"] = {"text": {"path": "text"}}
                filled.append(f"data.phases.{name}.blend")
    else:
        if not tree["data"]["train"]:
            put("data", "train", {"rows": {"path": "rows.jsonl"}})
        if tree["train"]["epochs"] is None and tree["train"]["max_steps"] is None:
            put("train", "max_steps", STAND_IN_STEPS)
    return filled

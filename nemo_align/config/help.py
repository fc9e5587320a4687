"""Texts of --help, made from the schema, the comments of its fields, and the files of conf/."""

from __future__ import annotations

from pathlib import Path

from nemo_align.config import sources

# One line per verb; not from the schema, so that `nemo-align --help` imports nothing.
VERB_LINES = {
    "pretrain": "next token on Megatron .bin/.idx blends, in phases; continued pretraining too",
    "sft": "next token on the assistant's turns of dialogues",
    "reward": "reward model: regression on any list of named attributes",
    "preference": "DPO, IPO and reward-aware RPO on pairs of responses",
    "score": "write a reward model's rewards into files of rows",
    "pipeline": "the whole chain, each stage starting from the checkpoint of an earlier one",
    "plan": "what a stage needs and yields on H100s: memory, time, MFU; without a GPU; ends with 2 if it does not fit",
    "doctor": "before a job: versions, GPUs, disk, files, links, does its plan fit; what is wrong, with its remedy",
    "convert": "checkpoints from and to Hugging Face, and from the published .nemo, in bounded memory",
    "merge": "average checkpoints of one architecture: weighted sums or spherical interpolation",
    "inspect": "what a checkpoint is: format, architecture, parameters, stage, integrity",
}
_EXAMPLES = {
    "pretrain": (
        "nemo-align pretrain +experiment=quickstart/pretrain",
        "nemo-align pretrain model=tiny optimizer.lr=1e-3 train.global_batch_size=32 \\\n"
        "      data.tokenizer=tokenizer.model data.phases.main.steps=1000 \\\n"
        "      data.phases.main.blend.english.path=data/english",
    ),
    "sft": (
        "nemo-align sft +experiment=quickstart/code_sft parallel.tensor=2",
        "nemo-align sft checkpoint.init_from=runs/pretrain data.train.mine.path=rows.jsonl train.epochs=3 \\\n"
        "      train.global_batch_size=128 optimizer.lr=3e-7",
        "nemo-align sft +experiment=quickstart/code_sft optimizer.lr=1e-4,3e-4 --multirun",
    ),
    "reward": (
        "nemo-align reward +experiment=quickstart/reward",
        "nemo-align reward checkpoint.init_from=runs/pretrain data=helpsteer2 train.epochs=2 \\\n"
        "      train.global_batch_size=128 optimizer.lr=2e-6",
    ),
    "preference": (
        "nemo-align preference +experiment=quickstart/dpo",
        "nemo-align preference checkpoint.init_from=runs/dpo preference.preference_loss=rpo_bwd_kl \\\n"
        "      data.train.mine.path=pairs.jsonl train.epochs=1 train.global_batch_size=256 optimizer.lr=3e-7",
    ),
    "score": ("nemo-align score checkpoint.init_from=runs/reward inputs.pairs=pairs.jsonl run_dir=runs/scored",),
    "pipeline": (
        "nemo-align pipeline +experiment=quickstart/recipe",
        "nemo-align pipeline +experiment=quickstart/recipe cluster=slurm cluster.partition=batch",
    ),
    "plan": (
        "nemo-align plan +experiment=quickstart/pretrain",
        "nemo-align plan model=nemotron4_340b parallel=tp8_pp12 gpus=1536 train.global_batch_size=768",
        "nemo-align plan model=nemotron4_340b train.global_batch_size=768 search=true gpus=1536",
        "nemo-align plan model=nemotron4_340b parallel=tp8_pp12 gpus=1536 train.global_batch_size=768 \\\n"
        "      scaling=true json=plan.json",
    ),
    "doctor": (
        "nemo-align doctor",
        "nemo-align doctor +experiment=quickstart/pretrain parallel.data=2",
        "sbatch --nodes=24 slurm/train.sbatch doctor +experiment=nemotron4_340b/code_sft",
    ),
    "convert": (
        "nemo-align convert from=megatron to=hf source=runs/rpo_3 target=exported/rpo_3",
        "nemo-align convert from=hf to=megatron source=models/minitron-4b target=models/megatron verify=true",
        "nemo-align convert from=nemo to=megatron source=Nemotron-4-340B-Base target=models/nemotron4_340b",
        "nemo-align convert from=hf to=megatron plan=true architecture=nemotron4_340b",
    ),
    "merge": (
        "nemo-align merge sources=[runs/rpo_2,runs/rpo_3] target=runs/averaged",
        "nemo-align merge sources=[a,b,c] weights=[2,1,1] to=hf target=exported/averaged",
        "nemo-align merge sources=[a,b] method=slerp t=0.3 target=runs/between",
    ),
    "inspect": (
        "nemo-align inspect runs/rpo_3",
        "nemo-align inspect Nemotron-4-340B-Reward tensors=true",
        "nemo-align inspect exported/rpo_3 checksums=true",
    ),
}
_OPTIONS = (
    ("--cfg job", "print the composed and checked configuration, start nothing"),
    ("--info [what]", "Hydra's view: all, config, defaults, defaults-tree, plugins or searchpath"),
    ("--multirun", "one run per combination of comma-separated values, each in a run_dir of its own"),
    ("--config-dir DIR", "your own folder of YAML, laid out as conf/ (also $NEMO_ALIGN_CONFIG_DIR)"),
    ("--help", "this text"),
)


def overview() -> str:
    """`nemo-align --help`."""
    verbs = "\n".join(f"  {verb:<12}{line}" for verb, line in VERB_LINES.items())
    return f"""Usage: nemo-align <verb> [+experiment=<recipe>/<stage>] [group=choice] [key=value] ...

The Nemotron-4-340B alignment recipe on Megatron-core, on a GPU cluster or on a laptop.

Verbs:
{verbs}

Examples:
  nemo-align pipeline +experiment=quickstart/recipe          the whole recipe on one machine
  nemo-align sft +experiment=quickstart/code_sft parallel.tensor=2 parallel.data=2
  sbatch slurm/train.sbatch sft +experiment=quickstart/code_sft
  nemo-align sft +experiment=quickstart/code_sft --cfg job   what would run, with every key
  nemo-align sft +experiment=nemotron4_340b/code_sft dry_run=true   what the job would do, without a GPU

`nemo-align <verb> --help` lists the keys, groups and experiments of a verb. Starting the same command again resumes.
`nemo-align --version` prints the version."""


def verb_help(verb: str) -> str:
    """`nemo-align <verb> --help`: examples, options, experiments, groups with their choices, every key."""
    from nemo_align.config import schema

    if verb == "doctor":
        return _doctor_help()
    root = schema.VERBS[verb]
    has_runs = "experiment" in schema.fields(root)  # convert has neither experiments nor groups, and nothing to sweep
    has_groups = has_runs or verb == "plan"  # those of the stage's verb
    choosing = "[+experiment=<recipe>/<stage>] [group=choice] [key=value]" if has_groups else "key=value"
    left_out = [] if has_runs else ["--multirun", *(["--info [what]"] if verb == "plan" else [])]
    options = [(name, text) for name, text in _OPTIONS if name not in left_out]
    parts = [
        f"Usage: nemo-align {verb} {choosing} ...\n\n{VERB_LINES[verb][0].upper()}{VERB_LINES[verb][1:]}.",
        "Examples:\n" + "\n".join(f"  {example}" for example in _EXAMPLES[verb]),
        "Options:\n" + "\n".join(f"  {name:<20}{text}" for name, text in options),
    ]
    if experiments := sources.experiments(verb) if has_runs else []:
        lines = "\n".join(f"  +experiment={name:<36}{text}".rstrip() for name, text in experiments)
        parts.append(f"Experiments:\n{lines}")
    groups = [name for name in sources.groups() if name != sources.EXPERIMENT and _selected(verb, name) is not None]
    if groups:
        blocks = []
        for group in groups:
            choices = sources.choices(group)
            selected = _selected(verb, group)
            blocks += [
                f"  {f'{group}={choice}':<34}{sources.description(group, choice)}"
                f"{' (default)' if choice == selected else ''}"
                for choice in choices
            ]
        parts.append("Groups:\n" + "\n".join(blocks))
    parts.append("Keys (no + needed; <name> is a name of your choice):\n" + "\n".join(_key_lines(verb)))
    if verb == "plan":
        parts.append(
            "Every other key, group and experiment is one of the stage's verb: see `nemo-align pretrain --help`. What "
            "only a run needs (files, tokenizer, optimizer.lr, checkpoint.init_from beside model=) may be left out."
        )
    return "\n\n".join(parts)


def _doctor_help() -> str:
    examples = "\n".join(f"  {example}" for example in _EXAMPLES["doctor"])
    return f"""Usage: nemo-align doctor [+experiment=<recipe>/<stage>] [group=choice] [key=value] ...

{VERB_LINES["doctor"][0].upper()}{VERB_LINES["doctor"][1:]}.

Examples:
{examples}

Keys: verb=pretrain|sft|reward|preference|score where no experiment says it; every other key, group and experiment is
one of that verb (`nemo-align sft --help`). Without any, only the machine is looked at. On the ranks of a job (srun,
torchrun, or one worker per GPU of this machine) every group of the layout is timed. Ends with 0, or with 2 if something
is wrong."""


def _key_lines(verb: str) -> list[str]:
    from nemo_align.config import schema
    from nemo_align.config.choices import CHOICES
    from nemo_align.config.overrides import ALIASES

    words = {field: word for word, field in ALIASES.get(verb, {}).items()}
    lines = []
    for key in schema.keys(schema.VERBS[verb]):
        doc = key.doc
        allowed = CHOICES.get(key.name, ())
        if any(choice not in doc for choice in allowed):
            doc = f"{doc}: {' | '.join(allowed)}" if doc else " | ".join(allowed)
        name = words.get(key.name, key.name)
        lines.append(f"  {name:<42}{f'{key.node}{_default(key.name, key.default)}':<34}  {doc}".rstrip())
    return lines


def _default(name: str, default: object) -> str:
    if name == "experiment":
        return ", from +experiment= or the verb"
    if default == "???":
        return ", from model= or init_from" if name.startswith("model.") else ", required"
    return f" = {_shown(default)}"


def _shown(default: object) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return f"[{', '.join(map(str, default))}]"
    return str(default) if default != "" else '""'


def _selected(verb: str, group: str) -> str | None:
    """The choice that the root file of a verb makes."""
    root: Path = sources.conf_dir() / f"{verb}.yaml"
    for line in root.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith(f"- {group}:"):
            return line.partition(":")[2].strip()
    return None

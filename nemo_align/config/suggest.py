"""Did you mean: the nearest valid name for a key or a choice that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nemo_align.config import schema

# Names that users of Megatron, NeMo-Aligner and TRL know, by their last part.
OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "gradient_clip_val": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
    "lr_scheduler_type": "optimizer.schedule",
    "batch_size": "train.global_batch_size",
    "max_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "val_check_interval": "train.validate_every",
    "tensor_model_parallel_size": "parallel.tensor",
    "tp": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pp": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "vp": "parallel.virtual_pipeline",
    "dp": "parallel.data",
    "sequence_parallel": "parallel.sequence",
    "activations_checkpoint_granularity": "parallel.recompute",
    "ub_tp_comm_overlap": "parallel.overlap_tensor",
    "tp_comm_overlap": "parallel.overlap_tensor",
    "overlap_p2p_comm": "parallel.overlap_p2p",
    "num_layers_at_start_in_bf16": "precision.bf16_first_layers",
    "num_layers_at_end_in_bf16": "precision.bf16_last_layers",
    "attention_backend": "precision.attention",
    "beta": "preference.ref_policy_kl_penalty",
    "eta": "preference.gt_reward_scale",
    "seq_length": "data.sequence_length",
    "encoder_seq_length": "data.sequence_length",
    "max_length": "data.sequence_length",
    "tokenizer_path": "data.tokenizer",
    "restore_from_path": "checkpoint.init_from",
    "pretrained_checkpoint": "checkpoint.init_from",
    "save_interval": "checkpoint.save_every",
    "output_dir": "run_dir",
    "exp_dir": "run_dir",
}
_SURE, _LIKELY = 0.88, 0.7  # ratio of difflib: one typo in a name of nine letters gives 0.89


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.55) -> str | None:
    """The most similar choice, or None if nothing is similar."""
    ranked = sorted(((_similarity(name, choice), choice) for choice in choices), key=lambda pair: (-pair[0], pair[1]))
    return ranked[0][1] if ranked and ranked[0][0] >= cutoff else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    found = nearest(name, choices)
    return f"; did you mean '{found}'?" if found else ""


def nearest_key(unknown: str, root: type) -> str | None:
    """The full name of the key that `unknown` most likely stands for."""
    parts = unknown.split(".")
    known = [_with_names_of(key.name, parts) for key in schema.keys(root)]
    known += [name for name in _sections(root) if len(parts) <= name.count(".") + 1]
    if found := nearest(unknown, known, _SURE):
        return found
    leaf = parts[-1]
    if schema.find(root, OTHER_NAMES.get(leaf, "-")):
        return OTHER_NAMES[leaf]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    if same_leaf:
        return nearest(unknown, same_leaf, 0.0)
    in_section = [key for key in known if key.rpartition(".")[0] == ".".join(parts[:-1])]
    leaves = {key.rpartition(".")[2]: key for key in in_section or known}
    if found := nearest(leaf, leaves, 0.6):
        return leaves[found]
    return nearest(unknown, known, _LIKELY)


def unknown_key_message(unknown: str, verb: str) -> str:
    """`unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?`, or what else can be said about it."""
    message = f"unknown key '{unknown}'"
    owners = [other for other, root in schema.VERBS.items() if other != verb and schema.find(root, unknown)]
    if owners:
        return f"{message} for {verb}: it belongs to {', '.join(owners)}{_in_a_recipe(unknown, verb, owners)}"
    if elsewhere := _key_of_another_verb(unknown, verb):
        return f"{message} for {verb}; {elsewhere}"
    if found := nearest_key(unknown, schema.VERBS[verb]):
        return f"{message}; did you mean '{found}'?"
    section, root = unknown.rpartition(".")[0], schema.VERBS[verb]
    while section and schema.find(root, section) is None:
        section = section.rpartition(".")[0]
    node = schema.find(root, section) if section else schema.Node("section", root)
    names = ", ".join(schema.fields(node.type)) if node.kind == "section" else f"one {node}"
    return f"{message}; {f'{section!r}' if section else verb} has {names}"


def _in_a_recipe(key: str, verb: str, owners: Iterable[str]) -> str:
    """How a recipe sets a key of its stages' verbs."""
    if verb != "pipeline" or not set(owners) & set(schema.STAGE_VERBS):
        return ""
    if set(owners) >= set(schema.STAGE_VERBS):
        return f". For every stage: 'overrides=[\"{key}=...\"]', for one: 'stages.<name>.overrides=[\"{key}=...\"]'"
    return f". For a stage: 'stages.<name>.overrides=[\"{key}=...\"]'"


def _key_of_another_verb(unknown: str, verb: str) -> str | None:
    """Where a mistyped or foreign name belongs whose section only other verbs have."""
    section = unknown.partition(".")[0]
    if section in schema.fields(schema.VERBS[verb]) or "." not in unknown:
        return None
    for other, root in schema.VERBS.items():
        if section in schema.fields(root) and (found := nearest_key(unknown, root)):
            return f"did you mean '{found}' of {other}?"
    return None


def _similarity(name: str, other: str) -> float:
    """difflib's ratio; letters in another order (`tyni`) count as one typo, for which that ratio is too strict."""
    if sorted(name) == sorted(other):
        return 0.95 if name != other else 1.0
    return difflib.SequenceMatcher(None, name, other).ratio()


def _with_names_of(key: str, parts: list[str]) -> str:
    """`key` with its free names taken from the same places of what the user wrote."""

    def filled(name: str, written: str) -> str:
        is_item = name.endswith("[]") and written.startswith(name[:-1])
        return written if name == schema.FREE_NAME or is_item else name

    names = key.split(".")
    return ".".join(filled(name, parts[i]) if i < len(parts) else name for i, name in enumerate(names))


def _sections(root: type, prefix: str = "") -> list[str]:
    found = []
    for name, node in schema.fields(root).items():
        if node.kind == "section":
            found += [prefix + name, *_sections(node.type, f"{prefix}{name}.")]
        elif node.kind == "table":
            found.append(prefix + name)
    return found

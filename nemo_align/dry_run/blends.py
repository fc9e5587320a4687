"""Pretraining data: what each phase draws from each source, and what the files hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_align.config.stages import PretrainStageConfig
from nemo_align.data.indexed import check_indexed_dataset
from nemo_align.data.pretraining import PretrainingPhase
from nemo_align.dry_run.findings import Findings, Section, number_of_tokens


def section(config: PretrainStageConfig, phases: Sequence[PretrainingPhase], findings: Findings) -> Section:
    """A line for each source of each phase and each held-out set; files by their headers only."""
    length, lines = config.data.sequence_length, []
    for phase in phases:
        steps = config.data.phases[phase.name].steps
        lines.append(f"{phase.name}: {steps:,} steps, {number_of_tokens(phase.num_samples * length)} tokens")
        whole = sum(source.weight for source in phase.blend.values())
        for name, source in phase.blend.items():
            share = source.weight / whole
            wanted = share * phase.num_samples * length
            key = f"data.phases.{phase.name}.blend.{name}.path"
            held = _tokens(key, source.path, findings)
            passes = "" if held is None else f" of {number_of_tokens(held)}, {wanted / held:.2g} passes"
            lines.append(f"    {name} {share:.0%}: {number_of_tokens(wanted)}{passes} ({source.path})")
    for name, entry in config.data.validation.items():
        held = _tokens(f"data.validation.{name}.path", entry.path, findings)
        shown = "" if held is None else f": {number_of_tokens(held)} tokens"
        lines.append(f"held out: {name}{shown} ({entry.path})")
    return Section("data", lines)


def _tokens(key: str, prefix: str, findings: Findings) -> int | None:
    """Tokens of a pair, None if it is not here or wrong."""
    there = [Path(prefix + suffix).exists() for suffix in (".bin", ".idx")]
    if not any(there):
        findings.is_absent(key, prefix)
        return None
    with findings.collecting():
        return check_indexed_dataset(prefix, contents=False).num_tokens
    return None

"""docs/recipes.md says what the recipes say: every value that it shows, and every key that a recipe sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_align.config import build, schema
from nemo_align.config.compose import compose, to_yaml
from nemo_align.config.run_directory import differences
from nemo_align.planning.plan import plan_layout
from tests.unit.dry_run.test_recipes import CHAIN, stage_verb

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipes.md"
MODELS = ("nemotron4_340b", "nemotron4_15b", "minitron_4b")
STAGES = [*CHAIN[:5], "score_pairs", *CHAIN[6:]]
SHOWN = [stage for stage in STAGES if stage not in ("rpo_1", "rpo_2")]  # the rounds are equal, as the last test says
HELPSTEER2 = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
# Where a run goes and what it reads; sizes and layouts, which have tables of their own; how often it says something.
ELSEWHERE = (
    "experiment",
    "run_dir",
    "model.",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.recompute",
    "data.root",
    "data.tokenizer",
    "data.train.",
    "data.validation.",
    "inputs.",
    "checkpoint.init_from",
    "checkpoint.export_hf",
    "gpus",
    "dry_run",
    "train.log_every",
)


def sections() -> dict[str, dict[str, list[str]]]:
    """{heading: {key: [340B, 15B, 4B]}} of the tables of hyper-parameters."""
    found: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif match := re.match(r"\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", line):
            found.setdefault(heading, {})[match[1]] = [match[number].strip() for number in (2, 3, 4)]
    return found


def table_of(stage: str) -> dict[str, list[str]]:
    [own] = [table for heading, table in sections().items() if stage in heading.split(", ")]
    return {**sections()["What all stages have"], **own}


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def shown(config: Any, key: str) -> Any:
    """The value of a key in the page's form."""
    found = value(config, key)
    if key == "train.batch_ramp":
        assert [entry.from_tokens for entry in found] in ([], [0, 200e9, 400e9])
        return [entry.global_batch_size for entry in found] or "none"
    if key.endswith(".blend"):
        return [source.weight for source in found.values()]
    if key == "reward.attributes":
        return "HelpSteer2's five" if found == HELPSTEER2 else found
    return list(found.values()) if isinstance(found, dict) else found


def read(cell: str) -> Any:
    parts = [yaml.safe_load(re.sub(r"^(\d+)e", r"\1.0e", part)) for part in cell.split(", ")]
    values = [float(part) if isinstance(part, str) and re.fullmatch(r"[\d.]+e-?\d+", part) else part for part in parts]
    return values if len(values) > 1 else values[0]


def changed_keys(verb: str, config: Any) -> set[str]:
    """Keys whose value is not the schema's default."""
    default, _ = build.build(schema.VERBS[verb], {})
    keys = {key.name for key in schema.keys(schema.VERBS[verb]) if "<" not in key.name and "[" not in key.name}
    return {key for key in keys if value(config, key) != value(default, key) and not key.startswith(ELSEWHERE)}


def composed(name: str) -> Any:
    return compose(stage_verb(name), [f"+experiment={name}", "dry_run=true"])


@pytest.fixture(scope="module")
def configs() -> dict[tuple[str, str], Any]:
    return {(model, stage): composed(f"{model}/{stage}") for model in MODELS for stage in SHOWN}


@pytest.mark.parametrize("stage", SHOWN)
def test_the_page_shows_what_the_recipes_set(stage: str, configs: dict[tuple[str, str], Any]) -> None:
    table = table_of(stage)
    wrong, verb = [], stage_verb(f"{MODELS[0]}/{stage}")
    for column, model in enumerate(MODELS):
        config = configs[model, stage]
        for key, cells in table.items():
            if schema.find(schema.VERBS[verb], key) and shown(config, key) != read(cells[column]):
                wrong.append(f"{model}: {key} is {shown(config, key)}, the page says {cells[column]}")
        wrong += [f"{model}: {key} is set but not on the page" for key in changed_keys(verb, config) - set(table)]
    assert wrong == []


def test_the_rounds_differ_in_where_they_start_alone(configs: dict[tuple[str, str], Any]) -> None:
    last = to_yaml(configs[MODELS[0], "rpo_3"])
    for number in (1, 2):
        changed = {key for key, *_ in differences(last, to_yaml(composed(f"{MODELS[0]}/rpo_{number}")))}
        assert changed == {"experiment", "run_dir", "checkpoint.init_from", "checkpoint.export_hf"}


def layout_rows() -> list[list[str]]:
    """Cells of the table of layouts and sizes."""
    [_, after] = PAGE.read_text(encoding="utf-8").split("## Layouts\n")
    rows = [line.split("|")[1:-1] for line in after.split("\n## ")[0].splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("row", layout_rows(), ids=lambda row: row[0].strip("`"))
def test_layouts_have_the_plans_size_and_time(row: list[str]) -> None:
    experiment, gpus, states, activations, largest, time, _ = row
    result = plan_layout(compose("plan", [f"+experiment={experiment.strip('`')}"]))
    memory, total = result.main.memory, result.total
    of = memory.largest
    assert gpus == f"{result.main.job.world_size:,}"
    assert float(states) == pytest.approx((of.weights + of.gradients + of.optimizer) / 1e9, abs=0.05)
    assert float(activations) == pytest.approx(of.activations / 1e9, abs=0.05)
    assert float(largest) == pytest.approx(of.total / 1e9, abs=0.05) and memory.verdict == "fits"
    number, unit = time.split()
    seconds = float(number.replace(",", "")) * {"days": 86400, "hours": 3600}[unit]
    assert seconds == pytest.approx(total.seconds, rel=0.02)

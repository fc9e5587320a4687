"""The schema as a tree of keys, suggestions, and the help made from it."""

from __future__ import annotations

import pytest

from nemo_align.config import help as help_texts
from nemo_align.config import schema
from nemo_align.config.choices import CHOICES
from nemo_align.config.suggest import OTHER_NAMES, nearest, nearest_key


@pytest.mark.parametrize("verb", schema.VERBS)
def test_every_key_says_what_it_means(verb):
    assert [key.name for key in schema.keys(schema.VERBS[verb]) if not key.doc] == []


def test_an_overridden_field_inherits_its_comment():
    keys = {key.name: key for key in schema.keys(schema.VERBS["sft"])}
    assert keys["data.overlong"].default == "truncate"
    assert keys["data.overlong"].doc == "error | drop | truncate (the oldest turns)"


def test_choices_and_foreign_names_point_at_real_keys():
    everything = {key.name for root in schema.VERBS.values() for key in schema.keys(root)}
    assert set(CHOICES) <= everything
    assert set(OTHER_NAMES.values()) <= everything
    for root in schema.VERBS.values():
        for key in schema.keys(root):
            if key.name in CHOICES and isinstance(key.default, str) and key.default != schema.MISSING:
                assert key.default in CHOICES[key.name]


def test_find():
    root = schema.VERBS["pretrain"]
    assert schema.find(root, "data.phases.any.blend.thing.weight").type is float
    assert schema.find(root, "train.batch_ramp[3].from_tokens").type is float
    assert schema.find(root, "data.phases.any.blnd") is None
    assert schema.find(root, "optimizer.lr.x") is None


@pytest.mark.parametrize(
    "verb, wrong, right",
    [
        ("sft", "optimzer.lr", "optimizer.lr"),
        ("sft", "optimizer.learning_rate", "optimizer.lr"),
        ("sft", "train.tensor", "parallel.tensor"),
        ("sft", "checkpoint.initfrom", "checkpoint.init_from"),
        ("sft", "data.validaton.held_out.path", "data.validation.held_out.path"),
        ("preference", "preference.loss", "preference.preference_loss"),
        ("preference", "select.ties", "data.select.ties"),
        ("pretrain", "data.phases.warm.step", "data.phases.warm.steps"),
        ("sft", "qqqqqqqq", None),
    ],
)
def test_nearest_key(verb, wrong, right):
    assert nearest_key(wrong, schema.VERBS[verb]) == right


def test_letters_in_another_order():
    assert nearest("tyni", ["tiny", "minitron_4b"]) == "tiny"


def test_verbs_have_their_line():
    assert set(help_texts.VERB_LINES) == {*schema.VERBS, "doctor"}  # which has the keys of another verb
    assert all(verb in help_texts.overview() for verb in schema.VERBS)


@pytest.mark.parametrize("verb", schema.VERBS)
def test_help_of_a_verb_shows_every_key(verb):
    text = help_texts.verb_help(verb)
    shown = {"source_format": "from", "target_format": "to"}
    for key in schema.keys(schema.VERBS[verb]):
        assert f"\n  {shown.get(key.name, key.name)} " in text
        assert key.doc in text
    for key, allowed in CHOICES.items():
        if schema.find(schema.VERBS[verb], key):
            assert all(choice in text for choice in allowed)
    assert f"nemo-align {verb} " in text


def test_help_shows_only_what_a_verb_has():
    convert = help_texts.verb_help("convert")
    assert not [text for text in ("+experiment", "[group=choice]", "--multirun", "Groups:") if text in convert]
    score = help_texts.verb_help("score")
    assert "--multirun" in score and "  parallel=tp2 " in score and "tracking=wandb" not in score


def test_help_marks_the_default_choice():
    lines = help_texts.verb_help("pretrain").splitlines()
    assert any(line.startswith("  optimizer=cosine") and line.endswith("(default)") for line in lines)
    assert not any(line.startswith("  optimizer=adamw") and line.endswith("(default)") for line in lines)

"""A config.json that somebody else wrote: every malformed value is refused by file and key, by ValueError alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.huggingface.folder import HuggingFaceWeights
from nemo_align.checkpoint.streaming.safetensors import SafetensorsFolder
from nemo_align.config.hf_model import hf_model_config, hf_reward_config
from tests.bad_input_tally import tried
from tests.checkpoint_files import write_safetensors
from tests.unit.checkpoint.test_conversion_sources import write_hf

GOOD = {
    "architectures": ["NemotronForSequenceClassification"],
    "model_type": "nemotron",
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.01,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "id2label": {"0": "helpfulness", "1": "verbosity"},
    "attribute_weights": {"helpfulness": 1.0, "verbosity": -0.5},
    "reward_head_bias": True,
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
ROPE = GOOD["rope_parameters"]
# (what is changed, the key that the error names)
MALFORMED = [
    *(({key: value}, key) for key in SIZES for value in (0, -4, 2.0, "8", True, [8], {}, 10**12, 10**400)),
    *(({key: value}, key) for key in ("kv_channels", "attention_head_dim") for value in (0, "4", 4.0, 5)),
    *(({"num_key_value_heads": value}, "num_key_value_heads") for value in (0, -1, 3, 8, "2", 2.0, [2])),
    *(({"max_position_embeddings": value}, "max_position_embeddings") for value in (0, "4096", 1e3, 10**30)),
    *(
        ({key: value}, key)
        for key in ("norm_eps", "initializer_range")
        for value in ("1e-5", 0, -1e-5, float("nan"), float("inf"), 10**400, True, [1e-5], {})
    ),
    *(({key: 8}, key) for key in ("rope_parameters", "rope_scaling")),
    *(({key: []}, key) for key in ("rope_parameters", "rope_scaling")),
    *(({"rope_parameters": ROPE | {"rope_theta": value}}, "rope_theta") for value in ("1e4", 0, 1e300, 0.5, [1])),
    *(
        ({"rope_parameters": ROPE | {"partial_rotary_factor": value}}, "partial_rotary_factor")
        for value in ("0.5", 0, 1.5, -0.5, float("nan"), [0.5], 0.3)
    ),
    *(({"rope_parameters": ROPE | {"rope_type": value}}, "rope_type") for value in ("yarn", 1, [1], {"a": 1})),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    ({"rope_percent": "a half"}, "rope_percent"),
    ({"rope_theta": {}}, "rope_theta"),
    *(({"model_type": value}, "model_type") for value in (None, 5, ["nemotron"], {}, "x" * 10**5)),
    *(({"hidden_act": value}, "hidden_act") for value in (None, 5, ["relu2"])),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ({"_name_or_path": 5}, "_name_or_path"),
    ({"_name_or_path": "\ud800"}, "_name_or_path"),
    *(({"architectures": value}, "architectures") for value in (5, "NemotronForSequenceClassification", [5], {})),
    *(
        ({"id2label": value}, "id2label")
        for value in (None, {}, [], ["a", "b"], 5, {"a": "x", "b": "y"}, {"1": "x", "2": "y"}, {"0": 1, "1": 2})
    ),
    *(
        ({"id2label": value}, "id2label")
        for value in ({"0": "x", "1": "x"}, {"0": "", "1": "x"}, {"0": None, "1": "x"}, {"0": ["x"], "1": "y"})
    ),
    *(
        ({"attribute_weights": value}, "attribute_weights")
        for value in (5, [1.0], {"humour": 1.0}, {"verbosity": "1"}, {"verbosity": None}, {"verbosity": float("nan")})
    ),
    *(({"reward_head_bias": value}, "reward_head_bias") for value in (1, "true", [])),
]  # fmt: skip


def read(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    hf_model_config(folder)
    hf_reward_config(folder)


def test_the_config_that_the_others_are_made_of(tmp_path: Path) -> None:
    read(tmp_path, json.dumps(GOOD))


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_a_malformed_value(number: int, tmp_path: Path) -> None:
    changes, key = MALFORMED[number]
    tried["config.json"] += 1
    with pytest.raises(ValueError) as caught:
        read(tmp_path, json.dumps(GOOD | changes))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "config.json")) and key in message and len(message) < 600, message


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key(key: str, tmp_path: Path) -> None:
    """Refused, or something that has a default: never a traceback."""
    text = json.dumps({name: value for name, value in GOOD.items() if name != key})
    if key in ("architectures", "num_key_value_heads", "head_dim", "attribute_weights", "reward_head_bias"):
        read(tmp_path, text)
        return
    with pytest.raises(ValueError, match=r"config\.json"):
        read(tmp_path, text)


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "{", '{"a": ' + "9" * 5000 + "}", "[" * 10**5, "\udcff"])
def test_what_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|holds)"):
        hf_model_config(tmp_path)


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        hf_model_config(tmp_path)


def test_a_reward_model_without_its_head(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    values |= {key: GOOD[key] for key in ("architectures", "id2label", "attribute_weights", "reward_head_bias")}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"missing: score\.weight \(1 in all\)"):
        open_huggingface(folder)


@pytest.mark.parametrize("shape", [(2,), (2, 9), (2, 8, 1), ()])
def test_a_head_of_a_strange_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    files = SafetensorsFolder(folder)
    tensors = {name: files.read(name) for name in files.names()}
    if shape:
        write_safetensors(folder, tensors | {"score.weight": torch.ones(shape)})
    else:  # the writer knows no numbers
        save_file(tensors | {"score.weight": torch.tensor(1.0)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"score\.weight has shape"):
        HuggingFaceWeights(folder, hf_model_config(folder), with_output_layer=False)

"""Configurations, tokenizers and templates that others wrote are data: none of them runs code or reads secrets."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from nemo_align import cli
from nemo_align.checkpoint.huggingface.tokenizer_files import write_tokenizer
from nemo_align.config.compose import ConfigError, compose, load_resolved, to_yaml
from nemo_align.data.chat_template import CHAT_TEMPLATE_JINJA, ChatTemplate
from nemo_align.data.tokenizer import load_tokenizer
from tests.stage_inputs import MODEL, StageInputs, stage_overrides

SECRET = "canary-9f2c61"


@pytest.fixture
def arguments(stage_inputs: StageInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    return [*MODEL, *stage_overrides(stage_inputs, "sft")]


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=${oc.env:HF_TOKEN}",
        "model.name=${oc.env:HF_TOKEN,none}",
        "experiment=${oc.env:HF_TOKEN}",
        "optimizer.lr=${oc.env:HF_TOKEN}",
        'data.default_system="say ${oc.decode:${oc.env:HF_TOKEN}}"',
        "data.train.${oc.env:HF_TOKEN}.path=x",
    ],
)
def test_the_environment_stays_out_of_the_configuration(override: str, arguments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("sft", [*arguments, override])
    assert SECRET not in str(caught.value)
    if "data.train." not in override:
        assert "${oc.env:HF_TOKEN} reads the environment, which a configuration may not" in str(caught.value)


def test_the_environment_stays_out_of_files_too(arguments: list[str], tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "theirs.yaml").write_text(
        "# @package _global_\nrun_dir: runs/${oc.env:HF_TOKEN}\n"
    )
    for option in ([], ["--cfg", "job"], ["--multirun"]):
        assert cli.main(["sft", "--config-dir", "mine", *arguments, "+experiment=theirs", *option]) != 0
    said = capfd.readouterr()
    assert "reads the environment" in said.err and SECRET not in said.err + said.out
    assert not any(SECRET in str(path) for path in tmp_path.rglob("*"))


def test_what_looks_like_an_interpolation_stays_text_in_workers(arguments: list[str], tmp_path: Path) -> None:
    config = compose("sft", [*arguments, r"data.default_system=\${oc.env:HF_TOKEN}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_resolved("sft", tmp_path / "config.yaml").data.default_system == "${oc.env:HF_TOKEN}"


@pytest.mark.parametrize(
    "text",
    [
        "run_dir: !!python/object/apply:pathlib.Path.touch [CANARY]",
        "run_dir: !!python/object/new:pathlib.PosixPath [CANARY]",
        "run_dir:\n  _target_: pathlib.Path.touch\n  _args_: [CANARY]",
        "optimizer:\n  _target_: pathlib.Path.touch\n  self: CANARY",
        "data:\n  train:\n    rows:\n      _target_: pathlib.Path.touch",
    ],
)
def test_yaml_makes_no_objects(text: str, arguments: list[str], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = text.replace("CANARY", str(canary))
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    (tmp_path / "config.yaml").write_text(text + "\n")
    monkey = pytest.MonkeyPatch()
    monkey.setenv("NEMO_ALIGN_CONFIG_DIR", str(tmp_path / "mine"))
    try:
        with pytest.raises(ConfigError):
            compose("sft", [*arguments, "+experiment=theirs"])
    finally:
        monkey.undo()
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "config.yaml"))):
        load_resolved("sft", tmp_path / "config.yaml")
    assert not canary.exists()


@pytest.mark.parametrize(
    "where, option",
    [
        *itertools.product(
            ["section", "dotted", "package"], [[], ["--multirun"], ["--info", "defaults"], ["--cfg", "hydra"]]
        ),
        ("swept", ["--multirun"]),  # only a sweep takes several
    ],
)
def test_files_do_not_set_hydra(where: str, option: list[str], arguments: list[str], tmp_path: Path, capfd) -> None:
    """Hydra calls what its own section names: callbacks, launchers, sweepers, factories of log handlers."""
    canary = tmp_path / "canary"
    target = f"_target_: pathlib.Path.touch\n{{}}self: {canary}\n"
    folder = tmp_path / "mine" / "experiment"
    (folder / "hydra").mkdir(parents=True)
    if where == "package":
        text = "# @package hydra.callbacks.theirs\n" + target.format("")
    elif where == "dotted":
        text = f"# @package _global_\nhydra.callbacks.theirs:\n  {target.format('  ')}"
    else:
        text = f"# @package _global_\nhydra:\n  callbacks:\n    theirs:\n      {target.format('      ')}"
    (folder / "theirs.yaml").write_text(text)
    (folder / "good.yaml").write_text("# @package _global_\ntrain:\n  packing: true\n")
    choice = "+experiment=good,theirs" if where == "swept" else "+experiment=theirs"
    code = cli.main(["sft", "--config-dir", str(tmp_path / "mine"), *arguments, choice, *option])
    assert code == 2
    assert re.search(r"theirs\.yaml:\d+: a file may not set hydra", capfd.readouterr().err)
    assert not canary.exists()


# Tokenizers

EVIL = "from pathlib import Path\nPath({canary!r}).touch()\nclass Theirs:\n    pass\n"
ESCAPE = (
    "{{% set x = cycler.__init__.__globals__.os.system('touch {canary}') %}}"
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}"
)


@pytest.fixture
def downloaded(stage_inputs: StageInputs, tmp_path: Path) -> Path:
    """A Hugging Face tokenizer folder with code, a hostile template, and settings that name the code."""
    canary = str(tmp_path / "canary")
    ours = tmp_path / "ours"
    load_tokenizer(stage_inputs.tokenizer).save(ours)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    write_tokenizer(ours, folder, is_reward=False, max_length=64)
    (folder / "nemo_align_tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]},
        "chat_template": ESCAPE.format(canary=canary),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(ESCAPE.format(canary=canary))
    (folder / "theirs.py").write_text(EVIL.format(canary=canary))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "nemotron", "auto_map": {"AutoConfig": "theirs.Theirs"}})
    )
    return folder


def test_a_downloaded_tokenizer_runs_nothing(downloaded: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(downloaded)
    template = ChatTemplate(tokenizer)
    assert template.turns([]) and not (tmp_path / "canary").exists()


def test_a_tokenizer_that_is_code_alone_is_refused(downloaded: Path, tmp_path: Path) -> None:
    settings = json.loads((downloaded / "tokenizer_config.json").read_text())
    (downloaded / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Theirs"}))
    (downloaded / "tokenizer.json").unlink()
    (downloaded / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=re.escape(str(downloaded))):
        load_tokenizer(downloaded)
    assert not (tmp_path / "canary").exists()


def test_an_export_hands_on_no_code(downloaded: Path, tmp_path: Path) -> None:
    (downloaded / "vocab.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / "export").mkdir()
    write_tokenizer(downloaded, tmp_path / "export", is_reward=False, max_length=64)
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert not {name for name in names if name.endswith((".py", ".pkl", ".bin"))} and "config.json" not in names
    settings = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert "auto_map" not in settings and settings["chat_template"] == CHAT_TEMPLATE_JINJA
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == CHAT_TEMPLATE_JINJA


def test_an_export_publishes_no_file_from_elsewhere(downloaded: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text(SECRET)
    (downloaded / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    (tmp_path / "export").mkdir()
    with pytest.raises(ValueError, match=r"vocab\.txt is a link"):
        write_tokenizer(downloaded, tmp_path / "export", is_reward=False, max_length=64)


def test_our_templates_need_no_more_than_a_sandbox() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    page = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE_JINJA)
    text = page.render(messages=[{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}], add_generation_prompt=True)
    assert "{{ 7 * 7 }}{% raw %}" in text  # what a message says is never a template

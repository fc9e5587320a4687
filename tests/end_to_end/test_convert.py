"""`nemo-align convert`, `merge` and `inspect`: killed and resumed, run again, verified, refused.

What needs no process of its own runs here, from the same overrides: importing torch costs more than the work.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nemo_align.checkpoint.conversion.convert import convert
from nemo_align.checkpoint.conversion.inspect import inspect
from nemo_align.checkpoint.conversion.merge import merge
from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.conversion.open_megatron import open_megatron
from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.checkpoint.huggingface.weight_map import weight_map
from nemo_align.checkpoint.streaming.safetensors import SafetensorsFolder
from nemo_align.checkpoint.streaming.torch_dist import TensorReader
from nemo_align.config.compose import compose
from nemo_align.config.model import ModelConfig
from tests.checkpoint_files import write_safetensors
from tests.distributed.pool import WorkerPool
from tests.end_to_end.commands import environment, run

MODEL = ModelConfig(
    name="some",
    num_layers=6,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=48,  # 8 x 48 is not 256
    vocab_size=1001,
)


def write_hf(folder: Path, *, seed: int = 1, model: ModelConfig = MODEL) -> Path:
    """A folder of random bf16 weights without a tokenizer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        name: shape
        for weight in weight_map(model, has_output_layer=True)
        for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
    }
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    write_safetensors(folder, tensors, max_shard_bytes=4 << 20)
    config = hf_config(model, dtype="bf16", bos_id=1, eos_id=2, pad_id=0, reward=None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def megatron(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    done = run(*arguments_of(source, folder / "checkpoint", "verify=true"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "verified: 52 tensors, " in done.stderr and "each equal to the source's" in done.stderr
    return folder / "checkpoint"


def arguments_of(source: Path, target: Path, *more: str, there: bool = True) -> list[str]:
    formats = ("from=hf", "to=megatron") if there else ("from=megatron", "to=hf")
    return ["convert", *formats, f"source={source}", f"target={target}", *more]


def here(verb: str, *overrides: str) -> None:
    """The verb in this process."""
    {"convert": convert, "merge": merge, "inspect": inspect}[verb](compose(verb, list(overrides)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = SafetensorsFolder(folder)
    return {name: files.read(name) for name in files.names()}


def test_back_is_bit_for_bit(source: Path, megatron: Path, tmp_path: Path) -> None:
    here(*arguments_of(megatron, tmp_path / "hf", "shard_size=3MB", "verify=true", there=False))
    there, back = tensors(source), tensors(tmp_path / "hf")
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)
    assert not list(tmp_path.glob(".tmp-*"))


def test_again_verifies_and_leaves_alone(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "again"
    here(*arguments_of(source, target))
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    with caplog.at_level(logging.INFO, "nemo_align"):
        here(*arguments_of(source, target))
    assert "was converted before from the same source: verified, left alone" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    with pytest.raises(ValueError, match=f"{target} exists already"):
        here(*arguments_of(source, target, "dtype=fp32"))
    data = target / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[500_000] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        here(*arguments_of(source, target))


# A conversion in small parts, slowed down so that there are moments to kill it at.
SLOW = """
import sys, time
from nemo_align.checkpoint.streaming import transfer
transfer.PART_BYTES, transfer._SYNC_SECONDS, transfer._POLL_SECONDS, make = 256 << 10, 0.05, 0.05, transfer.write
def slowly(*arguments):
    time.sleep(0.06)
    return make(*arguments)
transfer.write = slowly
from nemo_align.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "there", [pytest.param(True, id="to megatron"), pytest.param(False, id="to hf", marks=pytest.mark.full)]
)
def test_killed_at_random_moments_it_ends_the_same(there: bool, source: Path, megatron: Path, tmp_path: Path) -> None:
    """Five kills in each direction: ten in all."""
    origin = source if there else megatron
    slow = [sys.executable, "-c", SLOW]

    def start(target: Path) -> subprocess.Popen:
        more = ["workers=2", f"run_dir={tmp_path}/log", "shard_size=4MB"]
        command = [*slow, *arguments_of(origin, target, *more, there=there)]
        return subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)

    undisturbed, target = tmp_path / "undisturbed", tmp_path / "killed"
    process = start(undisturbed)
    assert process.communicate()[1] is not None and process.returncode == 0
    chance, resumed = random.Random(f"{there}"), 0
    for _ in range(5):
        process = start(target)
        said = ""
        while "2 workers" not in said:  # parts are written from here on
            line = process.stderr.readline()
            assert line, said
            said += line
        time.sleep(chance.uniform(0.0, 0.35))
        process.send_signal(signal.SIGKILL)
        said += process.communicate()[1]
        resumed += "going on: " in said
        assert process.returncode == -signal.SIGKILL and not target.exists(), said
    process = start(target)
    said = process.communicate()[1]
    assert process.returncode == 0 and "going on: " in said, said
    found, expected = contents(target), contents(undisturbed)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_damaged_source_leaves_nothing(megatron: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(megatron, copy)
    data = copy / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[300_000] ^= 4
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"\S+__0_0\.distcp: \S+ is damaged"):
        here(*arguments_of(copy, tmp_path / "hf", there=False))
    assert not (tmp_path / "hf").exists()


def test_logits_that_differ_are_found(source: Path, megatron: Path, pool1: WorkerPool, tmp_path: Path) -> None:
    """In a worker: Megatron-core must not be left behind in this process."""
    assert pool1.run(logits_difference, str(source), str(megatron))[0] <= 1e-6
    changed = tmp_path / "changed"
    values = tensors(source)
    values["model.layers.3.mlp.up_proj.weight"] = values["model.layers.3.mlp.up_proj.weight"] * 1.01
    shutil.copytree(source, changed)
    for path in changed.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(changed, values)
    assert "logits of" in pool1.run(logits_difference, str(changed), str(megatron))[0]


def logits_difference(source: str, made: str) -> float | str:
    from nemo_align.checkpoint.conversion.logits import compare_logits

    try:
        return compare_logits(open_huggingface(source), open_megatron(made))
    except ValueError as error:
        return str(error)


def test_merging(source: Path, megatron: Path, tmp_path: Path) -> None:
    other = write_hf(tmp_path / "other", seed=2)
    both = f"sources=[{megatron},{other}]"
    here("merge", both, "weights=[3,1]", "to=hf", f"target={tmp_path}/merged")
    first, second, merged = tensors(source), tensors(other), tensors(tmp_path / "merged")
    for name, found in merged.items():
        # The same order of the same fp32 operations: 0 + 0.75 a + 0.25 b, then one rounding.
        expected = (0.75 * first[name].float() + 0.25 * second[name].float()).bfloat16()
        assert torch.equal(found, expected), name
    here("merge", both, "method=slerp", "t=0.3", f"target={tmp_path}/arc")
    a, b = (first["lm_head.weight"].double(), second["lm_head.weight"].double())
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    arc = torch.sin(0.7 * angle) / torch.sin(angle) * a + torch.sin(0.3 * angle) / torch.sin(angle) * b
    difference = (TensorReader(tmp_path / "arc").read("output_layer.weight").double() - arc).abs() / arc.abs().max()
    assert float(difference.max()) <= 2**-8  # bfloat16's unit roundoff, of the largest value
    here("merge", both, "method=slerp", "t=1", f"target={tmp_path}/end")
    assert torch.equal(TensorReader(tmp_path / "end").read("output_layer.weight"), second["lm_head.weight"])
    write_hf(tmp_path / "smaller", model=ModelConfig(**{**vars(MODEL), "num_layers": 2}))
    with pytest.raises(ValueError, match="num_layers is 2, not 6"):
        here("merge", f"sources=[{megatron},{tmp_path}/smaller]", f"target={tmp_path}/x")


def test_inspecting(megatron: Path, tmp_path: Path) -> None:
    shown = run("inspect", str(megatron), "checksums=true", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for text in ("Megatron-core (torch_dist)", "5,139,456", "every checksum agrees", "8 heads, 2 key-value heads"):
        assert text in shown.stdout, shown.stdout
    missing = run("inspect", "nothing", cwd=tmp_path)
    assert missing.returncode == 2 and "nothing does not exist" in missing.stderr


@pytest.mark.parametrize("formats, count", [("hf megatron", 772), ("megatron hf", 964), ("nemo hf", 964)])
def test_the_plan_of_the_340b(formats: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = formats.split()
    here("convert", f"from={source}", f"to={target}", "plan=true", "architecture=nemotron4_340b")
    shown = capsys.readouterr().out
    assert f"{count} tensors with 682,058,391,552 bytes" in shown
    assert shown.count("linear_qkv.weight") >= 96


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("to=nemo", "source=.", "target=x"), "to=nemo is not offered"),
        (("to=megatron", "source=.", "target=x", "max_memory=300MB"), "max_memory is 300 MB, at least"),
        (("to=megatron", "source=.", "target=x", "max_memory=much"), "max_memory=much is no size"),
        (("to=megatron", "target=x"), "source is missing"),
        (("to=megatron", "source=."), "target is missing"),
        (("to=megatron", "plan=true", "architecture=nemotron4_34b"), "did you mean 'nemotron4_340b'"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        here("convert", "from=hf", *arguments)

"""A stage on a GPU does what it does on a CPU: same weights and rows, same losses within the number format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.commands import CASES, NO_GPU, GpuInputs, command

pytestmark = pytest.mark.full

# bf16 has 8 bits of precision; the two sides round in other places of every layer.
LOSS, NORM = 1e-2, 4e-2


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_are_those_of_a_cpu(case: str, inputs: GpuInputs, tmp_path: Path) -> None:
    verb, extra = CASES[case]
    on_gpu = command(verb, tmp_path / "gpu", [*inputs.overrides(verb), *extra])
    on_cpu = inputs.on_cpu(case)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        print(case, cpu["step"], cpu["loss"], gpu["loss"], cpu["grad_norm"], gpu["grad_norm"])
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=LOSS)
        assert gpu["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=NORM)


@pytest.mark.parametrize("verb", ["pretrain", "sft", "preference"])
def test_fp8_follows_bf16(verb: str, inputs: GpuInputs, tmp_path: Path) -> None:
    overrides = [*inputs.overrides(verb), "data.sequence_length=128"]
    plain = command(verb, tmp_path / "bf16", overrides)
    for recipe in ("delayed", "tensorwise", "blockwise"):
        fp8 = command(verb, tmp_path / recipe, [*overrides, f"precision=fp8_{recipe}"])
        for one, other in zip(plain, fp8, strict=True):
            print(verb, recipe, one["step"], one["loss"], other["loss"], one["grad_norm"], other["grad_norm"])
        for one, other in zip(plain, fp8, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=0.03)
            assert one["loss"] != other["loss"], "nothing was computed in FP8"


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(inputs: GpuInputs, tmp_path: Path) -> None:
    command("sft", tmp_path / "gpu", inputs.overrides("sft"))
    follows = [*inputs.overrides("sft"), f"checkpoint.init_from={tmp_path / 'gpu'}", "train.max_steps=1"]
    (cpu,) = command("sft", tmp_path / "after_cpu", follows, NO_GPU)
    (gpu,) = command("sft", tmp_path / "after_gpu", follows)
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=LOSS)


@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed", "fp8_tensorwise"])
def test_a_resumed_run_ends_as_an_undisturbed_one(precision: str, inputs: GpuInputs, tmp_path: Path) -> None:
    same = [
        *inputs.overrides("sft"),
        f"precision={precision}",
        "runtime.deterministic=true",
        # Transformer Engine leaves cuDNN's kernel out where it has to be deterministic and rows are packed.
        "precision.attention=unfused",
        "train.epochs=2",
        "train.max_steps=6",
    ]
    whole = command("sft", tmp_path / "whole", same)
    command("sft", tmp_path / "parts", [*same, "train.max_steps=3"])
    parts = command("sft", tmp_path / "parts", same)
    assert [record["loss"] for record in parts] == [record["loss"] for record in whole]
    assert [record["grad_norm"] for record in parts] == [record["grad_norm"] for record in whole]

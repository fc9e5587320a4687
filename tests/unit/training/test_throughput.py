"""MFU against figures worked out by hand from the report's convention, and the peaks it is measured against."""

import itertools
from dataclasses import replace

import pytest
import torch

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import PrecisionConfig
from nemo_align.config.training import TrackingConfig
from nemo_align.data.step_plan import StepPlan
from nemo_align.training import peak
from nemo_align.training.forward_totals import ForwardTotals
from nemo_align.training.peak import datasheet_tflops, measure_matmul_tflops, peak_tflops
from nemo_align.training.throughput import STEPS_LEFT_OUT, Throughput

NEMOTRON_340B = ModelConfig(
    name="340b",
    num_layers=96,
    hidden_size=18432,
    ffn_hidden_size=73728,
    num_attention_heads=96,
    num_query_groups=8,
    vocab_size=256000,
)
FULL_SEQUENCE = 8_621_236_313_653_248  # FLOPs of one sequence of 4096, forward and backward
CAUSAL_SEQUENCE = 8_443_115_429_953_536


def plan(sequences: int, *, padding: int = 0) -> StepPlan:
    return StepPlan(
        micro_batches=(((0,),),),
        length=4096,
        examples=sequences,
        real_tokens=sequences * 4096,
        squared_tokens=sequences * 4096**2,
        padded_tokens=(sequences + padding) * 4096,
        padded_squared_tokens=(sequences + padding) * 4096**2,
        loss_tokens=sequences * 4096,
        num_micro_batches=1,
    )


def throughput(**changes) -> Throughput:
    values = {"world_size": 1536, "peak_tflops": 989.0, "peak_source": "datasheet"}
    return Throughput(NEMOTRON_340B, **(values | changes))


def test_the_reports_own_step_gives_the_reports_own_mfu():
    # Table 2: 1536 GPUs, batch 768, 10.3 seconds per step, 42.4 % MFU. The peak there is 989.4.
    metrics = throughput().step(plan(768), 10.3)
    assert metrics["perf/mfu"] == pytest.approx(0.424, abs=0.0015)
    assert metrics["perf/mfu"] == pytest.approx(768 * FULL_SEQUENCE / (10.3 * 1536 * 989e12))
    assert metrics["perf/tokens_per_second_per_gpu"] == pytest.approx(768 * 4096 / 10.3 / 1536)
    assert metrics["perf/model_tflops_per_gpu"] == pytest.approx(metrics["perf/mfu"] * 989)


def test_padding_counts_only_in_the_padded_figure():
    metrics = throughput().step(plan(3, padding=1), 1.0)
    assert metrics["perf/mfu_padded"] == pytest.approx(metrics["perf/mfu"] * 4 / 3)
    assert metrics["perf/padding_fraction"] == pytest.approx(0.25)


def test_a_reward_model_computes_no_logits():
    metrics = throughput(with_logits=False).step(plan(1), 1.0)
    assert metrics["perf/mfu"] == pytest.approx(8_505_272_196_661_248 / (1536 * 989e12))


def test_stage_totals_leave_out_the_first_steps_and_survive_a_restart():
    first = throughput()
    for seconds in [100.0] * STEPS_LEFT_OUT + [2.0]:
        first.step(plan(1), seconds)
    resumed = throughput(totals=first.totals)
    for seconds in [100.0] * STEPS_LEFT_OUT + [4.0]:
        resumed.step(plan(1), seconds)
    stage = resumed.stage()
    assert stage["mfu"] == pytest.approx(2 * FULL_SEQUENCE / (6.0 * 1536 * 989e12))
    assert stage["mfu_causal"] == pytest.approx(2 * CAUSAL_SEQUENCE / (6.0 * 1536 * 989e12))
    assert stage["tokens_per_second_per_gpu"] == pytest.approx(2 * 4096 / 6.0 / 1536)
    assert stage["steps_left_out"] == 2 * STEPS_LEFT_OUT


def test_a_stage_of_one_step_counts_it_and_one_of_none_has_no_rate():
    short = throughput()
    assert short.stage() == {}
    short.step(plan(1), 2.0)
    assert short.stage()["mfu"] == pytest.approx(FULL_SEQUENCE / (2.0 * 1536 * 989e12))
    assert short.stage()["steps_left_out"] == 0


def test_a_step_beyond_64_bits_is_counted_exactly_enough():
    meter = throughput(world_size=6144, steps_left_out=0)
    meter.step(plan(2304), 8.0)
    assert 2304 * FULL_SEQUENCE > 2**63
    assert meter.totals["flops"] == pytest.approx(2304 * FULL_SEQUENCE, rel=1e-15)


def test_forward_only_work_is_a_third_and_stays_out_of_the_stage():
    totals = ForwardTotals()
    totals.add(plan(2), 0.5)
    totals.add(plan(1), 0.5)
    meter = throughput()
    rates = meter.forward(totals)
    assert rates["mfu"] == pytest.approx(FULL_SEQUENCE / (1536 * 989e12))  # a third of three sequences in one second
    assert rates["seconds"] == 1.0 and rates["tokens"] == 3 * 4096
    assert meter.stage() == {}
    assert meter.forward(ForwardTotals()) == {"seconds": 0.0, "tokens": 0}


def test_the_log_line_states_convention_and_peak():
    line = throughput().describe()
    assert "not halved for causality" in line and "989 TFLOP/s per device (datasheet)" in line


@pytest.mark.parametrize(
    ("name", "number_format", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA GB200", "bf16", 2450),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),  # the A100 has no FP8
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_datasheet(name, number_format, expected):
    assert datasheet_tflops(name, number_format) == expected


def test_peak_of_precision_and_of_the_configuration():
    bf16 = PrecisionConfig()
    assert peak_tflops(TrackingConfig(), bf16, "NVIDIA H100 80GB HBM3")[0] == 989
    assert peak_tflops(TrackingConfig(), replace(bf16, fp8="delayed"), "NVIDIA H100 80GB HBM3")[0] == 1979
    assert peak_tflops(TrackingConfig(peak_tflops=7.0), bf16) == (7.0, "tracking.peak_tflops")


def test_a_measured_peak_counts_the_multiplications_of_its_window(monkeypatch):
    ticks, calls, multiply = itertools.count(), [], torch.mm
    monkeypatch.setattr(peak, "WINDOW_SECONDS", 1.0)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(ticks) / 8)  # every look at the clock takes 1/8 s
    monkeypatch.setattr(torch, "mm", lambda *pair, out: calls.append(pair) or multiply(*pair, out=out))
    rate = measure_matmul_tflops(torch.float32, torch.device("cpu"), 64)
    assert len(calls) == 8  # one to warm up, then one after each look at the clock but the last
    assert rate == pytest.approx(7 * 2 * 64**3 / 1.0 / 1e12)

"""Tokens per second and model FLOPs utilisation (MFU), per step and of a whole stage.

MFU = FLOPs that the model must compute for the real tokens / (seconds x devices x peak). The FLOPs are
`nemo_align.model.counts.flops`; lengths come from the step plan, on the host, once per step, so virtual pipeline chunks
count nothing twice and no device is asked.
"""

from __future__ import annotations

from nemo_align.config.model import ModelConfig
from nemo_align.data.step_plan import StepPlan
from nemo_align.model.counts import flops
from nemo_align.training.forward_totals import ForwardTotals

# Steps at each start of a process that stage totals leave out: kernels are chosen, memory is allocated, caches fill.
STEPS_LEFT_OUT = 2

CONVENTION = (
    "MFU counts 6 FLOPs per matrix weight and real token (output projection included where logits are computed; norms, "
    "input embedding and recomputation not) + 12 x layers x heads x head_dim x sum of squared segment lengths, "
    "not halved for causality"
)

_TOTALS = ("steps", "seconds", "tokens", "padded_tokens", "flops", "padded_flops", "causal_flops")


class Throughput:
    """Rates of one stage. Its `totals` are plain numbers to be stored in a checkpoint, so they span restarts."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        world_size: int,
        peak_tflops: float,
        peak_source: str,
        with_logits: bool = True,
        totals: dict[str, float] | None = None,
        steps_left_out: int = STEPS_LEFT_OUT,
    ) -> None:
        """`with_logits`: whether the output projection is computed, at every token (a reward model has none)."""
        self.model = model
        self.world_size = world_size
        self.peak_tflops = peak_tflops
        self.peak_source = peak_source
        self.with_logits = with_logits
        self.totals = {key: 0.0 for prefix in ("", "left_out/") for key in (prefix + name for name in _TOTALS)}
        self.totals.update(totals or {})
        self._to_leave_out = steps_left_out

    def describe(self) -> str:
        """The convention and the peak, for the log: printed once, at the start."""
        return f"{CONVENTION}. Peak {self.peak_tflops:.4g} TFLOP/s per device ({self.peak_source})"

    def step(self, plan: StepPlan, seconds: float) -> dict[str, float]:
        """Rates of one training step that took `seconds`; counted in the stage's totals."""
        work = self._work((plan.real_tokens, plan.squared_tokens), (plan.padded_tokens, plan.padded_squared_tokens))
        prefix = "left_out/" if self._to_leave_out > 0 else ""
        self._to_leave_out -= 1
        counted = {"steps": 1, "seconds": seconds, "tokens": plan.real_tokens, "padded_tokens": plan.padded_tokens}
        for name, value in (counted | work).items():
            self.totals[prefix + name] += float(value)
        return {
            "perf/mfu": self._utilisation(work["flops"], seconds),
            "perf/mfu_padded": self._utilisation(work["padded_flops"], seconds),
            "perf/model_tflops_per_gpu": work["flops"] / seconds / self.world_size / 1e12,
            "perf/tokens_per_second_per_gpu": plan.real_tokens / seconds / self.world_size,
            "perf/step_seconds": seconds,
            "perf/padding_fraction": 1 - plan.real_tokens / plan.padded_tokens,
        }

    def forward(self, totals: ForwardTotals, *, with_logits: bool | None = None) -> dict[str, float]:
        """Rates of a forward-only pass (reference, scoring, validation): a third of a training step's FLOPs.

        `with_logits`: None = as in training.
        """
        rates: dict[str, float] = {"seconds": totals.seconds, "tokens": totals.tokens}
        if totals.seconds <= 0 or totals.tokens == 0:
            return rates
        work = self._work(
            (totals.tokens, totals.squared_tokens), (totals.padded_tokens, totals.padded_squared_tokens), with_logits
        )
        return rates | {
            "mfu": self._utilisation(work["flops"] // 3, totals.seconds),
            "mfu_padded": self._utilisation(work["padded_flops"] // 3, totals.seconds),
            "tokens_per_second_per_gpu": totals.tokens / totals.seconds / self.world_size,
        }

    def stage(self) -> dict[str, float]:
        """Rates over the training steps of the stage: mfu, mfu_padded, mfu_causal (attention halved, as Megatron
        counts it), tokens_per_second_per_gpu, padding_fraction, and steps_left_out: how many first steps they
        leave out. A stage without any further step counts those; one without a step gives {}.
        """
        left_out = int(self.totals["left_out/steps"])
        prefix, left_out = ("", left_out) if self.totals["steps"] else ("left_out/", 0)
        total = {name: self.totals[prefix + name] for name in _TOTALS}
        if total["steps"] == 0:
            return {}
        seconds = total["seconds"]
        return {
            "mfu": self._utilisation(total["flops"], seconds),
            "mfu_padded": self._utilisation(total["padded_flops"], seconds),
            "mfu_causal": self._utilisation(total["causal_flops"], seconds),
            "tokens_per_second_per_gpu": total["tokens"] / seconds / self.world_size,
            "padding_fraction": 1 - total["tokens"] / total["padded_tokens"],
            "steps_left_out": left_out,
        }

    def _work(self, real: tuple[int, int], padded: tuple[int, int], with_logits: bool | None = None) -> dict[str, int]:
        """FLOPs of forward and backward; `real` and `padded` are (tokens, sum of squared lengths).

        Python integers: one step of the 340B exceeds 64 bits.
        """
        logits = self.with_logits if with_logits is None else with_logits

        def count(lengths: tuple[int, int], causal: bool = False) -> int:
            tokens, squared = lengths
            return flops(
                self.model,
                tokens=tokens,
                squared_tokens=squared,
                logit_tokens=tokens if logits else 0,
                causal=causal,
            )

        return {"flops": count(real), "padded_flops": count(padded), "causal_flops": count(real, causal=True)}

    def _utilisation(self, count: float, seconds: float) -> float:
        return count / (seconds * self.world_size * self.peak_tflops * 1e12)

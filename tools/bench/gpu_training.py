"""Training speed and memory of one GPU beside what the plan says of an H100: the real command, models cut to fit.

    python tools/bench/gpu_training.py [--models 340b_rank 15b] [--precisions bf16 fp8_delayed ...] [--steps 12]
    python tools/bench/gpu_training.py --stage sft          real dialogues, several in a micro-batch
    python tools/bench/gpu_training.py --overrides parallel.recompute=full precision.attention=unfused

`340b_rank` has the layers of one rank of the 340B at TP 8 (12 of 96 heads, one of 8 KV groups, an eighth of the
feed-forward width), so its matrix products are those of the real job, without the communication. `15b` has whole layers
of the 15B. Both take 4 layers, real text and micro-batches of 4096 tokens. Figures are medians that leave out the first
two steps; memory is what torch allocated for tensors, on either side. Needs the quickstart's data
(`make quickstart-data`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DATA = ROOT / "data" / "quickstart"
MODELS = {
    "340b_rank": [
        "nemotron4_340b",
        "ffn_hidden_size=9216",
        "num_attention_heads=12",
        "num_query_groups=1",
        "head_dim=192",
    ],
    "15b": ["nemotron4_15b"],
}
PRECISIONS = ["bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise"]
LAYERS, VOCABULARY, LENGTH = 4, 8192, 4096
DIALOGUES = 384  # of one step of sft


def stage_overrides(stage: str, steps: int, micro_batches: int) -> list[str]:
    """Data and batch of a step."""
    tokenizer = f"data.tokenizer={DATA / 'tokenizer' / 'tokenizer.model'}"
    if stage == "pretrain":
        blend = f"data.phases.main.blend.text.path={DATA / 'pretrain' / 'english'}"
        return [tokenizer, f"data.phases.main.steps={steps}", blend, f"train.global_batch_size={micro_batches}"]
    rows = f"data.train.dialogues.path={DATA / 'general_sft' / 'train.jsonl'}"
    batch = [f"train.global_batch_size={DIALOGUES}", f"train.micro_batch_tokens={LENGTH}"]
    return [tokenizer, rows, *batch, f"train.epochs={steps}"]


def predicted(stage: str, overrides: list[str], run_dir: Path) -> dict[str, float]:
    """The plan's figures of the same step on an H100."""
    from nemo_align.config.compose import compose
    from nemo_align.planning.plan import plan_layout

    lengths = []
    if stage != "pretrain":
        (cache,) = (offsets.parent for offsets in (run_dir / "cache").glob("*/offsets.npy"))
        lengths = [f"lengths={cache}"]
    planned = compose("plan", [f"verb={stage}", *overrides, *lengths])
    estimate = plan_layout(planned).main
    return {
        "predicted_step_seconds": estimate.time.total,
        "predicted_mfu": estimate.mfu,
        "predicted_gib": estimate.memory.largest.tensors / 2**30,
    }


def measure(options: argparse.Namespace, model: str, precision: str) -> dict[str, float | str]:
    """Medians of one run, and the prediction."""
    from nemo_align.training.metrics import read_metrics

    name, *sizes = MODELS[model]
    sizes += [f"num_layers={LAYERS}", f"vocab_size={VOCABULARY}", f"max_sequence_length={LENGTH}"]
    overrides = [
        f"model={name}", *(f"model.{size}" for size in sizes), f"precision={precision}", "optimizer.lr=1e-5",
        f"data.sequence_length={LENGTH}", *stage_overrides(options.stage, options.steps + 50, options.micro_batches),
        *options.overrides,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "nemo_align.cli", options.stage, f"run_dir={run_dir}", *overrides]
        log = Path(folder) / "log.txt"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=subprocess.STDOUT
            )
            records: list[dict] = []
            while process.poll() is None and len(records) < options.steps:
                time.sleep(0.2)
                records = [record for record in read_metrics(run_dir) if record["kind"] == "train"]
            process.kill()  # nothing is worth saving: a checkpoint of such a model takes longer than the steps
            process.wait()
        text = log.read_text(errors="replace")
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
            number = len(list(options.logs.iterdir()))
            (options.logs / f"{number}_{options.stage}_{model}_{precision}.txt").write_text(text)
        if len(records) < options.steps:
            return {"model": model, "precision": precision, "error": text[-3000:]}
        plan = predicted(options.stage, overrides, run_dir)
    kept = records[2:]
    names = ("perf/step_seconds", "perf/mfu", "perf/model_tflops_per_gpu", "perf/tokens_per_second_per_gpu")
    found = {key.removeprefix("perf/"): statistics.median(record[key] for record in kept) for key in names}
    found["peak_memory_gib"] = kept[-1].get("perf/peak_memory_gib", float("nan"))
    return {"model": model, "precision": precision, "loss": kept[-1]["loss"], **found, **plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["pretrain", "sft"], default="pretrain")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micro-batches", type=int, default=4, help="of one sequence each, per step of pretrain")
    parser.add_argument("--overrides", nargs="*", default=[], help="further Hydra overrides")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--logs", type=Path, help="folder to keep the commands' output in")
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for precision in options.precisions:
            row = measure(options, model, precision)
            rows.append(row)
            print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)  # fmt: skip  # noqa: E501
            if options.json:
                options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

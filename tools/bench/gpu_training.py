"""Training speed on one GPU in bf16 and each FP8 recipe: the real command on models cut to fit.

    python tools/bench/gpu_training.py [--models 340b_rank 15b] [--precisions bf16 fp8_delayed ...] [--steps 12]

`340b_rank` has the layers of one rank of the 340B at TP 8 (12 of 96 heads, one of 8 KV groups, an eighth of the
feed-forward width), so its matrix products are those of the real job, without the communication. `15b` has whole layers
of the 15B. Both take 4 layers, real text and sequences of 4096 tokens. Rates leave out the first two steps. Needs the
quickstart's data (`make quickstart-data`).
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


def measure(model: str, precision: str, steps: int, micro_batches: int, extra: list[str]) -> dict[str, float | str]:
    """Medians of one run."""
    from nemo_align.training.metrics import read_metrics

    name, *sizes = MODELS[model]
    sizes += [f"num_layers={LAYERS}", f"vocab_size={VOCABULARY}", f"max_sequence_length={LENGTH}"]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        arguments = [
            f"model={name}", *(f"model.{size}" for size in sizes), f"precision={precision}",
            f"data.tokenizer={DATA / 'tokenizer' / 'tokenizer.model'}", f"data.sequence_length={LENGTH}",
            f"data.phases.main.steps={steps + 50}", f"data.phases.main.blend.text.path={DATA / 'pretrain' / 'english'}",
            f"train.global_batch_size={micro_batches}", "optimizer.lr=1e-5",
            f"run_dir={run_dir}", *extra,
        ]  # fmt: skip
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "nemo_align.cli", "pretrain", *arguments]
        log = Path(folder) / "log.txt"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=subprocess.STDOUT
            )
            records: list[dict] = []
            while process.poll() is None and len(records) < steps:
                time.sleep(0.2)
                records = [record for record in read_metrics(run_dir) if record["kind"] == "train"]
            process.kill()  # nothing is worth saving: a checkpoint of such a model takes longer than the steps
            process.wait()
        if len(records) < steps:
            return {"model": model, "precision": precision, "error": log.read_text(errors="replace")[-3000:]}
    kept = records[2:]
    names = ("perf/step_seconds", "perf/mfu", "perf/model_tflops_per_gpu", "perf/tokens_per_second_per_gpu")
    found = {key.removeprefix("perf/"): statistics.median(record[key] for record in kept) for key in names}
    found["peak_memory_gib"] = kept[-1].get("perf/peak_memory_gib", float("nan"))
    return {"model": model, "precision": precision, "loss": kept[-1]["loss"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micro-batches", type=int, default=4, help="of one sequence each, per step")
    parser.add_argument("--overrides", nargs="*", default=[], help="further Hydra overrides")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for precision in options.precisions:
            row = measure(model, precision, options.steps, options.micro_batches, options.overrides)
            rows.append(row)
            print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)  # fmt: skip  # noqa: E501
            if options.json:
                options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

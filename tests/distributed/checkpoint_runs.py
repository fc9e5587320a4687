"""Small training runs inside workers, for the checkpoint tests.

Gradients are made up per tensor from its key and the step, and cut like the tensor, so that every layout sees the same
ones; without clipping AdamW is elementwise, hence runs under different layouts must agree to the last bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "name": "tiny",
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 12,  # 4 x 12 is not 32
    "vocab_size": 401,  # padded to 404 at TP 1, 408 at TP 2
    "make_vocab_size_divisible_by": 4,
    "max_sequence_length": 64,
    "init_std": 0.05,
}
ATTRIBUTES = ["helpfulness", "correctness", "verbosity"]


@dataclass
class Run:
    """What one rank trains."""

    topology: Any
    parallel: Any
    dtype: str
    chunks: list
    optimizer: Any
    scheduler: Any
    model: Any
    reward: Any


def model_config(**changes: Any):
    from nemo_align.config.model import ModelConfig

    return ModelConfig(**(SIZES | changes))


def reward_config(**changes: Any):
    from nemo_align.config.objectives import RewardConfig

    return RewardConfig(**({"attributes": ATTRIBUTES, "weights": dict.fromkeys(ATTRIBUTES, 0.5)} | changes))


def build(
    topology,
    *,
    dtype: str = "fp32",
    fp8: str = "none",
    distributed_optimizer: bool = True,
    reward: bool = False,
    **model: Any,
) -> Run:
    """A model with random weights, its optimizer and schedule."""
    from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
    from nemo_align.config.training import OptimizerConfig
    from nemo_align.model.build import build_model
    from nemo_align.training.optimizer import ScheduleLength, build_optimizer, wrap_data_parallel

    parallel = ParallelConfig(
        tensor=topology.tensor,
        pipeline=topology.pipeline,
        virtual_pipeline=topology.virtual_pipeline,
        data=topology.data,
        sequence=topology.sequence,
        distributed_optimizer=distributed_optimizer,
    )
    precision = PrecisionConfig(dtype=dtype, fp8=fp8)
    config, head = model_config(**model), reward_config() if reward else None
    chunks = build_model(config, parallel, precision, topology, reward_head=head)
    chunks = wrap_data_parallel(chunks, parallel, precision)
    settings = OptimizerConfig(lr=1e-2, clip_grad=0.0)
    optimizer, scheduler = build_optimizer(chunks, settings, parallel, precision, ScheduleLength(warmup=2, decay=100))
    return Run(topology, parallel, dtype, chunks, optimizer, scheduler, config, head)


def step(run: Run, number: int) -> None:
    """One optimizer step with made-up gradients."""
    from nemo_align.checkpoint.sharded_state import model_state

    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    for chunk in model_state(run.chunks, None).values():
        for shard in chunk.values():
            rows = run.model.vocab_size if shard.allow_shape_mismatch else shard.global_shape[0]
            seed = int.from_bytes(hashlib.blake2b(f"{shard.key}{number}".encode(), digest_size=4).digest(), "little")
            generator = torch.Generator().manual_seed(seed)
            whole = torch.zeros(shard.global_shape)
            whole[:rows] = torch.randn((rows, *shard.global_shape[1:]), generator=generator)
            parts = tuple(slice(a, a + n) for a, n in zip(shard.global_offset, shard.local_shape, strict=True))
            shard.data.main_grad.copy_(whole[parts])
    assert run.optimizer.step()[0]
    run.scheduler.step(1)


def save(run: Run, run_dir: str, number: int, tokenizer: str, *, final: bool = True, weights_only: bool = False) -> str:
    from nemo_align.data.tokenizer import load_tokenizer

    return save_at_once(
        run_dir,
        number,
        model_chunks=run.chunks,
        optimizer=None if weights_only else run.optimizer,
        scheduler=None if weights_only else run.scheduler,
        state={"step": number, "loss": 0.1 + 0.2},
        topology=run.topology,
        verb="reward" if run.reward else "sft",
        model_config=run.model,
        reward_config=run.reward,
        dtype=run.dtype,
        tokenizer=load_tokenizer(tokenizer),
        final=final,
    )


def save_at_once(run_dir: str | Path, number: int, *, topology: Any, **settings: Any) -> str:
    """Save and publish before anything else happens; returns the checkpoint's folder."""
    from nemo_align.checkpoint.saver import Saver

    saver = Saver(run_dir, topology)
    saver.start(number, **settings, copy=False)
    return str(saver.wait().path)


def train_and_save(topology, run_dir: str, tokenizer: str, steps: int, **options: Any) -> str:
    """Train from random weights and save; returns the checkpoint's folder."""
    final = options.pop("final", True)
    run = build(topology, **options)
    for number in range(steps):
        step(run, number)
    return save(run, run_dir, steps, tokenizer, final=final)


def resume_and_save(topology, path: str, run_dir: str, tokenizer: str, first: int, last: int, **options: Any) -> str:
    """Resume from `path`, train steps first..last - 1 and save."""
    from nemo_align.checkpoint import megatron

    run = build(topology, **options)
    state = megatron.load_training(Path(path), run.chunks, run.optimizer, run.scheduler, topology)
    assert state == {"step": first, "loss": 0.1 + 0.2}, state
    for number in range(first, last):
        step(run, number)
    return save(run, run_dir, last, tokenizer)


def weights_of(path: str | Path, *, optimizer: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's model (and optimizer, from a final save) without vocabulary padding."""
    from nemo_align.checkpoint.streaming.torch_dist import TensorReader

    reader = TensorReader(Path(path))
    names = [name for name in reader.names() if optimizer or not name.startswith("optimizer.")]
    rows = ("word_embeddings.weight", "output_layer.weight")
    return {name: reader.read(name)[: SIZES["vocab_size"] if name.endswith(rows) else None] for name in names}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def train_tokenizer(folder: Path) -> str:
    """A byte-level-safe SentencePiece model of 400 pieces with the template's tokens; returns its folder."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentences = [
        f"The {word} number {number} is in the box." for word in ("red", "blue", "old") for number in range(99)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        control_symbols=[f"<extra_id_{number}>" for number in range(5)],
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return str(folder)

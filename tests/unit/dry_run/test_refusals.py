"""What the job would be refused for, a dry run is refused for: exit code 2, one message with key and remedy.
What only looks wrong is a warning."""

from __future__ import annotations

import pytest

from tests.unit.dry_run.child import Answer, Child

CODE_SFT = ["sft", "+experiment=nemotron4_340b/code_sft", "dry_run=true"]
PRETRAIN = ["pretrain", "+experiment=nemotron4_340b/pretrain", "dry_run=true"]
ROWS = "data.train.code_sft.path=rows.jsonl"

WRONG = {
    "typo": ([*CODE_SFT, "optimizer.lrr=1e-7"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    "typo of a recipe": (["sft", "+experiment=nemotron4_340b/code_stf", "dry_run=true"], "unknown experiment"),
    "tensor does not divide": (
        [*CODE_SFT, "parallel.tensor=7"],
        "model.num_attention_heads 96 is not divisible by parallel.tensor=7",
    ),
    "chunks do not divide": (
        [*CODE_SFT, "parallel.virtual_pipeline=5"],
        "model.num_layers 96 is not divisible by parallel.pipeline=12 x parallel.virtual_pipeline=5 = 60 chunks",
    ),
    "world does not divide": (
        [*CODE_SFT, "parallel.data=null", "gpus=100"],
        "gpus=100 cannot form parallel.tensor=8 x parallel.pipeline=12: name a multiple of 96",
    ),
    "world is another": ([*CODE_SFT, "gpus=96", "parallel.data=2"], "gpus=96 is not parallel.tensor=8"),
    "batch does not divide": (
        [*PRETRAIN, "parallel.data=60"],
        "train.global_batch_size 2304 is not divisible by train.micro_batch_size 1 x parallel.data 60 = 60",
    ),
    "batch is no round of the interleaved schedule": (
        [*PRETRAIN, "parallel.data=null", "gpus=12288"],
        "768 is 6 micro-batches per data-parallel rank, but the interleaved schedule takes a multiple of",
    ),
    "batch smaller than the replicas": (
        [*CODE_SFT, "parallel.data=null", f"gpus={96 * 256}"],
        "train.global_batch_size 128 is less than parallel.data=256",
    ),
    "warm-up longer than the stage": (
        [*CODE_SFT, "optimizer.warmup_steps=6250"],
        "optimizer.warmup_steps=6250, but the stage has 6250 steps: lower it",
    ),
    "warm-up longer than the phases": (
        [*PRETRAIN, "optimizer.warmup_steps=900693"],
        "optimizer.warmup_steps 900693 leaves nothing of the stage's 900693 steps",
    ),
    "decay longer than the stage": (
        [*CODE_SFT, "optimizer.schedule=wsd", "optimizer.decay_steps=6249"],
        "optimizer.warmup_steps=10 and decay_steps=6249 do not fit the stage's 6250 steps",
    ),
    "no such rank": ([*CODE_SFT, "dry_run_ranks=[0,192]"], "dry_run_ranks=[192]: the job has 192 ranks, 0 .. 191"),
    "sequence length": (
        [*PRETRAIN, "data.sequence_length=4092", "precision=fp8_delayed"],
        "data.sequence_length=4092 is not a multiple of 128, which parallel.sequence and precision.fp8 ask for",
    ),
    "Megatron-core's own checks": (
        [*CODE_SFT, "parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=false"],
        "parallel.overlap_param_gather=true needs",
    ),
    "nothing is here, strictly": (
        [*CODE_SFT, "dry_run_strict=true"],
        "checkpoint.init_from=runs/nemotron4_340b/recipe/continued_pretrain does not exist",
    ),
    "the model is not known": (
        ["sft", "+experiment=quickstart/code_sft", "dry_run=true"],
        "the model is that of checkpoint.init_from=runs/quickstart/recipe/continued_pretrain, which is not on this",
    ),
    "a bad row": (
        [*CODE_SFT, "model=tiny", "parallel=single", "parallel.data=1", ROWS, "data.tokenizer=tokenizer.model"],
        "rows.jsonl:2: messages[0].role: unknown role 'bot'",
    ),
    "an empty tokenizer": ([*PRETRAIN, "data.tokenizer=empty.model"], "empty.model is not a SentencePiece model"),
    "another run's directory": (
        [*CODE_SFT, "run_dir=taken"],
        "run_dir=taken belongs to a run of `nemo-align pretrain`",
    ),
    "a cut-off file": (
        [*PRETRAIN, "data.phases.main.blend.english.path=cut"],
        "cut.idx: not an index of Megatron's format",
    ),
}


DENSE = ["parallel.pipeline=8", "parallel.virtual_pipeline=12", "parallel.data=1", "checkpoint.save_every=null"]
RIGHT = {
    "too large for a GPU": [*CODE_SFT, *DENSE],
    "fp8_delayed": [*CODE_SFT, "precision=fp8_delayed"],
    "fp8_tensorwise": [*CODE_SFT, "precision=fp8_tensorwise"],
    "fp8_blockwise": [*CODE_SFT, "precision=fp8_blockwise"],
    "ranks": [*CODE_SFT, "dry_run_ranks=[3,191]"],
}


@pytest.fixture(scope="module")
def answers(child: Child, tmp_path_factory: pytest.TempPathFactory, stage_inputs) -> dict[str, Answer]:
    folder = tmp_path_factory.mktemp("wrong")
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (folder / "rows.jsonl").write_text(f"{good}\n{good.replace('user', 'bot')}\n")
    (folder / "tokenizer.model").write_bytes(stage_inputs.tokenizer.read_bytes())
    (folder / "empty.model").touch()
    (folder / "taken").mkdir()
    (folder / "taken" / "config.yaml").write_text("# nemo-align pretrain\n")
    for suffix in (".bin", ".idx"):
        (folder / f"cut{suffix}").write_bytes(b"cut")
    commands = {name: argv for name, (argv, _) in WRONG.items()} | RIGHT
    return dict(zip(commands, child.run(list(commands.values()), folder), strict=True))


@pytest.mark.parametrize("case", WRONG)
def test_refused(case: str, answers: dict[str, Answer]) -> None:
    answer = answers[case]
    assert answer.code == 2, answer.out
    assert answer.err.startswith("error: ") and WRONG[case][1] in answer.err, answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""


def test_what_only_looks_wrong_is_a_warning(answers: dict[str, Answer]) -> None:
    # 5.77 B parameters of the last stage of eight, 18 bytes each: 103.9 GB.
    _, _, warnings = answers["too large for a GPU"].out.partition("warnings\n")
    assert "rank 56 holds 104 GB before any activation, more than a GPU of 80 GB" in warnings
    assert "checkpoint.save_every=null: the first of 8 nodes that fails costs the whole run" in warnings


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_no_gpu_is_no_reason_to_refuse_fp8(recipe: str, answers: dict[str, Answer]) -> None:
    answer = answers[f"fp8_{recipe}"]
    assert answer.code == 0, answer.err
    assert f"matrix products in FP8 ({recipe}): checked as configuration only" in answer.out


def test_ranks_may_be_chosen(answers: dict[str, Answer]) -> None:
    text = answers["ranks"].out
    assert "rank 3 (pipeline 0, data 0, tensor 3)" in text and "rank 191 (pipeline 11, data 1, tensor 7)" in text
    assert text.count("  rank ") == 2

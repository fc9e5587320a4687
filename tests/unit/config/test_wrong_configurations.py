"""Every wrong configuration gives its message: the key, the value, and what to do."""

from __future__ import annotations

import json

import pytest

from nemo_align.config.compose import compose
from nemo_align.config.errors import ConfigError
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.config.validation import check_accelerator, check_data_parallel, check_world_size

ROWS = "data.train.mine.path=rows.jsonl"
COMMON = ["model=tiny", "data.tokenizer=tokenizer.model", "data.sequence_length=512", "optimizer.lr=1e-4"]
LENGTH = ["train.global_batch_size=8", "train.epochs=1"]
BLEND = "data.phases.main.blend.english"
GOOD = {
    "sft": [*COMMON, *LENGTH, ROWS],
    "reward": [*COMMON, *LENGTH, ROWS],
    "preference": [*COMMON[1:], *LENGTH, ROWS, "checkpoint.init_from=run"],
    "pretrain": [*COMMON, "train.global_batch_size=8", "data.phases.main.steps=100", f"{BLEND}.path=english"],
    "score": [*COMMON[1:3], "checkpoint.init_from=reward_run", "inputs.rows=rows.jsonl"],
    "pipeline": ["stages.first.verb=sft", "stages.second.verb=preference", "stages.second.init_from=first"],
    "convert": ["from=hf", "to=megatron", "source=run", "target=out"],
}
RAMP = "train.batch_ramp=[{{from_tokens:{},global_batch_size:4}},{{from_tokens:{},global_batch_size:{}}}]"

# (verb, overrides after the good ones, what the message must hold)
WRONG = [
    # names
    ("sft", ["optimzer.lr=1e-4"], "unknown key 'optimzer.lr'; did you mean 'optimizer.lr'? (command line: optimzer"),
    ("sft", ["+optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    ("sft", ["++optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    ("sft", ["~optimizer.lrr"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    ("sft", ["train.batch_size=8"], "did you mean 'train.global_batch_size'?"),
    ("sft", ["model.tensor_model_parallel_size=2"], "did you mean 'parallel.tensor'?"),
    ("sft", ["lr=1e-4"], "did you mean 'optimizer.lr'?"),
    ("sft", ["data.train.mine.pth=x"], "did you mean 'data.train.mine.path'?"),
    ("sft", ["reward.attributes=[a]"], "unknown key 'reward.attributes' for sft: it belongs to reward"),
    ("preference", ["preference.beta=0.1"], "did you mean 'preference.ref_policy_kl_penalty'?"),
    ("pretrain", ["data.phases.main.blend.english.wieght=2"], "did you mean 'data.phases.main.blend.english.weight'?"),
    ("pretrain", ["train.batch_ramp=[{from_token:0}]"], "unknown key 'train.batch_ramp[0].from_token'; did you mean"),
    ("sft", ["zzz=1"], "unknown key 'zzz'; sft has experiment, run_dir, model"),
    ("sft", ["model=tyni"], "unknown model choice 'tyni'; did you mean 'tiny'? Known: minitron_4b, "),
    ("sft", ["optimizer=adam"], "unknown optimizer choice 'adam'; did you mean 'adamw'?"),
    ("sft", ["+experiment=nothing/like_it"], "unknown experiment 'nothing/like_it'"),
    ("sft", ["modle=tiny"], "unknown key 'modle'; did you mean 'model'?"),
    ("sft", ["model/size=tiny"], "unknown group 'model/size'"),
    ("sft", ["data.validation={}"], "would change nothing, because sections are merged: ~data.validation empties it"),
    ("sft", ["rows.jsonl"], "'rows.jsonl' is not key=value"),
    ("sft", ["optimizer.lr=1e-4,1e-5"], "add --multirun"),
    ("sft", ["run_dir=a=b"], "cannot read 'run_dir=a=b'"),
    # dry runs and clusters
    ("sft", ["gpus=0"], "gpus is 0, but must be at least 1"),
    ("sft", ["dry_run_ranks=[-1]"], "dry_run_ranks is [-1], but must name ranks of the job, from 0 on"),
    ("sft", ["dry_run=maybe"], "dry_run is 'maybe', but must be true or false"),
    ("pipeline", ["cluster.container_mounts=['/a:/b']"], "cluster.container_mounts has no effect without"),
    (
        "pipeline",
        ["cluster.container_image=a.sqsh", "cluster.container_mounts=['/a']"],
        "cluster.container_mounts[0] is '/a', but must be source:target",
    ),
    ("pipeline", ["cluster.python='/my python'"], "cluster.python is '/my python', but must be a name without spaces"),
    # types
    ("sft", ["optimizer.lr=fast"], "optimizer.lr is 'fast', but must be a number (command line: optimizer.lr=fast)"),
    ("sft", ["parallel.tensor=1.5"], "parallel.tensor is 1.5, but must be a whole number"),
    ("sft", ["parallel.sequence=2"], "parallel.sequence is 2, but must be true or false"),
    ("sft", ["train=3"], "train is 3, but must be a section with global_batch_size"),
    ("sft", ["train.global_batch_size=null"], "train.global_batch_size is None, but must be a whole number"),
    ("reward", ["reward.attributes=helpfulness"], "reward.attributes is 'helpfulness', but must be a list of text"),
    ("sft", ["data.train.mine=rows.jsonl"], "data.train.mine is 'rows.jsonl', but must be a section with path"),
    # missing
    ("sft", ["~optimizer.lr"], "optimizer.lr is missing: peak learning rate (number). Example: optimizer.lr=3e-7"),
    ("sft", ["model=null"], "no model: choose one with model=minitron_4b|"),
    ("sft", ["data.tokenizer=null"], "data.tokenizer is missing"),
    (
        "pretrain",
        ["train.batch_ramp=[{from_tokens:0}]"],
        "train.batch_ramp[0].global_batch_size is missing: from there",
    ),
    ("sft", ["data.train.more.format=auto"], "data.train.more.path is missing: .jsonl"),
    ("convert", ["from=???"], "Example: from=hf"),
    ("convert", ["to=???"], "Example: to=megatron"),
    (
        "sft",
        ["data.sequence_length=${nothing.there}"],
        "data.sequence_length: Interpolation key 'nothing.there' not found",
    ),
    # model and layout
    ("sft", ["model.hidden_size=250", "model.num_attention_heads=8"], "hidden_size 250 is not divisible by 8 heads"),
    ("sft", ["model.num_query_groups=3"], "num_attention_heads 4 is not divisible by model.num_query_groups 3"),
    ("sft", ["model.num_layers=0"], "model.num_layers is 0, but must be at least 1"),
    ("sft", ["model.rotary_percent=1.5"], "model.rotary_percent is 1.5"),
    ("sft", ["model.rotary_percent=0.1"], "is 3 dimensions, but RoPE turns an even number"),
    ("sft", ["parallel.tensor=3"], "num_attention_heads 4 is not divisible by parallel.tensor=3: use 1, 2, 4"),
    (
        "sft",
        ["model.ffn_hidden_size=511", "parallel.tensor=2"],
        "ffn_hidden_size 511 is not divisible by parallel.tensor=2",
    ),
    (
        "sft",
        ["model.num_attention_heads=12", "model.hidden_size=384", "model.num_query_groups=6", "parallel.tensor=4"],
        "parallel.tensor=4 is neither a divisor nor a multiple of model.num_query_groups 6",
    ),
    (
        "sft",
        ["parallel.pipeline=3"],
        "num_layers 4 is not divisible by parallel.pipeline=3: use a product among 1, 2, 4",
    ),
    ("sft", ["parallel=pp2_vp2", "parallel.virtual_pipeline=3"], "parallel.virtual_pipeline=3 = 6 chunks"),
    ("sft", ["parallel.sequence=true"], "needs parallel.tensor > 1"),
    ("sft", ["parallel.virtual_pipeline=2"], "needs parallel.pipeline > 1"),
    ("sft", ["parallel.data=0"], "parallel.data is 0, but must be at least 1"),
    ("sft", ["parallel.overlap_param_gather=true"], "needs parallel.distributed_optimizer=true"),
    ("sft", ["parallel.recompute=ful"], "must be one of none, selective, full, block; did you mean 'full'?"),
    ("sft", ["parallel.recompute=full", "parallel.recompute_layers=5"], "has only 4 layers"),
    ("sft", ["parallel.recompute=block", "parallel.recompute_layers=5"], "has only 4 layers"),
    ("sft", ["parallel.overlap_tensor=true"], "needs parallel.sequence=true"),
    (
        "sft",
        ["parallel=tp2_sp", "parallel.overlap_tensor=true", "train.packing=false"],
        "needs micro-batches of one size: set train.packing=true",
    ),
    (
        "sft",
        ["parallel=tp2_sp", "parallel.overlap_tensor=true", "precision=fp8_blockwise"],
        "userbuffers carry no blockwise tensors. Use precision=fp8_delayed or fp8_tensorwise",
    ),
    ("sft", ["parallel=pp2", "parallel.overlap_p2p=true"], "needs an interleaved schedule"),
    ("sft", ["tp_comm_overlap=true"], "parallel.overlap_tensor"),
    ("sft", ["precision.attention=flsh"], "did you mean 'flash'?"),
    ("sft", ["precision.bf16_first_layers=1"], "has no effect without FP8"),
    ("sft", ["precision=fp8_tensorwise", "precision.bf16_last_layers=-1"], "must be at least 0"),
    ("sft", ["precision=fp8_delayed", "precision.bf16_first_layers=1"], "cannot go with precision.fp8=delayed"),
    (
        "sft",
        ["parallel=pp2", "precision=fp8_tensorwise", "precision.bf16_first_layers=3"],
        "a pipeline stage of this layout has only 2 layers",
    ),
    ("sft", ["precision.dtype=fp16"], "precision.dtype is 'fp16', but must be one of bf16, fp32"),
    ("sft", ["precision.fp8=delayd"], "did you mean 'delayed'?"),
    ("sft", ["precision=fp32", "precision.fp8=delayed"], "precision.fp8=delayed needs precision.dtype=bf16"),
    ("sft", ["precision=fp8_delayed", "model.ffn_hidden_size=520"], "model.ffn_hidden_size 520"),
    # batches and length
    ("sft", ["parallel.data=16"], "train.global_batch_size 8 is less than parallel.data=16"),
    ("sft", ["train.global_batch_size=0"], "train.global_batch_size is 0"),
    ("sft", ["train.packing=false", "train.micro_batch_size=16"], "train.micro_batch_size 16 is more than"),
    (
        "pretrain",
        ["train.micro_batch_size=3"],
        "is not divisible by train.micro_batch_size 3 x parallel.data 1 = 3: use 6 or 9",
    ),
    ("pretrain", ["parallel=pp2_vp2", "train.global_batch_size=9"], "takes a multiple of parallel.pipeline=2"),
    ("pretrain", [RAMP.format(5, 9, 8)], "train.batch_ramp begins at 5 tokens"),
    ("pretrain", [RAMP.format(0, 0, 8)], "train.batch_ramp is not in order"),
    ("pretrain", [RAMP.format(0, 9, 16)], "train.batch_ramp ends with 16 but train.global_batch_size is 8"),
    ("sft", [RAMP.format(0, 9, 8)], "it is for pretrain only"),
    ("sft", ["train.epochs=null"], "set train.epochs (passes over the rows) or train.max_steps"),
    ("sft", ["train.epochs=-1"], "train.epochs is -1.0, but must be positive"),
    ("pretrain", ["train.epochs=1"], "train.epochs has no meaning for pretrain"),
    ("sft", ["train.nonfinite=skip", "train.nonfinite_limit=0"], "train.nonfinite_limit is 0, but must be at least 1"),
    ("sft", ["train.nonfinite_limit=3"], "train.nonfinite_limit=3 has no effect with train.nonfinite=error"),
    ("sft", ["train.nonfinite=ignore"], "train.nonfinite is 'ignore', but must be one of error, skip"),
    ("sft", ["data.sequence_length=2048"], "data.sequence_length 2048 is more than model.max_sequence_length 1024"),
    ("sft", ["train.micro_batch_tokens=500"], "train.micro_batch_tokens 500 does not hold one data.sequence_length"),
    ("preference", ["train.micro_batch_tokens=1000"], "does not hold two responses"),
    # optimizer
    ("sft", ["optimizer.schedule=cosin"], "did you mean 'cosine'?"),
    ("sft", ["optimizer.lr=-1"], "optimizer.lr is -1.0, but must be positive"),
    ("sft", ["optimizer.lr=nan"], "optimizer.lr is nan, but must be positive"),
    ("sft", ["optimizer.min_lr=1"], "optimizer.min_lr is 1.0, but must lie between 0 and optimizer.lr=0.0001"),
    ("sft", ["optimizer.beta2=1"], "optimizer.beta2 is 1.0, but must lie in [0, 1)"),
    ("sft", ["optimizer.eps=0"], "optimizer.eps is 0.0, but must be positive"),
    ("sft", ["optimizer=wsd"], "needs optimizer.decay_steps"),
    ("pretrain", ["optimizer.warmup_steps=100"], "leaves nothing of the stage's 100 steps"),
    (
        "pretrain",
        ["optimizer=wsd", "optimizer.warmup_steps=60", "optimizer.decay_steps=60"],
        "more than the stage's 100",
    ),
    # data
    ("sft", ["~data.train.mine"], "data.train is empty"),
    ("sft", ["data.train.mine.path=absent.jsonl"], "data.train.mine.path=absent.jsonl does not exist"),
    ("sft", ["data.validation.held.path=absent.jsonl"], "data.validation.held.path=absent.jsonl does not exist"),
    ("sft", ["data.tokenizer=absent"], "data.tokenizer=absent does not exist"),
    ("sft", ["data.overlong=cut"], "data.overlong is 'cut', but must be one of error, drop, truncate"),
    ("reward", ["data.bad_rows=drop"], "data.bad_rows is 'drop', but must be one of error, quarantine"),
    ("score", ["data.bad_rows=quarantin"], "did you mean 'quarantine'?"),
    ("preference", ["data.bad_rows=[error]"], "data.bad_rows is ['error'], but must be a text"),
    ("pretrain", ["data.bad_rows=quarantine"], "unknown key 'data.bad_rows' for pretrain: it belongs to"),
    ("sft", ["data.train.mine.fraction=1.5"], "data.train.mine.fraction is 1.5, but must lie in (0, 1]"),
    ("sft", ["data.train.mine.fraction=0.5", "data.train.mine.max_rows=3"], "has both max_rows and fraction"),
    ("pretrain", ["~data.phases.main"], "data.phases is empty"),
    ("pretrain", ["data.phases.main.steps=0"], "data.phases.main.steps is 0"),
    ("pretrain", ["data.phases.other.steps=5"], "data.phases.other.blend is empty"),
    ("pretrain", [f"{BLEND}.weight=0"], f"{BLEND}.weight is 0.0, but must be positive"),
    ("pretrain", [f"{BLEND}.path=english.bin"], "must be the prefix of both files: english"),
    ("pretrain", [f"{BLEND}.path=french"], "french.bin does not exist"),
    # objectives
    ("reward", ["reward.attributes=[a,b]"], "reward.weights is missing"),
    ("reward", ["reward.attributes=[]"], "reward.attributes is empty"),
    ("reward", ["reward.attributes=[a,a]", "reward.weights={a:1}"], "reward.attributes names a twice"),
    ("reward", ["reward.attributes=[clarity]", "reward.weights={clartiy:1}"], "did you mean 'clarity'?"),
    ("reward", ["reward.attributes=[a,b]", "reward.weights={a:1}"], "reward.weights lacks b"),
    ("reward", ["reward.load_head=true"], "needs checkpoint.init_from to be a reward model's checkpoint"),
    ("preference", ["preference.preference_loss=rpo_bkw_kl"], "did you mean 'rpo_bwd_kl'?"),
    ("preference", ["preference.ref_policy_kl_penalty=0"], "ref_policy_kl_penalty (beta) is 0.0, but must be positive"),
    (
        "preference",
        ["preference.preference_loss=rpo_sq", "preference.gt_reward_scale=0"],
        "gt_reward_scale (eta) is 0.0",
    ),
    ("preference", ["preference.preference_loss_weight=0"], "nothing would be trained"),
    ("preference", ["data.select.inverted=swp"], "did you mean 'swap'?"),
    ("preference", ["data.select.ties=dorp"], "did you mean 'drop'?"),
    ("preference", ["checkpoint.init_from=null", "model=tiny"], "checkpoint.init_from is missing: the policy"),
    # initial weights
    ("sft", ["checkpoint.init_from=absent"], "checkpoint.init_from=absent does not exist"),
    (
        "sft",
        ["checkpoint.init_from=rows.jsonl"],
        "is a file: archives (.nemo, .zip, .tar) and pickled weights are not opened",
    ),
    ("sft", ["checkpoint.init_from=run", "model.num_layers=8"], "model.num_layers is 8 but 4 in the checkpoint"),
    ("sft", ["checkpoint.load_optimizer=true"], "checkpoint.load_optimizer=true needs checkpoint.init_from"),
    ("score", ["checkpoint.init_from=run"], "is not a reward model"),
    ("score", ["weights={clarity:1}"], "weights lacks safety"),
    ("score", ["~inputs.rows"], "inputs is empty"),
    ("score", ["inputs.more=absent.jsonl"], "inputs.more=absent.jsonl does not exist"),
    ("score", ["checkpoint.init_from=null"], "checkpoint.init_from is missing: the reward model. Example: checkpoint"),
    ("preference", ["checkpoint.init_from=null"], "checkpoint.init_from is missing: the policy"),
    # keys that the verb does not have, and values that would change nothing
    ("score", ["checkpoint.save_every=5"], "unknown key 'checkpoint.save_every' for score: it belongs to pretrain"),
    ("score", ["checkpoint.load_optimizer=true"], "unknown key 'checkpoint.load_optimizer' for score"),
    ("score", ["tracking.wandb=true"], "unknown key 'tracking.wandb' for score"),
    ("score", ["data.validation.a.path=rows.jsonl"], "unknown key 'data.validation.a.path' for score"),
    ("pretrain", ["data.validation.a={path:english,weight:2}"], "unknown key 'data.validation.a.weight'"),
    ("pretrain", ["train.micro_batch_tokens=512"], "train.micro_batch_tokens=512 has no effect in pretrain"),
    (
        "sft",
        ["train.packing=false", "train.micro_batch_tokens=512"],
        "train.micro_batch_tokens=512 has no effect with train.packing=false: set train.micro_batch_size",
    ),
    ("sft", ["train.micro_batch_size=4"], "train.micro_batch_size=4 has no effect with train.packing=true"),
    ("sft", ["optimizer.decay_steps=4"], "optimizer.decay_steps=4 has no effect with optimizer.schedule=constant"),
    (
        "sft",
        ["parallel.recompute_layers=2"],
        "parallel.recompute_layers=2 has no effect unless parallel.recompute is full or block",
    ),
    ("preference", ["preference.gt_reward_scale=2"], "preference.gt_reward_scale=2.0 has no effect on dpo and ipo"),
    (
        "preference",
        ["preference.sft_average_log_probs=false"],
        "preference.sft_average_log_probs=false has no effect with preference.sft_loss_weight=0",
    ),
    # formats
    (
        "sft",
        ["data.train.mine.format=mesages"],
        "data.train.mine.format is 'mesages', but must be one of auto, messages",
    ),
    ("reward", ["data.train.mine.format=nemo_rl"], "must be one of auto, nemo_aligner_label"),
    ("preference", ["data.validation.v={path:rows.jsonl,format:helpsteer}"], "did you mean 'helpsteer3'?"),
    # where the run goes
    ("sft", ["run_dir=''"], "run_dir is empty: name the folder of the run"),
    ("pipeline", ["run_dir=''"], "run_dir is empty"),
    ("sft", ["experiment=../../etc"], "experiment is '../../etc', but names the run"),
    ("sft", ["experiment=/tmp/x"], "experiment is '/tmp/x', but names the run"),
    # process
    ("sft", ["runtime.seed=-1"], "runtime.seed is -1"),
    ("sft", ["runtime.hang_timeout_minutes=30"], "must lie below runtime.distributed_timeout_minutes=30.0, so that a"),
    ("score", ["runtime.hang_timeout_minutes=-0.5"], "runtime.hang_timeout_minutes is -0.5, but must lie below"),
    ("pretrain", ["runtime.max_restarts=-1"], "runtime.max_restarts is -1, but must not be negative"),
    ("sft", ["checkpoint.keep_last=0"], "at least 1 must stay"),
    # chains
    ("pipeline", ["stages.second.init_from=frist"], "which is no earlier stage (first)"),
    ("pipeline", ["stages.third.verb=dpo"], "stages.third.verb is 'dpo', but must be one of pretrain, sft"),
    ("pipeline", ["stages.first.experiment=no"], "stages.first.experiment: unknown experiment 'no'"),
    ("pipeline", ["stages.first.overrides=['optimzer.lr=1']"], "stages.first.overrides: unknown key 'optimzer.lr'"),
    (
        "pipeline",
        ["stages.second.overrides=['run_dir={frist}/x']"],
        "{frist} in 'run_dir={frist}/x' is no earlier stage",
    ),
    ("pipeline", ["cluster.kind=slrum"], "did you mean 'slurm'?"),
    ("pipeline", ["cluster.time_limit=soon"], "must be HH:MM:SS"),
    ("pipeline", ["cluster.sbatch_options=[-w dgx1]"], "must be a long option with its value and without spaces"),
    ("pipeline", ["cluster.sbatch_options=['--time=1']"], "cluster.time_limit says it: use that"),
    ("pipeline", ["cluster.sbatch_options=['--dependency=after:1']"], "the pipeline sets it for each stage"),
    ("pipeline", ["data=context_4k"], """a choice for a stage: 'stages.<name>.overrides=["data=context_4k"]'"""),
    ("pipeline", ["data.rot=/data"], "unknown key 'data.rot'; did you mean 'data.root'?"),
    (
        "pipeline",
        ["precision.dtype=bf16"],
        """For every stage: 'overrides=["precision.dtype=..."]', for one: 'stages.<name>.overrides=["prec""",
    ),
    (
        "pipeline",
        ["optimizer.lr=1"],
        """pretrain, sft, reward, preference. For a stage: 'stages.<name>.overrides=["optimizer.lr=..."]'""",
    ),
    ("pipeline", ["overrides=['parallel=tp3']"], "overrides: unknown parallel choice 'tp3'"),
    ("convert", ["to=hf"], "from and to are both hf"),
    ("convert", ["source=absent"], "source=absent does not exist"),
    ("convert", ["to=hugging"], "to is 'hugging', but must be one of hf, megatron"),
]


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "tokenizer.model", "english.bin", "english.idx"):
        (tmp_path / name).touch()
    model = {
        "name": "m", "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 512, "num_attention_heads": 4,
        "num_query_groups": 2, "head_dim": None, "vocab_size": 8192, "make_vocab_size_divisible_by": 128,
        "max_sequence_length": 1024, "rotary_percent": 0.5, "rotary_base": 10000, "layernorm_epsilon": 1e-5,
        "init_std": 0.02,
    }  # fmt: skip
    head = {"attributes": ["clarity", "safety"], "weights": {"clarity": 1.0, "safety": 2.0}, "head_bias": True}
    for run, reward in (("run", None), ("reward_run", head)):
        step = tmp_path / run / "checkpoints" / "step_0000010"
        step.mkdir(parents=True)
        (step / "manifest.json").write_text(json.dumps({"model": model, "reward": reward, "tokenizer": "tokenizer"}))
        (step / "tokenizer").mkdir()


@pytest.mark.parametrize("verb", GOOD)
def test_the_good_ones_pass(verb):
    assert type(compose(verb, GOOD[verb])).__name__.lower().startswith(verb)


@pytest.mark.parametrize(
    "verb, overrides, message", WRONG, ids=[f"{verb} {' '.join(texts)}"[:70] for verb, texts, _ in WRONG]
)
def test_wrong(verb, overrides, message):
    replaced = {text.partition("=")[0].lstrip("+~") for text in overrides if "." not in text.partition("=")[0]}
    base = [text for text in GOOD[verb] if text.partition("=")[0] not in replaced]
    removed = [text[1:] for text in overrides if text.startswith("~")]
    base = [text for text in base if not any(text.startswith(key) for key in removed)]
    # Taking away a key that nothing sets is another mistake than the one meant.
    texts = [text for text in overrides if not text.startswith("~") or text == "~optimizer.lrr"]
    with pytest.raises(ConfigError) as caught:
        compose(verb, [*base, *texts])
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_mistake_in_the_overrides_of_all_stages_is_said_once():
    with pytest.raises(ConfigError) as caught:
        compose("pipeline", [*GOOD["pipeline"], "overrides=['parallel=tp3']"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("verb", ["sft", "reward", "preference", "score", "pretrain"])
def test_sequences_are_as_long_as_the_model_by_default(verb):
    base = [text for text in GOOD[verb] if not text.startswith("data.sequence_length")]
    assert compose(verb, base).data.sequence_length == 1024


def test_a_length_that_a_checkpoint_to_come_decides_stays_open():
    base = [text for text in GOOD["preference"] if not text.startswith("data.sequence_length")]
    config = compose("preference", [*base, "checkpoint.init_from=to_come"], check_files=False)
    assert config.data.sequence_length is None


def test_the_table_is_long_enough():
    assert len(WRONG) >= 100


def test_world_sizes():
    assert check_world_size(ParallelConfig(tensor=2, pipeline=2), 8) == 2
    with pytest.raises(ConfigError, match=r"6 processes cannot form parallel.tensor=4 x parallel.pipeline=1"):
        check_world_size(ParallelConfig(tensor=4), 6)
    with pytest.raises(ConfigError, match=r"start 12, or set parallel.data=2"):
        check_world_size(ParallelConfig(tensor=4, data=3), 8)


def test_batches_once_the_number_of_ranks_is_known():
    config = compose("pretrain", GOOD["pretrain"])
    check_data_parallel(config, 4)
    with pytest.raises(
        ConfigError, match=r"8 is not divisible by train.micro_batch_size 1 x parallel.data 3 = 3: use 6 or 9"
    ):
        check_data_parallel(config, 3)


def test_fp8_needs_a_gpu():
    check_accelerator(PrecisionConfig(fp8="delayed"), num_gpus=1)
    check_accelerator(PrecisionConfig(), num_gpus=0)
    with pytest.raises(ConfigError, match="use precision=bf16 here"):
        check_accelerator(PrecisionConfig(fp8="delayed"), num_gpus=0)
    with pytest.raises(ConfigError, match=r"precision\.attention=flash chooses a GPU's kernel"):
        check_accelerator(PrecisionConfig(attention="flash"), num_gpus=0)


def test_all_problems_are_shown_at_once():
    with pytest.raises(ConfigError) as caught:
        compose("sft", [*GOOD["sft"], "parallel.tensor=3", "optimizer.eps=0", "train.nonfinite=x"])
    assert len(str(caught.value).splitlines()) == 4  # heads and ffn, eps, nonfinite

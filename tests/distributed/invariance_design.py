"""The design of the invariance suite: its factors, what goes together, and the pairwise covering array over them.

Three blocks. *Layout*: how the processes share the work, at most four of them. *Task*: what is learnt and how examples
become micro-batches. *Setting*: everything that any layout and task can be combined with.

Beside the array stand the cases of PP 4 x VP 2. They need a model of eight layers, which no other case needs.
"""

from __future__ import annotations

import itertools

from tests.oracle.model import Architecture
from tests.oracle.pairwise import Block, Case, covering_array, each_level_once, number_of_cases

WORLD_SIZE = 4
PREFERENCES = ("dpo", "ipo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
VOCABULARY = 601  # of the tokenizer: prime

# A reference and one that differs from it in what is hard to split.
ARCHITECTURES = {
    "even": Architecture(vocab_size=608),  # divisible by every tensor size: no padding
    "one KV group": Architecture(vocab_size=608, groups=1),  # fewer than any tensor size above 1
    "odd vocabulary": Architecture(vocab_size=VOCABULARY),  # padded to 601, 602 and 604 at TP 1, 2 and 4
    "wide heads": Architecture(vocab_size=608, groups=2, head_dim=20, rotary_percent=0.5),  # 4 x 20 is not 48
}
DEEP = "eight layers"
ALL_ARCHITECTURES = {**ARCHITECTURES, DEEP: Architecture(vocab_size=608, layers=8)}


def layouts() -> Block:
    found = []
    for data, tensor, pipeline in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 4)):
        if data * tensor * pipeline > WORLD_SIZE:
            continue
        for sequence, virtual in itertools.product((False, True), (1, 2)):
            if (sequence and tensor == 1) or (virtual == 2 and pipeline != 2):  # four layers: for PP 4 see DEEP_CASES
                continue
            for distributed, overlap in itertools.product((True, False), ("none", "grad reduce", "both")):
                if overlap == "both" and not distributed:  # parameters are gathered where the optimizer is sharded
                    continue
                found.append(
                    {
                        "data": data,
                        "tensor": tensor,
                        "pipeline": pipeline,
                        "sequence": sequence,
                        "virtual_pipeline": virtual,
                        "distributed_optimizer": distributed,
                        "overlap": overlap,
                    }
                )
    return found


def tasks() -> Block:
    """`micro_batch`: "packed" into micro-batches of two sequence lengths, "packed wide" of four, or examples apart."""
    found = []
    for objective in ("pretrain", "sft", "regression", *PREFERENCES):
        for micro_batch in ("packed", "packed wide", 1, 2, 4):
            for ramp, terms in itertools.product((False, True), ("preference", "with sft", "averaged with sft")):
                packed = isinstance(micro_batch, str)
                if (objective == "pretrain" and packed) or (objective != "pretrain" and ramp):
                    continue
                if objective not in PREFERENCES and terms != "preference":
                    continue
                found.append({"objective": objective, "micro_batch": micro_batch, "batch_ramp": ramp, "terms": terms})
    return found


def settings() -> Block:
    """`accumulation`: whether the global batch is small (few micro-batches, some ranks without) or crosses an epoch."""
    choices = {
        "architecture": tuple(ARCHITECTURES),
        "accumulation": ("little", "much"),
        "recompute": ("none", "selective", "full"),
        "clipping": (False, True),
        "schedule": ("constant", "cosine", "linear", "wsd"),
    }
    return [dict(zip(choices, levels, strict=True)) for levels in itertools.product(*choices.values())]


BLOCKS = [layouts(), tasks(), settings()]
DESIGN: list[Case] = covering_array(BLOCKS, seed=7)
REPRESENTATIVES: list[Case] = each_level_once(DESIGN)  # every level of every factor, for the fast tier


def _deep(objective: str, micro_batch: str | int, **changes: object) -> Case:
    """A case of PP 4 x VP 2; the changes say where it is not a plain one."""
    layout = {"data": 1, "tensor": 1, "pipeline": 4, "sequence": False, "virtual_pipeline": 2}
    sharding = {"distributed_optimizer": True, "overlap": "none"}
    task = {"objective": objective, "micro_batch": micro_batch, "batch_ramp": False, "terms": "preference"}
    setting = {"architecture": DEEP, "accumulation": "much", "recompute": "none", "clipping": True}
    case = {**layout, **sharding, **task, **setting, "schedule": "constant", **changes}
    assert case.keys() == DESIGN[0].keys()
    return case


# Of each family of objectives: language model, regression, preference.
DEEP_CASES: list[Case] = [
    _deep("pretrain", 1, batch_ramp=True, schedule="wsd"),
    _deep("sft", "packed", overlap="both", recompute="full"),
    _deep("regression", 2, distributed_optimizer=False, overlap="grad reduce", schedule="cosine"),
    _deep("dpo", "packed", terms="with sft", recompute="selective"),
    _deep("rpo_bwd_kl", 1, accumulation="little", clipping=False, schedule="linear"),
]
SUMMARY = (
    f"invariance: pairwise design over {len(DESIGN[0])} factors, {len(DESIGN)} of {number_of_cases(BLOCKS):,} "
    f"combinations, every feasible pair of levels covered; {len(REPRESENTATIVES)} of them have every level once; "
    f"beside it {len(DEEP_CASES)} cases of PP 4 x VP 2"
)


def name_of(case: Case) -> str:
    """A test's name: what is learnt, the layout, and how the batch is cut."""
    layout = f"dp{case['data']}_tp{case['tensor']}_pp{case['pipeline']}"
    layout += "_sp" * case["sequence"] + "_vp2" * (case["virtual_pipeline"] == 2)
    micro = case["micro_batch"] if isinstance(case["micro_batch"], str) else f"mbs{case['micro_batch']}"
    number = [*DESIGN, *DEEP_CASES].index(case)
    return f"{case['objective']}-{layout}-{micro}-{case['architecture']}-{number:02d}".replace(" ", "_")

"""What goes into a distributed checkpoint: sharded state of model and optimizer, and comparing it with a file's.

Keys in the file: model tensors under Transformer Engine's names with the layer's global number
(`decoder.layers.3.self_attention.linear_qkv.weight`), optimizer tensors under `optimizer.`, `rng_state/...` per rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject, ShardedTensor
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nemo_align.checkpoint import fp8_histories
from nemo_align.checkpoint.keys import RNG_KEY, is_model_key
from nemo_align.runtime import device
from nemo_align.runtime.agreement import gather
from nemo_align.runtime.topology import Topology

_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # what makes groups different
NUM_LISTED = 6  # keys named in an error


def bare_model(chunk: torch.nn.Module) -> MegatronModule:
    """The GPTModel inside data-parallel wrappers."""
    while not hasattr(chunk, "sharded_state_dict") or hasattr(chunk, "ddp_config"):
        chunk = chunk.module
    return chunk


def format_metadata(optimizer_sharding: str | None) -> dict:
    """Megatron-core's switches for the layout of a checkpoint; stored in it as its content metadata."""
    metadata = {
        # One tensor per layer under the layer's number, in place of all layers stacked in one.
        "singleton_local_shards": True,
        "chained_optim_avoid_prefix": True,
    }
    if optimizer_sharding in ("dp_reshardable", "fully_reshardable"):
        metadata["distrib_optim_sharding_type"] = optimizer_sharding
        # On GPUs the state is gathered on data rank 0 through host memory and gloo; the alternative gathers it in the
        # memory of every GPU. Without a GPU there is one kind of memory and of group, and no second set of groups.
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = device.use_gpu()
    return metadata


def sharding_of(optimizer: MegatronOptimizer | None, *, fully: bool) -> str | None:
    """How the optimizer's state is cut in a save: what a later load may change of the layout depends on it.

    dp_reshardable: fast, for periodic saves; only the data-parallel size may change. fully_reshardable: any layout;
    gathers while saving. replicated: without the distributed optimizer; any layout.
    """
    if optimizer is None:
        return None
    if not any(isinstance(part, DistributedOptimizer) for part in _parts(optimizer)):
        return "replicated"
    return "fully_reshardable" if fully else "dp_reshardable"


def model_state(
    model_chunks: list[torch.nn.Module], sharding: str | None, *, resumed: Metadata | None = None
) -> dict[str, dict]:
    """Sharded state of every model chunk: {"model0": {state-dict key: ShardedTensor}, ...}. Data are the parameters.

    FP8 histories are in it as far as the modules have some or, with `resumed`, as far as that checkpoint has.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {}
    for index, chunk in enumerate(model_chunks):
        metadata = {**format_metadata(sharding), "dp_cp_group": group}
        bare = bare_model(chunk)
        sharded = bare.sharded_state_dict(metadata=metadata)
        if resumed is None:
            sharded = fp8_histories.for_saving(bare, sharded)
        else:
            sharded = fp8_histories.for_resuming(bare, sharded, resumed)
        state[f"model{index}"] = sharded
    return state


def optimizer_state(optimizer: MegatronOptimizer, state_of_model: dict, sharding: str, *, is_loading: bool) -> dict:
    """Sharded state of the optimizer."""
    _correct_order(optimizer)
    fill_adam_state(optimizer)
    metadata = {
        **format_metadata(sharding),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    with _all_parameters_known(optimizer):
        state = optimizer.sharded_state_dict(state_of_model, is_loading=is_loading, metadata=metadata)
    if not is_loading:
        _zero_padding(state)
    return state


def rng_object(state: object, topology: Topology) -> ShardedObject:
    """The random state of this rank, as an entry of its own per rank."""
    return ShardedObject(RNG_KEY, state, (topology.world_size,), (topology.rank,), replica_id=0)


def fill_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the state that it makes itself in its first step, where it has none yet.

    Megatron-core's save and load read the step count from it and fail on an optimizer that never stepped.
    (Transformer Engine's and Apex' Adam keep the step elsewhere and need nothing.)
    """
    for part in _parts(optimizer):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            continue
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param.data),
                        "exp_avg_sq": torch.zeros_like(param.data),
                    }


@torch.no_grad()  # Megatron-core copies into slices of parameters that require gradients
def into_optimizer(optimizer: MegatronOptimizer, loaded: dict) -> None:
    """Put a loaded state into the optimizer.

    Megatron-core's distributed optimizer mishandles the step count of torch's Adam: a fully reshardable load fails on
    it, a dp_reshardable one puts the old count back, and all parameters get one shared tensor that each of them then
    increments. So the count is taken away during the load and set once for each parameter afterwards.
    """
    parts = _parts(optimizer)
    for index, part in enumerate(parts):
        state = loaded if len(parts) == 1 else loaded[index]
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            part.load_state_dict(state)
            continue
        if not isinstance(part, DistributedOptimizer):
            part.load_state_dict(state)
            for values in inner.state.values():
                values["step"] = values["step"].clone()
            continue
        param_state = state.pop("param_state")
        sharding = state.pop("param_state_sharding_type")
        part.load_state_dict(state)
        for values in inner.state.values():
            del values["step"]
        getattr(part, f"load_parameter_state_from_{sharding}")(param_state)
        for group in inner.param_groups:
            for param in group["params"]:
                inner.state[param]["step"] = torch.tensor(float(group["step"]))


def hyper_parameters(optimizer: MegatronOptimizer) -> list[dict]:
    """Copies of the parameter groups' settings (learning rates, decay, betas), without parameters and step count."""
    groups = (group for part in _parts(optimizer) for group in part.optimizer.param_groups)
    return [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups]


def replace_hyper_parameters(optimizer: MegatronOptimizer, loaded: dict, ours: list[dict]) -> None:
    """Put `ours` (from `hyper_parameters`) in place of the settings in a loaded state, which keeps its step count.

    Before the load: newer Megatron-core finds a group by its learning rates too, and the schedule reads them from it.
    """
    parts = _parts(optimizer)
    for index in range(len(parts)):
        state = loaded if len(parts) == 1 else loaded[index]
        for group in state.get("optimizer", state)["param_groups"]:  # the plain fp32 optimizer has no level between
            same = [ours_of for ours_of in ours if all(ours_of.get(key) == group.get(key) for key in _GROUP_KEYS)]
            assert len(same) == 1, f"{len(same)} parameter groups like {group}"
            group.update(same[0])


def drop(state: dict, keys: set[str]) -> None:
    """Remove the entries with these checkpoint keys from a sharded state, in place."""
    for chunk in state.values():
        for name in [name for name, value in chunk.items() if isinstance(value, ShardedBase) and value.key in keys]:
            del chunk[name]


def requested_shapes(state: dict) -> dict[str, tuple | None]:
    """{key: (global shape, whether rows may differ)} of what this rank asks for; None for what is not a tensor."""
    shapes: dict[str, tuple | None] = {}
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            shapes[value.key] = (tuple(value.global_shape), value.allow_shape_mismatch)
        elif isinstance(value, ShardedObject):
            shapes[value.unique_key] = None
        else:
            assert not isinstance(value, ShardedBase) or isinstance(value, LocalNonpersistentObject), type(value)
    return shapes


def everyones(shapes: dict[str, tuple | None]) -> dict[str, tuple | None]:
    """The union of all ranks' requests."""
    return {key: value for part in gather(shapes) for key, value in part.items()}


def compare(
    requested: dict[str, tuple | None], metadata: Metadata, *, of: str, ignored: set[str] = frozenset()
) -> list[str]:
    """Differences between what the model asks for and what the file holds, for an error; empty when they agree.

    Args:
        requested: keys of all ranks, as `everyones` returns them.
        of: "model" compares both ways; "optimizer" only looks for what is missing.
        ignored: keys of the file that are left unread on purpose.
    """
    stored = metadata.state_dict_metadata
    problems = []
    if missing := sorted(key for key in requested if key not in stored):
        problems.append(f"missing in the checkpoint: {_some(missing)}")
    if of == "model" and (
        left := sorted(key for key in stored if is_model_key(key) and key not in requested and key not in ignored)
    ):
        problems.append(f"in the checkpoint but not in the model: {_some(left)}")
    for key, wanted in sorted(requested.items()):
        if wanted is None or key not in stored or isinstance(stored[key], BytesStorageMetadata):
            continue
        shape, rows_may_differ = wanted
        found = tuple(stored[key].size)
        first = 1 if rows_may_differ else 0  # vocabulary rows depend on the padding, which depends on TP
        if len(found) != len(shape) or found[first:] != shape[first:]:
            problems.append(f"{key} has shape {list(found)}, the model's is {list(shape)}")
            if len(problems) > NUM_LISTED:
                break
    return problems


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _correct_order(optimizer: MegatronOptimizer) -> None:
    """Repair the distributed optimizer's map from a parameter to its place in torch's parameter group.

    Megatron-core fills the groups with fp32 parameters first, the map in the order of the buffers. With both kinds in
    one group (a bf16 reward model has an fp32 head) a save would take moments from, and a load put them to, the wrong
    parameters.
    """
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            for group, (full, half) in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
                for place, param in enumerate((*full, *half)):
                    part.model_param_group_index_map[param] = (group, place)


@contextmanager
def _all_parameters_known(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, the plain bf16 optimizer numbers all parameters of its groups, as torch's Adam does.

    Megatron-core numbers the bf16 ones only and so does not find an fp32 reward head. The head comes last in its
    groups, which keeps the numbers of the others.
    """
    mixed = [
        part
        for part in _parts(optimizer)
        if isinstance(part, Float16OptimizerWithFloat16Params) and any(part.fp32_from_fp32_groups)
    ]
    before = [part.float16_groups for part in mixed]
    for part in mixed:
        full_groups = part.fp32_from_fp32_groups
        for group, full in zip(part.optimizer.param_groups, full_groups, strict=True):
            last = group["params"][len(group["params"]) - len(full) :]
            assert all(found is wanted for found, wanted in zip(last, full, strict=True)), (
                "fp32 parameters are not last"
            )
        part.float16_groups = [[*half, *full] for half, full in zip(part.float16_groups, full_groups, strict=True)]
    try:
        yield
    finally:
        for part, groups in zip(mixed, before, strict=True):
            part.float16_groups = groups


def _zero_padding(state: object) -> None:
    """Fill the gaps between parameters in the distributed optimizer's buckets.

    Megatron-core saves them as it allocated them: whatever that memory held before would be in the file, and two saves
    of one state would differ.
    """
    if isinstance(state, list):
        for entry in state:
            _zero_padding(entry)
    elif isinstance(state, dict):
        padding = state.get("padding")
        is_padding = isinstance(padding, LocalNonpersistentObject) and padding.obj is True
        for value in state.values():
            if is_padding and isinstance(value, ShardedTensor):
                value.data.zero_()
            else:
                _zero_padding(value)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:NUM_LISTED]) + (f" and {len(keys) - NUM_LISTED} more" if len(keys) > NUM_LISTED else "")

"""FP8's delayed recipe goes on where it stopped: what a checkpoint holds of it, and what a resumed run takes of it."""

from __future__ import annotations

import logging
from pathlib import Path

from tests import transformer_engine
from tests.fresh_process import answer

pytestmark = transformer_engine.needed

MODULES = ("linear_fc1", "linear_fc2", "linear_proj", "linear_qkv")
LAYERS = 4


def checkpoints(folder: str) -> dict:
    """Saves of runs with and without histories, and what runs resumed from them have; see the test."""
    transformer_engine.pretend_gpu_in_host_memory()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nemo_align.checkpoint.megatron import load_training, load_weights
    from nemo_align.checkpoint.store import resolve
    from nemo_align.config.runtime import ParallelConfig
    from nemo_align.runtime import seeds
    from nemo_align.runtime.topology import _place
    from tests.distributed import checkpoint_runs as runs

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    topology = _place(ParallelConfig(), 0, 1, 1, torch.device("cpu"))
    seeds.seed_everything(1, topology)
    tokenizer = runs.train_tokenizer(Path(folder) / "tokenizer")

    def build(fp8: str) -> runs.Run:
        return runs.build(topology, dtype="bf16", fp8=fp8)

    def save(run: runs.Run, name: str) -> Path:
        return Path(runs.save(run, f"{folder}/{name}", 1, tokenizer, final=False))

    def resume(path: Path, fp8: str) -> tuple[runs.Run, str]:
        run = build(fp8)
        try:
            load_training(path, run.chunks, run.optimizer, run.scheduler, topology)
        except ValueError as error:
            return run, str(error)
        return run, ""

    trained = build("delayed")
    before_fp8 = save(trained, "before")  # no forward pass has been through
    histories = invent_histories(trained)
    path = save(trained, "delayed")
    plain = save(build("none"), "plain")

    said: list[str] = []
    logging.getLogger("nemo_align").addFilter(lambda record: said.append(record.getMessage()))
    logging.getLogger("nemo_align").setLevel(logging.INFO)
    found = {}
    for name, source, fp8 in (("same", path, "delayed"), ("from_bf16", plain, "delayed"), ("to_bf16", path, "none"),
                              ("to_tensorwise", path, "tensorwise"), ("early", before_fp8, "delayed")):  # fmt: skip
        run, error = resume(source, fp8)
        found[name] = [sorted(histories_of(run)), equal(histories_of(run), histories), error, said[-1]]
    run = build("delayed")
    load_weights(resolve(path), run.chunks, topology, load_head=False)
    found["new_stage"] = sorted(histories_of(run))

    next(iter(module for _, module in delayed_modules(trained))).fp8_meta["scaling_fwd"].scale[1] = float("nan")
    found["damaged"] = resume(save(trained, "damaged"), "delayed")[1]
    found["again"] = sorted(histories_of(trained))
    return found


def delayed_modules(run) -> list:
    from nemo_align.checkpoint.sharded_state import bare_model

    modules = [found for chunk in run.chunks for found in bare_model(chunk).named_modules()]
    return [(name, module) for name, module in modules if name.endswith(MODULES) and hasattr(module, "fp8_meta")]


def invent_histories(run) -> dict:
    """What training would leave in the modules, with other values in each."""
    import torch
    from megatron.core.fp8_utils import get_fp8_recipe

    from nemo_align.checkpoint.sharded_state import bare_model

    recipe = get_fp8_recipe(bare_model(run.chunks[0]).config)
    generator = torch.Generator().manual_seed(1)
    for _, module in delayed_modules(run):
        module.fp8_meta["num_gemms"] = 1
        module.init_fp8_meta_tensors(recipe)
        for key in ("scaling_fwd", "scaling_bwd"):
            module.fp8_meta[key].scale.uniform_(1, 9, generator=generator)
            module.fp8_meta[key].amax_history.uniform_(0, 9, generator=generator)
    return histories_of(run)


def histories_of(run) -> dict:
    return {
        f"{name}/{key}/{value}": getattr(module.fp8_meta[key], value).clone()
        for name, module in delayed_modules(run)
        for key in ("scaling_fwd", "scaling_bwd")
        for value in ("scale", "amax_history")
        if key in module.fp8_meta
    }


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(bool((found[name] == expected[name]).all()) for name in expected)


def test_histories_go_on_where_they_stopped_and_start_anew_elsewhere(tmp_path: Path) -> None:
    found = answer(
        f"checkpoints({str(tmp_path)!r})", "from tests.unit.checkpoint.test_fp8_histories import checkpoints"
    )
    names, modules = found["again"], LAYERS * len(MODULES)
    assert len(names) == modules * 4
    assert found["same"] == [
        names,
        True,
        "",
        f"FP8 scaling histories of {modules} modules of this rank go on",
    ]
    for name in ("from_bf16", "early"):  # the first forward pass makes them
        assert found[name][:3] == [[], False, ""] and "they start anew" in found[name][3], name
    for name in ("to_bf16", "to_tensorwise"):
        assert found[name][:3] == [[], False, ""] and "stay unread" in found[name][3], name
    assert found["new_stage"] == []
    assert "holds no FP8 forward scale of shape [3]" in found["damaged"]
    pickles = [path for path in tmp_path.rglob("*.distcp") if b"transformer_engine" in path.read_bytes()]
    assert not pickles, "a class of Transformer Engine's is named in a checkpoint"

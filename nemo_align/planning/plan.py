"""`nemo-align plan`: what a stage needs and yields before a GPU is touched. docs/plan.md explains the model."""

from __future__ import annotations

from nemo_align.config.plan import PlannedRecipe, PlannedStage
from nemo_align.config.stages import RewardStageConfig
from nemo_align.planning import as_json, report
from nemo_align.planning.advice import changes_that_fit
from nemo_align.planning.estimate import estimate
from nemo_align.planning.result import PlanResult, SearchResult, cost_of_checkpoints, stage_total
from nemo_align.planning.scaling import scaling
from nemo_align.planning.search import search
from nemo_align.planning.workload import stage_length
from nemo_align.runtime import exit_codes


def plan(planned: PlannedStage | PlannedRecipe) -> int:
    """Compute, print, and write what was asked for; returns the exit code, USER_ERROR if a stage does not fit.

    Raises:
        ValueError: the file of lengths is wrong, a row does not fit a micro-batch, or a file cannot be written.
    """
    if isinstance(planned, PlannedRecipe):
        results = {name: plan_layout(stage) for name, stage in planned.stages.items()}
        report.print_recipe(planned, results)
        if planned.plan.json is not None:
            as_json.write(planned.plan.json, {name: as_json.of_plan(result) for name, result in results.items()})
        return _exit_code(all(result.main.memory.fits for result in results.values()))
    if planned.plan.search:
        found = search_layouts(planned)
        report.print_search(found)
        if planned.plan.json is not None:
            as_json.write(planned.plan.json, as_json.of_search(found))
        return _exit_code(found.found.fitting > 0)
    result = plan_layout(planned)
    report.print_plan(result)
    if planned.plan.json is not None:
        as_json.write(planned.plan.json, as_json.of_plan(result))
    if planned.plan.plot is not None:
        from nemo_align.planning.plot import draw_scaling

        assert result.scaling is not None
        draw_scaling(result.scaling, planned)
    return _exit_code(result.main.memory.fits)


def _exit_code(fits: bool) -> int:
    return exit_codes.SUCCESS if fits else exit_codes.USER_ERROR


def plan_layout(planned: PlannedStage) -> PlanResult:
    """The plan of the configured layout."""
    stage = planned.stage
    length = stage_length(planned)
    estimates = [estimate(stage, batches.size, length.lengths) for batches in length.batches]
    main, batch_size = estimates[-1], length.batches[-1].size
    changes = []
    if not main.memory.fits:
        changes = changes_that_fit(stage, batch_size, length.lengths)
    counted = None
    if planned.plan.exact:
        from nemo_align.planning.exact import count_parameters_exactly

        reward = stage.reward if isinstance(stage, RewardStageConfig) else None
        counted = count_parameters_exactly(stage.model, stage.parallel, stage.precision, reward)
    grown = scaling(stage, batch_size, length.lengths) if planned.plan.scaling else None
    return PlanResult(
        planned=planned,
        length=length,
        estimates=estimates,
        total=stage_total(planned, length, estimates),
        checkpoint=cost_of_checkpoints(planned, main),
        changes=changes,
        counted=counted,
        scaling=grown,
    )


def search_layouts(planned: PlannedStage) -> SearchResult:
    """The best layouts of `gpus`, for the stage's last batch size."""
    options = planned.plan
    length = stage_length(planned)
    assert options.gpus is not None
    found = search(planned.stage, length.batches[-1].size, length.lengths, options.gpus, options.top)
    return SearchResult(planned, length, found)

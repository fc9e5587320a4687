"""scaling=true as a picture: tokens per second and MFU against the number of GPUs."""

from __future__ import annotations

from pathlib import Path

from nemo_align.config.plan import PlannedStage
from nemo_align.planning.scaling import Scaling


def draw_scaling(scaling: Scaling, planned: PlannedStage) -> None:
    """Write the file that `plot` names.

    Raises:
        ValueError: matplotlib is missing, or the file cannot be written.
    """
    path = Path(planned.plan.plot or "")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("plot needs matplotlib: pip install 'nemo_align[report]'") from None
    figure, (rate, utilisation) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, rows, marker in (("weak", scaling.weak, "o"), ("strong", scaling.strong, "s")):
        found = [(row.gpus, row.estimate) for row in rows if row.estimate is not None]
        gpus = [number for number, _ in found]
        label = f"{name}: batch {'grows' if name == 'weak' else 'fixed'}"
        totals = [number * e.tokens_per_second_per_gpu for number, e in found]
        rate.plot(gpus, totals, marker=marker, label=label)
        utilisation.plot(gpus, [100 * e.mfu for _, e in found], marker=marker, label=label)
    rate.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens per second")
    utilisation.set(xscale="log", xlabel="GPUs", ylabel="MFU, %")
    utilisation.set_ylim(0, 1.1 * utilisation.get_ylim()[1])
    for axes, place in ((rate, "upper left"), (utilisation, "lower left")):
        axes.grid(alpha=0.3)
        axes.legend(loc=place)
    figure.suptitle(f"{planned.stage.model.name}, predicted for DGX H100")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"plot={path} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)

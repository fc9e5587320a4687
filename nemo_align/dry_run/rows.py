"""Files of rows: how many there are, and what a step over them looks like, from a sample tokenized by the real code."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_align.config.data import RowsConfig
from nemo_align.config.stages import (
    PreferenceStageConfig,
    RewardStageConfig,
    SftStageConfig,
    TrainStageConfig,
    WorkerConfig,
)
from nemo_align.data.dataset_folders import check_state
from nemo_align.data.rows import read_rows
from nemo_align.data.sampler import EpochSampler
from nemo_align.data.step_plan import StepLayout, StepPlan, plan_step
from nemo_align.dry_run.findings import Findings

if TYPE_CHECKING:
    from nemo_align.data.tokenized_rows import TokenizedRows
    from nemo_align.data.tokenizer import Tokenizer

SAMPLE_ROWS = 256  # of all sources together: a step's worth, tokenized in a second
# Lines of larger files are counted in their first part: reading a terabyte is not a matter of seconds.
_COUNTED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RowCount:
    """Rows of a file; estimated for a large one."""

    rows: int
    exact: bool

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{self.rows:,} rows"


@dataclass(frozen=True)
class Sample:
    """The first rows of the training files, tokenized."""

    num_rows: int
    kept: int  # of these, after selection and length limits; a rated dialogue may give several examples
    mean_tokens: float  # of an example
    longest: int
    step: StepPlan  # a global batch of them


def count_rows(path: Path) -> RowCount:
    """Rows of one file or dataset folder. Raises ValueError for a kind of file that is not read."""
    if path.is_file() and path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return RowCount(pyarrow.parquet.ParquetFile(path).metadata.num_rows, True)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a parquet file ({error}); copy or write it again") from error
    if path.is_file() and path.stat().st_size > _COUNTED_BYTES and path.suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as file:
            start = file.read(_COUNTED_BYTES)
        return RowCount(round(start.count(b"\n") * path.stat().st_size / len(start)), False)
    if path.is_dir():
        return RowCount(_rows_of_folder(path), True)
    rows = read_rows(RowsConfig(path=str(path)), seed=0, with_unreadable=True)
    return RowCount(sum(1 for _ in rows), True)


def taken(count: RowCount, rows: RowsConfig) -> RowCount:
    """What max_rows and fraction leave of a file's rows."""
    left = count.rows if rows.fraction is None else max(1, round(count.rows * rows.fraction))
    if rows.max_rows is not None:
        left = min(left, rows.max_rows)
    return RowCount(left, count.exact)


def count_sources(key: str, sources: Mapping[str, RowsConfig], findings: Findings) -> dict[str, RowCount | None]:
    """Rows taken of each source; None for one that is not on this machine. `key`: of a path, with {} for the name."""
    counts: dict[str, RowCount | None] = {}
    for name, rows in sources.items():
        counts[name] = None
        if not Path(rows.path).exists():
            findings.is_absent(key.format(name), rows.path)
            continue
        with findings.collecting():
            counts[name] = taken(count_rows(Path(rows.path)), rows)
    return counts


def sample_step(config: TrainStageConfig, tokenizer: Tokenizer, layout: StepLayout) -> Sample | None:
    """A step over the first rows of the training files, as training would plan one; None if selection leaves none.

    Raises ValueError for a row that the run would refuse, with its file.
    """
    sources = config.data.train
    each = -(-SAMPLE_ROWS // len(sources))
    with tempfile.TemporaryDirectory(prefix="nemo_align_dry_run_") as folder:
        sampled, paths, num_rows = {}, {}, 0
        for name, source in sources.items():
            path = Path(folder) / f"{name}.jsonl"
            read = read_rows(RowsConfig(path=source.path), seed=0, with_unreadable=True)
            lines = [row.text or json.dumps(row.record, default=str).encode() for row in itertools.islice(read, each)]
            path.write_bytes(b"\n".join(lines) + b"\n")
            num_rows += len(lines)
            paths[str(path)] = source.path
            sampled[name] = replace(source, path=str(path), max_rows=None, fraction=None)
        try:
            tokenized = _tokenize(config, sampled, tokenizer, Path(folder) / "cache")
        except ValueError as error:
            message = str(error)
            if "no example is left" in message:
                return None
            for path, original in paths.items():
                message = message.replace(path, original)
            raise ValueError(message) from error
        tokens = tokenized.lengths.sum(axis=1)
        batch = EpochSampler(len(tokenized), config.runtime.seed).batch(0, config.train.global_batch_size)
        return Sample(
            num_rows=num_rows,
            kept=len(tokenized),
            mean_tokens=float(tokens.mean()),
            longest=int(tokens.max()),
            step=plan_step(batch, tokenized.lengths, tokenized.loss_tokens, **asdict(layout)),
        )


def _tokenize(config: WorkerConfig, rows: dict[str, RowsConfig], tokenizer: Tokenizer, cache: Path) -> TokenizedRows:
    seed = config.runtime.seed
    if isinstance(config, SftStageConfig):
        from nemo_align.data.sft import tokenize_sft

        return tokenize_sft(config.data, rows, tokenizer, cache_dir=cache, seed=seed)
    if isinstance(config, RewardStageConfig):
        from nemo_align.data.regression import tokenize_regression

        attributes = config.reward.attributes
        return tokenize_regression(config.data, rows, tokenizer, cache_dir=cache, seed=seed, attributes=attributes)
    from nemo_align.data.preference import tokenize_preference

    assert isinstance(config, PreferenceStageConfig)
    loss = config.preference.preference_loss
    return tokenize_preference(config.data, rows, tokenizer, cache_dir=cache, seed=seed, preference_loss=loss)


def _rows_of_folder(path: Path) -> int:
    import datasets

    check_state(path)
    try:
        return len(datasets.load_from_disk(str(path)))
    except Exception as error:  # whatever a damaged folder makes of the library: it is the folder that is wrong
        raise ValueError(f"{path}: datasets cannot load it ({error}); write it again with save_to_disk") from error

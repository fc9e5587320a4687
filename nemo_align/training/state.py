"""Where a run stands: what a checkpoint stores besides weights, optimizer and random states."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class TrainState:
    """Integers that place a run exactly. The data order follows from `consumed_examples` alone."""

    step: int = 0
    consumed_examples: int = 0
    tokens: int = 0  # real tokens trained on
    train_seconds: float = 0.0  # inside training steps
    seconds: float = 0.0  # of all processes of this run until they saved, start-up included
    skipped_steps: int = 0  # steps with a loss or gradient that was not finite
    skipped_in_a_row: int = 0  # of them, the last ones without a good step between
    validated_step: int = 0  # of the last validation
    initial_identity: str = ""  # of the weights that the run started from: a resume with others is refused
    data_fingerprint: str = ""  # of the training data: a resume with other data is refused
    data_content: dict[str, str] = field(default_factory=dict)  # of each of its sources, to say which one changed
    first_validation: dict[str, float] = field(default_factory=dict)  # metrics at step 0, for the stage's result
    validation_totals: dict[str, float] = field(default_factory=dict)  # of all validations, for their throughput
    throughput: dict[str, float] = field(default_factory=dict)  # running totals behind the stage's MFU

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> TrainState:
        return cls(**values)

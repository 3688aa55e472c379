"""What a run leaves beside its weights: what each stage did, and the settings of the stages that were begun."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_linear_attn.saving import write_json
from hf_linear_attn.training.stage import refuse_other_settings

__all__ = ["RESULT", "Progress", "StageResult", "TrainResult", "forget_stages"]

RESULT = "train_result.json"
_STAGES = "stages.json"


@dataclass
class StageResult:
    """What one stage did.

    Attributes:
        stage: its kind.
        trained: which parameters trained, in words.
        steps: optimizer steps of the whole stage.
        documents: training documents or pieces of text; None where they stream.
        documents_seen: of them, repeats counted.
        tokens_seen: tokens that went through the model, repeats counted, without padding.
        max_length: tokens of a document or piece at most.
        seconds: wall time of the steps since the last start.
        peak_memory_mb: 10^6 bytes that training needed beyond what was held at its start, on the main process.
        losses: (step, mean training loss since the entry before).
        evaluation: what was measured after the last step, `eval_loss` among it.
        parameters_trained: that had a gradient.
    """

    stage: str
    trained: str
    steps: int
    documents: int | None
    documents_seen: int
    tokens_seen: int
    max_length: int
    seconds: float
    peak_memory_mb: float
    losses: list[tuple[int, float]]
    evaluation: dict[str, float]
    parameters_trained: int


@dataclass
class TrainResult:
    """What a run did and measured.

    Attributes:
        output_dir: where the model, the tokenizer and this result lie.
        metrics: name -> value on the test documents, after the last step.
        predictions: of each test document, in the order of the task's test split; empty without a task.
        references: what they should be.
        stages: what each stage did.
        parameters_total: of the model.
        parameters_added: by the conversion.
        num_processes: processes that trained together.
        conversion: the conversion report as a dictionary, or None.
        groups: the group (file, row or author) of each test document that has a prediction.
    """

    output_dir: str
    metrics: dict[str, float]
    predictions: list[Any]
    references: list[Any]
    stages: list[StageResult]
    parameters_total: int
    parameters_added: int
    num_processes: int
    conversion: dict[str, Any] | None = None
    groups: list[str] = field(default_factory=list)

    @property
    def last(self) -> StageResult:
        """What the last stage did."""
        return self.stages[-1]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> TrainResult | None:
        """The result that a finished stage has left in `folder`, or None."""
        try:
            data = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        for stage in data["stages"]:
            stage["losses"] = [tuple(entry) for entry in stage["losses"]]
        return cls(**{**data, "stages": [StageResult(**stage) for stage in data["stages"]]})


class Progress:
    """The settings of the stages that a run has begun, in a file of its output folder.

    Args:
        folder: the run's output folder.
        settings: of each stage of the recipe, what decides the weights it ends with.
    """

    def __init__(self, folder: Path, settings: list[dict[str, Any]]) -> None:
        self.path, self.settings = folder / _STAGES, json.loads(json.dumps(settings))
        self.begun = 0

    def go_on(self, count: int) -> None:
        """Take over the stages that were begun in this folder, at most `count`.

        Raises:
            ValueError: if one of them was begun under other settings; says which differ.
        """
        if not self.path.is_file():
            return
        saved: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        self.begun = min(len(saved), count)
        for number, (there, here) in enumerate(zip(saved[: self.begun], self.settings, strict=False), 1):
            refuse_other_settings(f"Stage {number} in {self.path.parent}", _comparable(there, here), here)

    def begin(self, index: int) -> None:
        """Write down that a stage begins anew, and forget those after it."""
        self.begun = index + 1
        write_json(self.path, self.settings[: self.begun])


def forget_stages(folder: Path) -> None:
    """Nothing that was trained below `folder` is gone on with."""
    for path in folder.rglob(_STAGES):
        path.unlink()


def _comparable(there: Mapping[str, Any], here: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a stage of another kind nothing but its kind is worth comparing."""
    return there if there["stage"] == here["stage"] else {**here, "stage": there["stage"]}

"""Options of the gate, which a model must pass before it is served."""

from pydantic import Field, model_validator

from mellow_platform.settings import (
    Input,
    Section,
)


class GateSection(Section):
    """Questions with known answers that a model must answer correctly before it is served."""

    records: Input | None = Field(None, description="ReasonAQA file of questions with answers (default: no gate)")
    audio_root: Input | None = Field(
        None,
        description="folder that paths of clips in gate.records are relative to; required with gate.records",
    )
    min_accuracy: float = Field(1.0, gt=0, le=1, description="share of questions that must be answered word for word")

    @model_validator(mode="after")
    def _check_audio_root(self) -> "GateSection":
        if bool(self.records) != bool(self.audio_root):
            raise ValueError("gate.records and gate.audio_root go together")
        return self

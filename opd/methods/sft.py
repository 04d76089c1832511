"""Supervised fine-tuning: L = -(1/N) Σ_t log π_θ(y_t | y_<t) over the assistant's tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opd import objectives
from opd.config import MethodConfig
from opd.protocols import Batch, Dense, Method, Needs, Scores, Term, Terms


class SFT(Method):
    """Cross-entropy on the data's completions."""

    class Config(MethodConfig):
        """conf/method/sft.yaml."""

        name: Literal["sft"]
        loss_on: Literal["assistant", "last_assistant", "all"] = Field(description="which tokens are learnt")

    @property
    def needs(self) -> Needs:
        """Completions, from every assistant turn or the last; the only method that keeps the student's dropout."""
        return Needs(
            turns="last" if self.config.loss_on == "last_assistant" else "all",
            completions="required",
            prompt_loss=self.config.loss_on == "all",
            student_dropout=True,
        )

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """Σ -log π_θ(y_t) / tokens."""
        nll = objectives.negative_log_likelihood(batch.layout.targets)
        summed = objectives.sum_over_tokens(student, nll, weights=batch.weights)
        return Terms([Term(summed.loss, "tokens")], summed.means("mean_token_accuracy", "entropy"))

"""Generalised knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649): L = (1/N) Σ_t D_β(teacher_t, student_t).

Off-policy, on-policy or a mixture (λ), against the whole next-token distribution of the teacher.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opd import objectives
from opd.config import Fraction, MethodConfig
from opd.protocols import Batch, Dense, Kind, Method, Needs, Origin, Scores, TeacherNeed, Term, Terms


class GKD(Method):
    """Divergence to the teacher on sequences from the student, the teacher or the data."""

    class Config(MethodConfig):
        """conf/method/gkd.yaml."""

        name: Literal["gkd"]
        beta: Fraction = Field(description="0: forward KL, 1: reverse KL, between: generalised Jensen-Shannon")
        lmbda: Fraction = Field(description="the paper's λ: share of rows completed by the student")
        seq_kd: bool = Field(description="complete the other rows with the teacher instead of the data")
        kd_temperature: float = Field(gt=0, description="divides both models' logits in the loss")

    @property
    def needs(self) -> Needs:
        """A teacher that gives distributions; the data's completions only where some row is left to them."""
        config = self.config
        return Needs(
            teachers={"teacher": TeacherNeed("dense" if config.kd_temperature != 1 else "any")},
            completions="unused" if config.lmbda == 1 or config.seq_kd else "required",
            rollouts=config.lmbda > 0 or config.seq_kd,
            fixed_point=True,
        )

    def origin(self, coin: float, kind: Kind) -> Origin:
        """Student with probability λ; the rest from the teacher (seq_kd) or the data."""
        if coin < self.config.lmbda:
            return "student"
        return "teacher" if self.config.seq_kd else "dataset"

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """Σ D_β(teacher, student) / tokens."""
        divergence = objectives.divergence_loss(
            teachers["teacher"], beta=self.config.beta, temperature=self.config.kd_temperature
        )
        summed = objectives.sum_over_tokens(student, divergence, weights=batch.weights)
        return Terms([Term(summed.loss, "tokens")], summed.means("forward_kl", "reverse_kl", "entropy"))

"""On-policy reverse KL by policy gradient (Thinking Machines 2025, "On-Policy Distillation"; Tinker cookbook).

A_t = -kl_coef · (log π_old(y_t) - log p_teacher(y_t)), optionally discounted over later tokens; L = -(1/N) Σ_t ρ_t A_t.
In expectation, without discount, the gradient is that of Σ_t KL(π_θ ‖ p) at the visited prefixes; with discount 1 it is
that of the sequence KL. The value of the loss says nothing: watch train/reverse_kl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from opd import objectives
from opd.config import Fraction, MethodConfig, PositiveInt
from opd.protocols import Batch, Dense, Kind, Method, Needs, Origin, Scores, TeacherNeed, Term, Terms, TokenSequence

if TYPE_CHECKING:
    from torch import Tensor


class ReverseKL(Method):
    """Policy gradient on the student's own samples; one log-probability a token is all it asks of the teacher."""

    class Config(MethodConfig):
        """conf/method/reverse_kl.yaml."""

        name: Literal["reverse_kl"]
        kl_coef: float = Field(gt=0, description="scale of the advantage")
        kl_discount: Fraction = Field(description="γ: how much later tokens' penalties count; 0: not at all")
        num_substeps: PositiveInt = Field(description="optimizer steps a batch of rollouts is split into")
        importance_ratio: bool = Field(description="weight by π_θ / π_old; false: plain policy gradient")
        clip_epsilon: float | None = Field(gt=0, lt=1, description="PPO's clip of the ratio; null: none")
        center_advantages: bool = Field(description="subtract the mean over all loss tokens of the step")

    @property
    def needs(self) -> Needs:
        """Rollouts, and the step's token log-probabilities under the old student and the teacher."""
        return Needs(
            teachers={"teacher": TeacherNeed("logprobs")},
            completions="unused",
            rollouts=True,
            window=True,
            num_substeps=self.config.num_substeps,
            fixed_point=True,
        )

    def origin(self, coin: float, kind: Kind) -> Origin:
        """Always the student."""
        return "student"

    def window(self, sequences: Sequence[TokenSequence], total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Set "advantages" of every sequence; centring and the metrics are over all loss tokens of all ranks."""
        config = self.config
        student, mask = objectives.pad_rows([sequence.token_scores["student_logprobs"] for sequence in sequences])
        teacher, _ = objectives.pad_rows([sequence.token_scores["teacher_logprobs"] for sequence in sequences])
        advantages = objectives.reverse_kl_advantages(
            student, teacher, mask, kl_coef=config.kl_coef, kl_discount=config.kl_discount
        )
        if config.center_advantages:
            advantages = objectives.center_advantages(advantages, mask, total)
        for sequence, row in zip(sequences, advantages, strict=True):
            sequence.token_scores["advantages"] = row[: len(sequence.token_scores["student_logprobs"])]
        reverse_kl, _ = objectives.mean_and_std((student - teacher) * mask, mask, total)
        mean, std = objectives.mean_and_std(advantages, mask, total)
        metrics = {"reverse_kl": reverse_kl, "advantage_mean": mean, "advantage_std": std}
        if all("sampler_logprobs" in sequence.token_scores for sequence in sequences):
            sampler, _ = objectives.pad_rows([sequence.token_scores["sampler_logprobs"] for sequence in sequences])
            metrics["sampler_trainer_kl"], _ = objectives.mean_and_std(sampler - student, mask, total)
        return metrics

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """Σ -ρ_t A_t / tokens."""
        scores = batch.token_scores
        loss = objectives.policy_gradient_loss(
            batch.layout.targets,
            scores["advantages"],
            old_logprobs=scores["student_logprobs"] if self.config.importance_ratio else None,
            clip_epsilon=self.config.clip_epsilon,
        )
        summed = objectives.sum_over_tokens(student, loss, weights=batch.weights)
        ratio = {"ratio_max": summed.metrics["ratio_mean"]} if self.config.importance_ratio else {}
        return Terms(
            [Term(summed.loss, "tokens")],
            summed.means("entropy", "ratio_mean", "clip_fraction"),
            maxima=ratio,
        )

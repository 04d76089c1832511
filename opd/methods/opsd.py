"""On-policy self-distillation (Zhao et al. 2026, "OPSD", arXiv 2601.18734): L = (1/N) Σ_t D_β(teacher_t, student_t).

One model, two contexts: the teacher is the student itself, reading a prompt that holds privileged information as well
(a reference answer, or what checkers said of earlier drafts). It scores the very completion that the student sampled.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from opd import objectives
from opd.config import Decay, Fraction, MethodConfig, PositiveInt
from opd.errors import ConfigError
from opd.protocols import Batch, Dense, Kind, Method, Needs, Origin, Privileged, Scores, TeacherNeed, Term, Terms


class OPSD(Method):
    """Divergence to what the model itself would say if it knew more."""

    class Config(MethodConfig):
        """conf/method/opsd.yaml."""

        name: Literal["opsd"]
        beta: Fraction = Field(description="0: forward KL, 1: reverse KL, between: generalised Jensen-Shannon")
        lmbda: Fraction = Field(description="share of rows completed by the student; the rest from the data")
        kd_temperature: float = Field(gt=0, description="divides both contexts' logits in the loss")
        loss: Literal["distribution", "sampled_token"] = Field(
            description="distribution: D_β; sampled_token: policy gradient of the reverse KL at the sampled token"
        )
        token_clip: float | None = Field(gt=0, description="upper bound of what one id adds to a token's D_β, nats")
        top_k: PositiveInt | None = Field(description="D_β over the teacher's k likeliest ids, renormalised")
        teacher_mode: Literal["current", "initial", "ema"] = Field(description="whose weights the teacher has")
        ema_decay: Decay = Field(description="teacher_mode=ema: weight of the average at each optimizer step")
        teacher_prompt: Literal["messages", "full"] = Field(
            description="messages: the prompt and the privileged messages; full: the row's teacher_messages"
        )
        layout: Literal["template", "concat"] = Field(description="one rendered conversation, or ids joined")
        bridge_message: str | None = Field(description="user message behind privileged messages of an assistant")
        privileged_template: str = Field(description="folds a privileged string into the last user message")
        on_empty_privileged: Literal["error", "keep", "skip"] = Field(description="rows that hold none")
        max_privileged_length: PositiveInt | None = Field(description="tokens of the teacher's whole prompt")

        @model_validator(mode="after")
        def _refuse_contradictions(self) -> OPSD.Config:
            """Raises ConfigError for settings that contradict each other."""
            if missing := [name for name in ("{user}", "{privileged}") if name not in self.privileged_template]:
                problem = f"method.privileged_template={self.privileged_template!r}: does not hold {missing[0]}"
                raise ConfigError(f"{problem}; write it where that text belongs")
            if self.layout == "concat" and self.teacher_prompt == "full":
                problem = "method.layout=concat: joins the student's prompt and the privileged messages"
                raise ConfigError(f"{problem}; set method.teacher_prompt=messages, or method.layout=template")
            if self.loss == "sampled_token":
                if self.lmbda < 1:
                    problem = f"method.lmbda={self.lmbda}: method.loss=sampled_token needs tokens of the student"
                    raise ConfigError(f"{problem}; set it to 1, or method.loss=distribution")
                for key in ("token_clip", "top_k"):
                    if (value := getattr(self, key)) is not None:
                        problem = f"method.{key}={value}: method.loss=sampled_token reads one id a token"
                        raise ConfigError(f"{problem}; set it to null, or method.loss=distribution")
            return self

    @property
    def needs(self) -> Needs:
        """The model itself as a teacher of whole distributions, and rows with privileged information."""
        config = self.config
        return Needs(
            teachers={"teacher": TeacherNeed("dense", config.teacher_mode, ema_decay=config.ema_decay)},
            completions="unused" if config.lmbda == 1 else "required",
            rollouts=config.lmbda > 0,
            fixed_point=True,  # of one prompt: the teacher's own holds more
            surrogate=config.loss == "sampled_token",
            privileged=Privileged(
                template=config.privileged_template,
                bridge=config.bridge_message,
                teacher_prompt=config.teacher_prompt,
                layout=config.layout,
                on_empty=config.on_empty_privileged,
                max_length=config.max_privileged_length,
            ),
        )

    def origin(self, coin: float, kind: Kind) -> Origin:
        """Student with probability λ, else the data."""
        return "student" if coin < self.config.lmbda else "dataset"

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """Σ D_β(teacher, student) / tokens, or Σ -A log π(y) / tokens; the k-th loss tokens of both prompts meet."""
        config, teacher = self.config, teachers["teacher"]
        assert isinstance(teacher, Dense)
        if config.loss == "sampled_token":
            token_loss = objectives.sampled_token_loss(teacher, batch.layout.targets, temperature=config.kd_temperature)
        else:
            token_loss = objectives.divergence_loss(
                teacher,
                beta=config.beta,
                temperature=config.kd_temperature,
                token_clip=config.token_clip,
                top_k=config.top_k,
                agreement=True,
            )
        summed = objectives.sum_over_tokens(student, token_loss, weights=batch.weights)
        names = ("forward_kl", "reverse_kl", "entropy", "clip_fraction", "teacher_student_agreement")
        return Terms([Term(summed.loss, "tokens")], summed.means(*names))

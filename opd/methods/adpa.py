"""Advantage-guided distillation for preference alignment (Gao et al. 2025, arXiv 2502.17927).

L = w_sft NLL(chosen) - w_adpa Σ_a π_θ(a) A(a) at the student's own answer, A = log p_dpo - log p_ref of a teacher after
and before its DPO. The authors' trainer calls that answer `rejected`, and so do the names of weights and metrics; its
other terms (DPO, distillation, KL penalty) are here too, 0 in their recipe. What their released code does otherwise:
advantages bounded to (0, 1) and ids outside the reference teacher's own k filled in (released_quirks); answers stored
without their stop token, whose position then counts with a zero term; the distilled student as reference teacher in the
README; means a sequence (loss_normalization=sequence).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from opd import objectives
from opd.config import MethodConfig, PathStr, PositiveInt
from opd.errors import ConfigError
from opd.protocols import Batch, Dense, Kind, Method, Needs, Origin, Scores, TeacherNeed, Terms, TokenSequence


class ADPA(Method):
    """Moves the student's next-token distributions, at its own prefixes, to where DPO moved the teacher's."""

    class Config(MethodConfig):
        """conf/method/adpa.yaml."""

        name: Literal["adpa"]
        sft_on_chosen: float = Field(ge=0, description="weight of the chosen answers' NLL")
        dpo_weight: float = Field(ge=0, description="of DPO's loss of (chosen, response)")
        distillation_weight: float = Field(ge=0, description="of both divergences from the DPO teacher")
        chosen_distil_weight: float = Field(ge=0, description="of the divergence on chosen tokens")
        rejected_distil_weight: float = Field(ge=0, description="of the divergence on response tokens")
        adpa_weight: float = Field(ge=0, description="of the expected advantage on response tokens")
        kl_penalty_weight: float = Field(ge=0, description="of log π_ref - log π_θ of a response, a pair")
        beta: float = Field(gt=0, description="of DPO's loss")
        label_smoothing: float = Field(ge=0, le=0.5, description="of DPO's loss")
        top_k: PositiveInt | None = Field(description="the DPO teacher's k likeliest ids; null: all ids")
        advantage_clip: tuple[float, float] | None = Field(strict=False, description="bounds of A; null: none")
        released_quirks: bool = Field(description="advantages and bounds as in the authors' code; needs top_k")
        responses: Literal["stored", "student"] = Field(description="the data's, or sampled from the student")
        scores: PathStr | None = Field(description="folder of both teachers' scores; null: the teachers themselves")
        dpo_teacher: PathStr | None = Field(description="folder of the DPO-trained teacher; null: model.teacher")
        ref_teacher: PathStr | None = Field(description="folder of that teacher before its DPO")

        @model_validator(mode="after")
        def _fits_together(self) -> ADPA.Config:
            distil = self.chosen_distil or self.rejected_distil
            if not (self.sft_on_chosen or self.dpo_weight or distil or self.adpa_weight or self.kl_penalty_weight):
                raise ConfigError("method.adpa_weight=0: so is every other weight of the loss; raise one")
            if self.adpa_weight and not self.ref_teacher and not self.scores:
                raise ConfigError(
                    f"method.ref_teacher={self.ref_teacher}: advantages are relative to it; name its folder"
                )
            if self.released_quirks and not self.top_k:
                raise ConfigError("method.top_k=None: method.released_quirks needs one; set it (the authors': 50)")
            if self.scores and (self.responses == "student" or self.released_quirks):
                raise ConfigError(
                    f"method.scores={self.scores}: only for stored responses without released_quirks; set it to null"
                )
            if self.advantage_clip and self.advantage_clip[0] >= self.advantage_clip[1]:
                raise ConfigError(f"method.advantage_clip={list(self.advantage_clip)}: must rise; swap the bounds")
            return self

        @property
        def chosen_distil(self) -> float:
            """Weight of the divergence on chosen tokens in the whole."""
            return self.distillation_weight * self.chosen_distil_weight

        @property
        def rejected_distil(self) -> float:
            """The same on response tokens."""
            return self.distillation_weight * self.rejected_distil_weight

    @property
    def needs(self) -> Needs:
        """The chosen answer and the student's own, and the teachers of those terms that count."""
        config: ADPA.Config = self.config
        form = "any" if config.scores else "dense"
        on_response = config.adpa_weight + config.rejected_distil
        weights: dict[Kind, float] = {"chosen": config.chosen_distil, "response": on_response}
        teachers: dict[str, TeacherNeed] = {}
        asked: tuple[Kind, ...] = tuple(kind for kind, weight in weights.items() if weight)
        if asked:
            online = "method.dpo_teacher" if config.dpo_teacher else "teacher"
            teachers["dpo_teacher"] = TeacherNeed(form, "method.scores" if config.scores else online, asked)
        if config.adpa_weight:
            folder = "method.scores" if config.scores else "method.ref_teacher"
            teachers["ref_teacher"] = TeacherNeed(form, folder, ("response",))
        if config.dpo_weight or config.kl_penalty_weight:
            teachers["reference"] = TeacherNeed("logprobs", "initial")
        return Needs(teachers, sequences=("chosen", "response"), rollouts=config.responses == "student")

    def origin(self, coin: float, kind: Kind) -> Origin:
        """The student's own answer may be sampled afresh; the chosen one is always the data's."""
        return "student" if kind == "response" and self.config.responses == "student" else "dataset"

    def counts(self, sequences: Sequence[TokenSequence]) -> dict[str, float]:
        """Pairs with tokens in both answers."""
        return {"pairs": float(sum(objectives.complete_pairs(sequences)))}

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """NLL and KL / chosen_tokens, KL and -Σ π A / response_tokens, DPO and KL penalty / pairs."""
        config, targets = self.config, batch.layout.targets

        def forward_kl(tokens):
            return objectives.forward_kl_loss(
                teachers["dpo_teacher"].at(tokens), top_k=config.top_k, released_quirks=config.released_quirks
            )

        def advantage(tokens):
            return objectives.expected_advantage_loss(
                targets[tokens],
                teachers["dpo_teacher"].at(tokens),
                teachers["ref_teacher"].at(tokens),
                top_k=config.top_k,
                clip=config.advantage_clip,
                released_quirks=config.released_quirks,
            )

        chosen = {
            "loss_chosen_sft": (
                config.sft_on_chosen,
                lambda tokens: objectives.negative_log_likelihood(targets[tokens]),
            ),
            "loss_chosen_fkl": (config.chosen_distil, forward_kl),
        }
        response = {
            "loss_rejected_fkl": (config.rejected_distil, forward_kl),
            "loss_adpa": (config.adpa_weight, advantage),
        }
        made = objectives.terms_by_kind(
            student, batch, {"chosen": chosen, "response": response}, "expected_advantage", "advantage_on_response"
        )
        if config.dpo_weight or config.kl_penalty_weight:
            pairs = objectives.terms_by_pair(
                objectives.token_logprobs(student, targets),
                batch.token_scores["reference_logprobs"],
                batch.sequences,
                beta=config.beta,
                label_smoothing=config.label_smoothing,
                weight=config.dpo_weight,
                kl_penalty_weight=config.kl_penalty_weight,
            )
            made = Terms(made.terms + pairs.terms, {**made.metrics, **pairs.metrics})
        return made

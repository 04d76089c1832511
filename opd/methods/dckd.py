"""Dual-constrained distillation, the first half of ADPA+ (Gao et al. 2025, arXiv 2502.17927).

L = w_sft NLL(chosen) + w_distil (w_w KL(p ‖ π_θ) on chosen + w_l KL(p ‖ π_θ) on rejected), p a teacher that DPO has
trained; each mean over its own tokens. The authors' released code bounds the student's probabilities from below by 1e-7
and takes its means a sequence (one a device); both can be had: released_quirks, loss_normalization=sequence.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from opd import objectives
from opd.config import MethodConfig, PathStr, PositiveInt
from opd.errors import ConfigError
from opd.protocols import Batch, Dense, Kind, Method, Needs, Scores, TeacherNeed, Terms


class DCKD(Method):
    """Forward KL to a preference-trained teacher on both answers of a pair."""

    class Config(MethodConfig):
        """conf/method/dckd.yaml."""

        name: Literal["dckd"]
        sft_on_chosen: float = Field(ge=0, description="weight of the chosen answers' NLL")
        distillation_weight: float = Field(gt=0, description="of both divergences")
        chosen_distil_weight: float = Field(ge=0, description="of the divergence on chosen tokens")
        rejected_distil_weight: float = Field(ge=0, description="of the divergence on rejected tokens")
        dpo_teacher: PathStr | None = Field(
            description="folder of the DPO-trained teacher or of its scores; null: model.teacher"
        )
        top_k: PositiveInt | None = Field(description="the teacher's k likeliest ids and the rest; null: all ids")
        released_quirks: bool = Field(description="the authors' bounds on probabilities; needs top_k")

        @model_validator(mode="after")
        def _fits_together(self) -> DCKD.Config:
            if not self.chosen_distil_weight and not self.rejected_distil_weight:
                raise ConfigError(
                    "method.chosen_distil_weight=0: so is rejected_distil_weight; raise one, or method=sft"
                )
            if self.released_quirks and not self.top_k:
                raise ConfigError("method.top_k=None: method.released_quirks needs one; set it (the authors': 50)")
            return self

    @property
    def needs(self) -> Needs:
        """Pairs, and a teacher's distributions on the answers that are distilled."""
        config: DCKD.Config = self.config
        weights: dict[Kind, float] = {"chosen": config.chosen_distil_weight, "rejected": config.rejected_distil_weight}
        teacher = TeacherNeed(
            "any",
            "method.dpo_teacher" if config.dpo_teacher else "teacher",
            kinds=tuple(kind for kind, weight in weights.items() if weight),
        )
        only_distils = config.sft_on_chosen == 0 and not config.released_quirks  # bounds have a gradient of their own
        return Needs({"dpo_teacher": teacher}, sequences=("chosen", "rejected"), fixed_point=only_distils)

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """(w_sft Σ NLL + w Σ KL) / chosen_tokens + w Σ KL / rejected_tokens."""
        config, targets = self.config, batch.layout.targets

        def forward_kl(tokens):
            teacher = teachers["dpo_teacher"].at(tokens)
            return objectives.forward_kl_loss(teacher, top_k=config.top_k, released_quirks=config.released_quirks)

        distil = config.distillation_weight
        chosen = {
            "loss_chosen_sft": (
                config.sft_on_chosen,
                lambda tokens: objectives.negative_log_likelihood(targets[tokens]),
            ),
            "loss_chosen_fkl": (distil * config.chosen_distil_weight, forward_kl),
        }
        rejected = {"loss_rejected_fkl": (distil * config.rejected_distil_weight, forward_kl)}
        return objectives.terms_by_kind(student, batch, {"chosen": chosen, "rejected": rejected})

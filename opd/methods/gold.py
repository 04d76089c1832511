"""Distillation across tokenizers (Patiño et al. 2025, "Unlocking On-Policy Distillation for Any Model Family"; GOLD).

The teacher reads the same text in its own template and tokens. Tokens are grouped where both tokenizations end at the
same byte, each group's distributions are merged, and their distance is ULD (Boizard et al. 2024, arXiv 2402.12030) or
the hybrid of it: L = distill_weight · mean over sequences of (Σ_groups distance / groups) + ce_weight · NLL.
With one tokenizer it is gkd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from opd import objectives
from opd.config import Fraction, MethodConfig
from opd.errors import ConfigError
from opd.protocols import (
    Batch,
    Dense,
    Kind,
    Method,
    Needs,
    Origin,
    Scores,
    TeacherNeed,
    Term,
    Terms,
    TextAlignment,
    TokenSequence,
)

if TYPE_CHECKING:
    from opd.objectives import VocabularyMatch


class GOLD(Method):
    """Divergence to a teacher that may have another tokenizer."""

    class Config(MethodConfig):
        """conf/method/gold.yaml."""

        name: Literal["gold"]
        beta: Fraction = Field(description="0: forward KL, 1: reverse KL, between: generalised Jensen-Shannon")
        lmbda: Fraction = Field(description="share of rows completed by the student")
        seq_kd: bool = Field(description="complete the other rows with the teacher; only with one tokenizer")
        kd_temperature: float = Field(gt=0, description="divides both models' logits in the loss")
        teacher_temperature: float | None = Field(gt=0, description="the teacher's own, in ULD; null: kd_temperature")
        use_uld_loss: bool | None = Field(description="null: where the tokenizers differ")
        extended: bool = Field(description="pair tokens by the bytes they spell; false: by position")
        merge: Literal["bayesian", "observed"] = Field(description="how tokens become one distribution")
        hybrid: bool = Field(description="D_β on the tokens that both vocabularies have, ULD on the others")
        matched_weight: float | None = Field(ge=0, description="hybrid: of D_β; null: matched share of the teacher's")
        unmatched_weight: float | None = Field(ge=0, description="hybrid: of ULD; null: 1 - matched_weight")
        skip_student_eos: bool = Field(description="leave the student's stop token out of the comparison")
        skip_teacher_eos: bool = Field(description="leave the teacher's stop token out of the comparison")
        ce_weight: float = Field(ge=0, description="of the NLL of the completion")
        distill_weight: float = Field(ge=0, description="of the distillation loss")

        @model_validator(mode="after")
        def _weights_fit(self) -> GOLD.Config:
            """Raises ConfigError for settings that contradict each other."""
            if self.merge == "observed" and self.ce_weight > 0 and self.use_uld_loss is not False:
                problem = f"method.ce_weight={self.ce_weight}: method.merge=observed reads scores one position late"
                raise ConfigError(f"{problem}, where NLL has none; set it to 0, or method.merge=bayesian")
            if (self.matched_weight is None) != (self.unmatched_weight is None):
                problem = f"method.matched_weight={self.matched_weight}: unmatched_weight is {self.unmatched_weight}"
                raise ConfigError(f"{problem}; give both a number, or both null")
            return self

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._uses_uld: bool = config.use_uld_loss is not False  # as long as the tokenizers are not known
        self.match: VocabularyMatch | None = None

    def prepare(self, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        """Learn the vocabularies, and whether ULD is used. Raises ConfigError for what it cannot be used with."""
        config = self.config
        if config.use_uld_loss is None:
            self._uses_uld = student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab()
        own_temperature = config.teacher_temperature not in (None, config.kd_temperature)
        if not self._uses_uld and own_temperature:
            problem = f"method.teacher_temperature={config.teacher_temperature}: without ULD both models have one"
            raise ConfigError(f"{problem}; set it to null, or method.use_uld_loss=true")
        if self._uses_uld and config.seq_kd:
            problem = "method.seq_kd=true: the teacher's samples are not in the student's tokens"
            raise ConfigError(f"{problem}; set it to false, with method.lmbda=1 or completions in the data")
        if self._uses_uld and config.loss_normalization in ("sum", "constant"):
            problem = f"method.loss_normalization={config.loss_normalization}: ULD is a mean over sequences"
            raise ConfigError(f"{problem}; set it to token, or scale with method.distill_weight")
        self.match = objectives.VocabularyMatch.between(student_tokenizer, teacher_tokenizer)

    @property
    def needs(self) -> Needs:
        """A teacher's whole distributions, over its own tokens where ULD is used (known after `prepare`)."""
        config = self.config
        alignment = TextAlignment(config.extended, config.skip_student_eos, config.skip_teacher_eos)
        return Needs(
            teachers={"teacher": TeacherNeed("dense")},
            completions="unused" if config.lmbda == 1 or config.seq_kd else "required",
            rollouts=config.lmbda > 0 or config.seq_kd,
            alignment=alignment if self._uses_uld else None,
            label_states=self._uses_uld and config.merge == "observed",
            fixed_point=not self._uses_uld and config.ce_weight == 0,
        )

    def origin(self, coin: float, kind: Kind) -> Origin:
        """Student with probability λ; the rest from the teacher (seq_kd) or the data."""
        if coin < self.config.lmbda:
            return "student"
        return "teacher" if self.config.seq_kd else "dataset"

    def counts(self, sequences: Sequence[TokenSequence]) -> dict[str, float]:
        """ULD is a mean over all sequences; one without groups adds 0."""
        return {"sequences": float(len(sequences))}

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """ULD over the groups where it is used, else gkd's divergence; and the NLL if it counts."""
        config, teacher = self.config, teachers["teacher"]
        if self._uses_uld:
            terms = self._uld(student, teacher, batch)
        else:
            divergence = objectives.divergence_loss(teacher, beta=config.beta, temperature=config.kd_temperature)
            summed = objectives.sum_over_tokens(student, divergence, weights=batch.weights)
            metrics = summed.means("forward_kl", "reverse_kl", "entropy")
            terms = Terms([Term(summed.loss, "tokens", config.distill_weight)], metrics)
        if config.ce_weight > 0:
            nll = objectives.negative_log_likelihood(batch.layout.targets)
            summed = objectives.sum_over_tokens(student, nll, weights=batch.weights)
            terms.terms.append(Term(summed.loss, "tokens", config.ce_weight))
            terms.metrics["nll"] = (summed.values.sum(), len(summed.values))
        return terms

    def _uld(self, student: Dense, teacher: Scores, batch: Batch) -> Terms:
        assert isinstance(teacher, Dense)
        config, tokens = self.config, len(student.hidden)
        grouped = objectives.GroupedTokens.of(batch.alignments["teacher"])
        distance = objectives.sorted_distance
        if config.hybrid:
            assert self.match is not None
            distance = objectives.hybrid_distance(
                self.match,
                beta=config.beta,
                matched_weight=config.matched_weight,
                unmatched_weight=config.unmatched_weight,
            )
        loss = objectives.grouped_loss(
            grouped.groups,
            distance,
            targets=batch.layout.targets,
            teacher=teacher,
            teacher_targets=batch.views["teacher"].targets,
            merge=config.merge,
            student_temperature=config.kd_temperature,
            teacher_temperature=config.teacher_temperature or config.kd_temperature,
        )
        weights = grouped.token_weights(student.hidden, tokens)
        summed = objectives.sum_over_tokens(student, loss, weights=weights, cuts=grouped.cuts(tokens))
        sequences, groups = len(batch.sequences), len(grouped.groups)
        metrics = {name: ((column * weights).sum(), sequences) for name, column in summed.metrics.items()}
        return Terms(
            [Term(summed.loss, "sequences", config.distill_weight)],
            {
                **metrics,
                "aligned_groups": (groups, sequences),
                "multi_token_group_fraction": (grouped.num_merged, groups),
                "dropped_pairs": (grouped.num_dropped, sequences),
            },
        )

"""MiniLLM (Gu et al. 2024, arXiv 2306.08543): reverse KL over sequences, part policy gradient and part exact.

L = -(1/N) Σ_t min(ρ_t A_t, clip(ρ_t) A_t) + (1/N) Σ_t KL(π_θ(·|y_<t) ‖ p(·|y_<t)), with A of what later tokens bring in
log p(y) - log π_old(y). Both models' logits are divided by kd_temperature everywhere; A and π_old are constants.

mode=trl: A_t is the discounted mean of r from token t on. mode=paper: from t+1 on (r_t is the exact term's), tokens
drawn from (1-α) π + α p and weighted by π_old / p̃. mode=lmops: the authors' code, which counts r_t in both terms,
divides by the number of remaining tokens whatever γ is, clips the whole π_θ / p̃, and whitens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from opd import objectives
from opd.config import Fraction, MethodConfig, PositiveInt
from opd.protocols import Batch, Dense, Kind, Method, Needs, Origin, Scores, TeacherNeed, Term, Terms, TokenSequence

if TYPE_CHECKING:
    from torch import Tensor

_MODES: dict[str, dict[str, Any]] = {  # what null stands for
    "trl": {"gamma": 0.0, "teacher_mix": 0.0, "reward_scaling": 1.0, "whiten": False},
    "paper": {"gamma": 1.0, "teacher_mix": 0.2, "reward_scaling": 1.0, "whiten": False, "clip_epsilon": 0.2},
    "lmops": {
        "gamma": 0.95,
        "teacher_mix": 0.2,
        "reward_scaling": 0.5,
        "whiten": True,
        "clip_epsilon": 0.2,
        "reward_clip": 100.0,
    },
}


class MiniLLM(Method):
    """Policy gradient on the student's (or a teacher-mixed) samples, the exact per-token KL, and a corpus loss."""

    class Config(MethodConfig):
        """conf/method/minillm.yaml."""

        name: Literal["minillm"]
        mode: Literal["trl", "paper", "lmops"] = Field(description="whose advantage, and what null stands for below")
        rkl_advantage: bool = Field(description="the policy-gradient term")
        single_step_decomposition: bool = Field(description="the exact per-token reverse KL term")
        use_distribution_distillation: bool | None = Field(description="another name of single_step_decomposition")
        gamma: Fraction | None = Field(description="γ: how much later tokens' rewards count")
        length_normalization: bool = Field(description="divide what a token is credited with by what is left of it")
        kd_temperature: float = Field(gt=0, description="divides both models' logits in every term")
        clip_epsilon: float | None = Field(gt=0, lt=1, description="PPO's clip of the importance ratio")
        num_substeps: PositiveInt = Field(description="optimizer steps a batch of rollouts is split into")
        teacher_mix: float | None = Field(ge=0, lt=1, description="α: the teacher's share of the rollouts' sampler")
        reward_scaling: float | None = Field(gt=0, description="divides the reward")
        reward_clip: float | None = Field(gt=0, description="bounds the scaled reward on both sides; null: none")
        whiten: bool | None = Field(description="advantages to mean 0 and deviation 1 over the step's loss tokens")
        lm_coef: float | None = Field(gt=0, description="weight of the loss on the data's completions; null: off")
        kd_ratio: Fraction = Field(description="share of the teacher's distribution in that loss; the rest: the data's")

        @model_validator(mode="before")
        @classmethod
        def _fill_in(cls, data: Any) -> Any:
            """The mode's values where the config says null, so that a run's folder shows what was used."""
            if not isinstance(data, dict):
                return data
            defaults = dict(_MODES.get(str(data.get("mode")), {}))
            if data.get("num_substeps", 1) != 1:
                defaults.setdefault("clip_epsilon", 0.2)
            if (alias := data.get("use_distribution_distillation")) is not None:
                data = {**data, "single_step_decomposition": alias}
            return {**data, **{key: value for key, value in defaults.items() if data.get(key) is None}}

        @field_validator("single_step_decomposition")
        @classmethod
        def _some_term(cls, value: bool, info: ValidationInfo) -> bool:
            if not value and info.data.get("rkl_advantage") is False:
                raise PydanticCustomError(
                    "no_term", "method.rkl_advantage is false too, so nothing is left to learn; set one of them to true"
                )
            return value

    @property
    def needs(self) -> Needs:
        """Rollouts; the teacher's distributions unless only the policy gradient is on; a completion for the corpus."""
        config = self.config
        only_tokens = not (config.single_step_decomposition or config.teacher_mix or config.lm_coef)
        return Needs(
            teachers={"teacher": TeacherNeed("logprobs" if only_tokens else "dense")},
            sequences=("response", "single") if config.lm_coef else ("single",),
            completions="required" if config.lm_coef else "unused",
            rollouts=True,
            teacher_share=config.teacher_mix,
            window=config.rkl_advantage,
            window_temperature=config.kd_temperature,
            num_substeps=config.num_substeps,
            fixed_point=not config.lm_coef or config.kd_ratio == 1,
        )

    @property
    def _rollout_kind(self) -> Kind:
        return "response" if self.config.lm_coef else "single"

    @property
    def _joint_ratio(self) -> bool:
        """Whether the clip is of π_θ / p̃ = π_θ / π_old · π_old / p̃, for which the sampler is the old policy."""
        return self.config.mode == "lmops" and self.config.teacher_mix > 0

    def origin(self, coin: float, kind: Kind) -> Origin:
        """The student, mixed with the teacher if α > 0; beside it, the data for the corpus loss."""
        if kind != self._rollout_kind:
            return "dataset"
        return "mixture" if self.config.teacher_mix else "student"

    def notes(self) -> list[str]:
        """Settings that are legal and surprising."""
        config, notes = self.config, []
        both = config.rkl_advantage and config.single_step_decomposition
        if config.use_distribution_distillation is not None:
            notes.append("method.use_distribution_distillation is read as method.single_step_decomposition")
        if both and config.gamma == 0 and config.mode != "paper":
            notes.append(
                "method.gamma=0 with rkl_advantage and single_step_decomposition counts each token's reverse KL twice; "
                "turn one of them off or set method.gamma above 0"
            )
        if config.mode == "paper" and not both:
            notes.append(
                "method.mode=paper splits the gradient over both terms; with one of them off a part is missing"
            )
        if config.mode == "paper" and not config.lm_coef:
            notes.append("method.lm_coef=null: the paper's loss on a corpus is off; set it and give completions")
        return notes

    def window(self, sequences: Sequence[TokenSequence], total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Set "advantages" of every rollout; centring and the metrics are over all loss tokens of all ranks."""
        config = self.config
        rollouts = [sequence for sequence in sequences if sequence.kind == self._rollout_kind]
        student, mask = _padded(rollouts, "student_logprobs")
        teacher, _ = _padded(rollouts, "teacher_logprobs")
        sampler = _padded(rollouts, "sampler_logprobs")[0] if config.teacher_mix else student
        rewards = objectives.log_ratio_rewards(
            student, teacher, mask, scaling=config.reward_scaling, clip=config.reward_clip
        )
        advantages = objectives.minillm_advantages(
            rewards,
            mask,
            discount=config.gamma,
            length_normalization=config.length_normalization,
            mode=config.mode,
        )
        if config.whiten:
            advantages = objectives.whiten(advantages, mask, total)
        weights = (student - sampler).exp()
        _scatter(sequences, rollouts, advantages if self._joint_ratio else advantages * weights)
        mean, std = objectives.mean_and_std(advantages, mask, total)
        metrics = {
            "advantage_mean": mean,
            "advantage_std": std,
            "is_weight_mean": objectives.mean_and_std(weights, mask, total)[0],
        }
        if not config.single_step_decomposition:  # which gives the exact one
            metrics["reverse_kl"] = objectives.mean_and_std(weights * (student - teacher), mask, total)[0]
        return metrics

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """(Σ -min(ρA, clip(ρ)A) + Σ KL(π_θ ‖ p)) / rollouts' tokens, and lm_coef · Σ of the corpus / its tokens."""
        config, kind = self.config, self._rollout_kind
        tokens, parts = batch.tokens_of(kind), {}
        if config.rkl_advantage:
            scores = {name: column[tokens] for name, column in batch.token_scores.items()}
            policy_gradient = objectives.policy_gradient_loss(
                batch.layout.targets[tokens],
                scores["advantages"],
                old_logprobs=scores["sampler_logprobs" if self._joint_ratio else "student_logprobs"],
                clip_epsilon=config.clip_epsilon,
                temperature=config.kd_temperature,
            )
            parts["loss_pg"] = (1.0, policy_gradient)
        if config.single_step_decomposition:
            single_step = objectives.divergence_loss(
                teachers["teacher"].at(tokens), beta=1.0, temperature=config.kd_temperature
            )
            parts["loss_single_step"] = (1.0, single_step)
        summed = objectives.sum_over_tokens(
            student.at(tokens), objectives.weighted_sum(parts), weights=batch.weights_of(tokens)
        )
        metrics = summed.means("loss_pg", "loss_single_step", "reverse_kl", "entropy", "ratio_mean", "clip_fraction")
        terms = Terms([Term(summed.loss, "tokens" if kind == "single" else f"{kind}_tokens")], metrics)
        return self._with_corpus(terms, student, teachers, batch) if config.lm_coef else terms

    def _with_corpus(self, terms: Terms, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """The corpus: (1 - κ) · -log π_θ(y_t) + κ · KL(p ‖ π_θ), the cross-entropy to the teacher less its entropy."""
        config, tokens = self.config, batch.tokens_of("single")
        data = objectives.negative_log_likelihood(batch.layout.targets[tokens])
        teacher = objectives.divergence_loss(
            teachers["teacher"].at(tokens), beta=0.0, temperature=config.kd_temperature
        )
        mixed = objectives.weighted_sum(
            {"loss_lm_data": (1 - config.kd_ratio, data), "loss_lm_teacher": (config.kd_ratio, teacher)}
        )
        summed = objectives.sum_over_tokens(student.at(tokens), mixed, weights=batch.weights_of(tokens))
        metrics = summed.means("loss_lm_data", "loss_lm_teacher", "entropy")
        (ours, rollouts), (its, corpus) = terms.metrics["entropy"], metrics["entropy"]
        metrics["entropy"] = (ours + its, rollouts + corpus)
        return Terms([*terms.terms, Term(summed.loss, "single_tokens", config.lm_coef)], {**terms.metrics, **metrics})


def _padded(sequences: Sequence[TokenSequence], name: str) -> tuple[Tensor, Tensor]:
    return objectives.pad_rows([sequence.token_scores[name] for sequence in sequences])


def _scatter(sequences: Sequence[TokenSequence], rollouts: Sequence[TokenSequence], advantages: Tensor) -> None:
    """Give each rollout its row of "advantages", and the others zeros."""
    for sequence in sequences:
        logprobs = sequence.token_scores["student_logprobs"]
        sequence.token_scores["advantages"] = logprobs.new_zeros(len(logprobs))
    for sequence, row in zip(rollouts, advantages, strict=True):
        sequence.token_scores["advantages"] = row[: len(sequence.token_scores["advantages"])]

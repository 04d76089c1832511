"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): L = -mean over pairs of log σ(h).

h = β (log π_θ/π_ref of the chosen answer - the same of the rejected one), log π(y|x) summed over the answer's tokens,
its stop token included; π_ref is the student as it was before training. TRL's "sigmoid" does not read label_smoothing;
here it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from opd import objectives
from opd.config import MethodConfig
from opd.errors import ConfigError
from opd.protocols import Batch, Dense, Method, Needs, Scores, TeacherNeed, Term, Terms, TokenSequence


class DPO(Method):
    """Raises the chosen answer's log-probability over the rejected one's, held by a reference."""

    class Config(MethodConfig):
        """conf/method/dpo.yaml."""

        name: Literal["dpo"]
        beta: float = Field(gt=0, description="how strongly the reference holds; the reward's scale")
        label_smoothing: float = Field(ge=0, le=0.5, description="share of pairs taken for mislabelled (cDPO)")
        average_log_prob: bool = Field(description="mean instead of sum over an answer's tokens")
        reference_free: bool = Field(description="leave the reference out: π_ref constant")
        sft_weight: float = Field(ge=0, description="of the chosen answers' NLL per token, beside the pair loss")
        precompute_reference: bool = Field(description="score the reference once, before training, and keep it")
        sanity_check: bool = Field(description="only the first 100 rows")
        loss_normalization: Literal["pair"] = "pair"

        @model_validator(mode="after")
        def _fits_together(self) -> DPO.Config:
            if self.precompute_reference and self.reference_free:
                raise ConfigError(
                    "method.precompute_reference=True: method.reference_free leaves none; set one to false"
                )
            return self

    @property
    def needs(self) -> Needs:
        """Pairs, and the initial student's log-probability of each token."""
        config = self.config
        reference = TeacherNeed("logprobs", "initial", precompute=config.precompute_reference)
        return Needs(
            teachers={} if config.reference_free else {"reference": reference},
            sequences=("chosen", "rejected"),
            rows=100 if config.sanity_check else None,
        )

    def counts(self, sequences: Sequence[TokenSequence]) -> dict[str, float]:
        """Pairs with tokens in both answers."""
        return {"pairs": float(sum(objectives.complete_pairs(sequences)))}

    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """Σ pair loss / pairs + sft_weight · Σ -log π_θ of chosen tokens / chosen_tokens."""
        config = self.config
        logprobs = objectives.token_logprobs(student, batch.layout.targets)
        reference = (
            logprobs.new_zeros(len(logprobs)) if config.reference_free else batch.token_scores["reference_logprobs"]
        )
        made = objectives.terms_by_pair(
            logprobs,
            reference,
            batch.sequences,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            average=config.average_log_prob,
        )
        if config.sft_weight:
            nll = -logprobs[batch.tokens_of("chosen")]
            made.terms.append(Term(nll.sum(), "chosen_tokens", config.sft_weight))
            made.metrics["loss_chosen_sft"] = (nll.detach().sum(), len(nll))
        return made

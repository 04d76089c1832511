"""Dpo, dckd and adpa."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pieces import Evaluator, method, rows, sequences, spread
from torch import Tensor

from opd import objectives
from opd.data.collate import lay_out
from opd.protocols import Batch, Kind, Method, Scores, TokenSequence

_ADPA = {
    "sft_on_chosen": 0.0,
    "dpo_weight": 0.0,
    "distillation_weight": 0.0,
    "chosen_distil_weight": 0.0,
    "rejected_distil_weight": 0.0,
    "adpa_weight": 1.0,
    "kl_penalty_weight": 0.0,
    "beta": 0.1,
    "label_smoothing": 0.0,
    "responses": "stored",
    "scores": None,
    "dpo_teacher": None,
    "ref_teacher": "folder",
}


def _of_kind(kind: Kind, labels: Tensor) -> list[TokenSequence]:
    return [replace(sequence, kind=kind) for sequence in sequences(labels)[0]]


def _loss_and_grad(method: Method, kind: Kind, tensors: dict[str, Tensor], *teachers: str) -> dict[str, Tensor]:
    """The method's only term, over sequences of one kind and their tokens, and its gradient."""
    made = _of_kind(kind, tensors["in_labels"])
    layout = lay_out([sequence.student_view for sequence in made], pad_id=0)
    leaf = tensors["in_student_logits"].clone().requires_grad_()
    scores: dict[str, Scores] = {name: rows(tensors[f"in_{name}_logits"], layout) for name in teachers}
    (term,) = method.loss(rows(leaf, layout), scores, Batch(made, layout)).terms
    assert term.count == f"{kind}_tokens"
    loss = term.weight * term.sum / len(layout.targets)
    loss.backward()
    return {"out_loss": loss, "out_kl": loss, "out_grad": leaf.grad}


def _dpo(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = method(
        "dpo",
        beta=params["beta"],
        label_smoothing=params["label_smoothing"],
        average_log_prob=params["average_log_prob"],
        reference_free=False,
        sft_weight=0.0,
        precompute_reference=False,
        sanity_check=False,
    )
    answers = zip(
        _of_kind("chosen", tensors["in_chosen_labels"]),
        _of_kind("rejected", tensors["in_rejected_labels"]),
        strict=True,
    )
    made = [sequence for pair in answers for sequence in pair]
    layout = lay_out([sequence.student_view for sequence in made], pad_id=0)

    def interleaved(prefix: str) -> Tensor:
        both = [tensors[f"in_{prefix}chosen_logits"], tensors[f"in_{prefix}rejected_logits"]]
        return torch.stack(both, dim=1).flatten(0, 1)

    leaf = interleaved("").requires_grad_()
    student = rows(leaf, layout)
    reference = objectives.token_logprobs(rows(interleaved("ref_"), layout), layout.targets)
    batch = Batch(made, layout, token_scores={"reference_logprobs": reference})
    terms = ours.loss(student, {}, batch)
    (term,) = terms.terms
    loss = term.weight * term.sum / ours.counts(made)[term.count]
    loss.backward()
    average = params["average_log_prob"]
    policy = objectives.pair_logprobs(objectives.token_logprobs(student, layout.targets), made, average=average)
    held = objectives.pair_logprobs(reference, made, average=average)
    losses = objectives.pair_loss(policy, held, beta=params["beta"], label_smoothing=params["label_smoothing"])
    rewards = params["beta"] * (policy - held)
    means = {name: torch.as_tensor(top) / bottom for name, (top, bottom) in terms.metrics.items()}
    return {
        "out_chosen_logps": policy[:, 0],
        "out_rejected_logps": policy[:, 1],
        "out_ref_chosen_logps": held[:, 0],
        "out_ref_rejected_logps": held[:, 1],
        "out_losses": losses,
        "out_loss": loss,
        "out_chosen_rewards": rewards[:, 0],
        "out_rejected_rewards": rewards[:, 1],
        "out_accuracy": means["accuracy"],
        "out_reward_margin": means["reward_margin"],
        "out_grad_chosen": leaf.grad[::2],
        "out_grad_rejected": leaf.grad[1::2],
    }


def _dckd(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = method(
        "dckd",
        sft_on_chosen=0.0,
        distillation_weight=1.0,
        chosen_distil_weight=1.0,
        rejected_distil_weight=0.0,
        dpo_teacher=None,
        top_k=params["top_k"],
        released_quirks=params["top_k"] is not None,
    )
    return _loss_and_grad(
        ours, "chosen", tensors | {"in_dpo_teacher_logits": tensors["in_teacher_logits"]}, "dpo_teacher"
    )


def _adpa(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = method(
        "adpa", **_ADPA, top_k=params["top_k"], advantage_clip=params["advantage_clip"], released_quirks=False
    )
    _, layout = sequences(tensors["in_labels"])
    student, dpo_teacher, ref_teacher = (
        rows(tensors[f"in_{name}_logits"], layout) for name in ("student", "dpo_teacher", "ref_teacher")
    )
    loss = objectives.expected_advantage_loss(layout.targets, dpo_teacher, ref_teacher, top_k=params["top_k"])
    on_response = objectives.sum_over_tokens(student, loss).metrics["advantage_on_response"]
    return {
        **_loss_and_grad(ours, "response", tensors, "dpo_teacher", "ref_teacher"),
        "out_advantage_on_label": spread(on_response, layout, tensors["in_student_logits"]),
    }


def _adpa_released(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = method("adpa", **_ADPA, top_k=params["top_k"], advantage_clip=None, released_quirks=True)
    return _loss_and_grad(ours, "response", tensors, "dpo_teacher", "ref_teacher")


EVALUATORS: dict[str, Evaluator] = {"dpo": _dpo, "dckd": _dckd, "adpa": _adpa, "adpa_released": _adpa_released}

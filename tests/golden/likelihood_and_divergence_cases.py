"""sft, gkd and reverse_kl."""

from __future__ import annotations

from typing import Any

import torch
from pieces import Evaluator, loss_and_grad, method, rows, sequences, spread
from torch import Tensor

from opd import objectives
from opd.protocols import Batch


def _sft(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = method("sft", loss_on="assistant")
    made, layout = sequences(tensors["in_labels"])
    return loss_and_grad(ours, tensors["in_logits"], {}, Batch(made, layout), params.get("num_items"))


def _gkd(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    beta, temperature = params["beta"], params["temperature"]
    ours = method("gkd", beta=beta, lmbda=0.0, seq_kd=False, kd_temperature=temperature)
    made, layout = sequences(tensors["in_labels"])
    vocab_size = params.get("shared_vocab")
    teacher = rows(tensors["in_teacher_logits"], layout, vocab_size)
    student = tensors["in_student_logits"]
    outputs = loss_and_grad(ours, student, {"teacher": teacher}, Batch(made, layout), params["num_items"], vocab_size)
    per_token = objectives.sum_over_tokens(
        rows(student, layout, vocab_size),
        objectives.divergence_loss(teacher, beta=beta, temperature=temperature),
    ).values
    return {**outputs, "out_per_token": spread(per_token, layout, student)}


def _reverse_kl(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = method(
        "reverse_kl",
        kl_coef=params["kl_coef"],
        kl_discount=params["kl_discount"],
        importance_ratio=params["importance_ratio"],
        center_advantages=params.get("center_advantages", False),
        clip_epsilon=None,
        num_substeps=1,
    )
    made, layout = sequences(tensors["in_labels"], tensors["in_tokens"])
    student, old = tensors["in_student_logits"], tensors["in_old_logps"]
    teacher = objectives.token_logprobs(rows(tensors["in_teacher_logits"], layout), layout.targets)
    for row, sequence in enumerate(made):
        mine = layout.owner == row
        positions = layout.predictors[mine] - row * student.shape[1]
        sequence.token_scores = {"student_logprobs": old[row, positions], "teacher_logprobs": teacher[mine]}
    metrics = ours.window(made, lambda tensor: tensor)
    scores = {name: torch.cat([sequence.token_scores[name] for sequence in made]) for name in made[0].token_scores}
    outputs = loss_and_grad(ours, student, {}, Batch(made, layout, token_scores=scores), None)
    advantages = spread(scores["advantages"], layout, student)
    reverse_kl = torch.tensor(metrics["reverse_kl"], dtype=student.dtype)
    return {**outputs, "out_advantages_masked": advantages, "out_reverse_kl": reverse_kl}


def _discount(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"out_y": objectives.discounted_future_sum(tensors["in_x"], params["gamma"])}


EVALUATORS: dict[str, Evaluator] = {"sft": _sft, "gkd": _gkd, "reverse_kl": _reverse_kl, "discount": _discount}

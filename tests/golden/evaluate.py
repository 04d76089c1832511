"""Reproduces a golden case with the code that trains: the same methods, layouts and fused sums.

A case is an entry of MANIFEST.json; its arrays are named in_* and out_*. Labels and tokens are not shifted: -100
marks a token that is not a target, and the logits at position t - 1 score the label at t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd import objectives
from opd.data.collate import lay_out
from opd.methods import METHODS
from opd.protocols import Batch, Dense, Head, Layout, Method, Scores, TokenSequence

Arrays = dict[str, np.ndarray]
IGNORED = -100


def covered(case: dict[str, Any]) -> bool:
    """Whether the method of this case is built; a case that is not covered has not passed."""
    return case["method"] in _EVALUATORS


def evaluate(case: dict[str, Any], inputs: Arrays) -> Arrays:
    """The outputs of the case, in the dtype of its inputs."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items() if name.startswith("in_")}
    outputs = _EVALUATORS[case["method"]](case["params"], tensors)
    return {name: outputs[name].detach().numpy() for name in case["outputs"]}


def _sft(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    method = _method("sft", loss_on="assistant")
    sequences, layout = _sequences(tensors["in_labels"])
    return _loss_and_grad(method, tensors["in_logits"], {}, Batch(sequences, layout), params.get("num_items"))


def _gkd(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    beta, temperature = params["beta"], params["temperature"]
    method = _method("gkd", beta=beta, lmbda=0.0, seq_kd=False, kd_temperature=temperature)
    sequences, layout = _sequences(tensors["in_labels"])
    vocab_size = params.get("shared_vocab")
    teacher = _rows(tensors["in_teacher_logits"], layout, vocab_size)
    student = tensors["in_student_logits"]
    outputs = _loss_and_grad(
        method, student, {"teacher": teacher}, Batch(sequences, layout), params["num_items"], vocab_size
    )
    per_token = objectives.sum_over_tokens(
        _rows(student, layout, vocab_size),
        objectives.divergence_loss(teacher, beta=beta, temperature=temperature),
    ).values
    return {**outputs, "out_per_token": _spread(per_token, layout, student)}


def _reverse_kl(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    method = _method(
        "reverse_kl",
        kl_coef=params["kl_coef"],
        kl_discount=params["kl_discount"],
        importance_ratio=params["importance_ratio"],
        center_advantages=params.get("center_advantages", False),
        clip_epsilon=None,
        num_substeps=1,
    )
    sequences, layout = _sequences(tensors["in_labels"], tensors["in_tokens"])
    student, old = tensors["in_student_logits"], tensors["in_old_logps"]
    teacher = objectives.token_logprobs(_rows(tensors["in_teacher_logits"], layout), layout.targets)
    for row, sequence in enumerate(sequences):
        mine = layout.owner == row
        positions = layout.predictors[mine] - row * student.shape[1]
        sequence.token_scores = {"student_logprobs": old[row, positions], "teacher_logprobs": teacher[mine]}
    metrics = method.window(sequences, lambda tensor: tensor)
    scores = {
        name: torch.cat([sequence.token_scores[name] for sequence in sequences]) for name in sequences[0].token_scores
    }
    outputs = _loss_and_grad(method, student, {}, Batch(sequences, layout, token_scores=scores), None)
    advantages = _spread(scores["advantages"], layout, student)
    reverse_kl = torch.tensor(metrics["reverse_kl"], dtype=student.dtype)
    return {**outputs, "out_advantages_masked": advantages, "out_reverse_kl": reverse_kl}


def _discount(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"out_y": objectives.discounted_future_sum(tensors["in_x"], params["gamma"])}


_EVALUATORS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]]] = {
    "sft": _sft,
    "gkd": _gkd,
    "reverse_kl": _reverse_kl,
    "discount": _discount,
}


def _method(name: str, **settings: Any) -> Method:
    method = METHODS[name]
    return method(method.Config(name=name, **settings))


def _sequences(labels: Tensor, tokens: Tensor | None = None) -> tuple[list[TokenSequence], Layout]:
    """Sequences and layout as training makes them: a completion starts at the first target."""
    ids = labels.clamp(min=0) if tokens is None else tokens
    rows, length = labels.shape
    is_target = labels != IGNORED
    sequences = []
    for row in range(rows):
        start = int(is_target[row].nonzero()[0]) if is_target[row].any() else length
        sequence = ids[row].tolist()
        sequences.append(TokenSequence(row, sequence[:start], sequence[start:], is_target[row, start:].tolist()))
    return sequences, lay_out([sequence.student_view for sequence in sequences], pad_id=0)


def _rows(logits: Tensor, layout: Layout, vocab_size: int | None = None) -> Dense:
    return Dense(logits.flatten(0, 1)[layout.predictors], Head(None, vocab_size=vocab_size))


def _loss_and_grad(
    method: Method,
    logits: Tensor,
    teachers: dict[str, Scores],
    batch: Batch,
    num_items: int | None,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Σ weight · sum / count, and its gradient with respect to all the logits. No tokens: 0 / 1."""
    leaf = logits.clone().requires_grad_()
    terms = method.loss(_rows(leaf, batch.layout, vocab_size), teachers, batch).terms
    tokens = sum(sequence.num_loss_tokens for sequence in batch.sequences)
    counts = {"tokens": num_items or tokens or 1, **method.counts(batch.sequences)}
    loss = sum(term.weight * term.sum / counts[term.count] for term in terms)
    loss.backward()
    return {
        "out_loss": loss,
        "out_loss_sum": sum(term.weight * term.sum for term in terms),
        "out_grad": leaf.grad,
        "out_n_tokens": torch.tensor(tokens, dtype=logits.dtype),
    }


def _spread(values: Tensor, layout: Layout, logits: Tensor) -> Tensor:
    """Values of the loss tokens at their predictors' positions, 0 elsewhere: (rows, length - 1)."""
    rows, length = logits.shape[:2]
    spread = values.new_zeros(rows * length)
    spread[layout.predictors] = values
    return spread.view(rows, length)[:, :-1]

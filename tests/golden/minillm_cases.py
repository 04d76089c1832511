"""Minillm, as TRL and as the paper's authors have it.

Tokens are not shifted here: the logits at position t score the token at t.
"""

from __future__ import annotations

from typing import Any

import torch
from pieces import IGNORED, Evaluator, loss_and_grad, method, rows, sequences, spread
from torch import Tensor
from torch.nn.functional import pad

from opd import objectives
from opd.protocols import Batch, Dense, Layout, Method, TokenSequence


def _minillm(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    temperature = params["kd_temperature"]
    student, teacher, made, layout = _laid_out(tensors)
    logprobs = {
        name: objectives.token_logprobs(scores, layout.targets, temperature=temperature)
        for name, scores in (("student_logprobs", rows(student, layout)), ("teacher_logprobs", teacher))
    }
    outputs = {}
    for suffix, terms in {"": (True, True), "_long": (True, False), "_single": (False, True)}.items():
        ours = _method("trl", params, terms, kd_temperature=temperature)
        scores = _window(ours, made, layout, logprobs)
        found = loss_and_grad(ours, student, {"teacher": teacher}, Batch(made, layout, token_scores=scores), None)
        outputs |= {f"out_loss{suffix}": found["out_loss"], f"out_grad{suffix}": found["out_grad"][:, :-1]}
        outputs["out_n_tokens"] = found["out_n_tokens"]
        outputs["out_advantages"] = spread(scores["advantages"], layout, student)
    rewards = spread(logprobs["teacher_logprobs"] - logprobs["student_logprobs"], layout, student)
    outputs["out_advantages_trl"] = _trl_advantages(rewards, tensors["in_mask"], params)
    return outputs


def _trl_advantages(rewards: Tensor, mask: Tensor, params: dict[str, Any]) -> Tensor:
    """TRL 1.9's advantage, whose defects ours leaves out and this output shows.

    Powers of γ count from the row's start and are taken out again only by the normaliser: without it a factor γ^t
    stays. With it a masked slot weighs 1e-4.
    """
    gamma = params["gamma"]
    if gamma == 0:
        return rewards
    powers = gamma ** torch.arange(rewards.shape[1], dtype=rewards.dtype)

    def future(values: Tensor) -> Tensor:
        return (values * powers).flip(1).cumsum(1).flip(1)

    advantages = future(rewards)
    if params["length_normalization"]:
        advantages = advantages / future(mask.to(rewards.dtype).clamp(min=1e-4))
    return advantages * mask


def _minillm_paper(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LMOps' code: mode lmops. It whitens over padded slots too, which ours does not: here that is done to the result."""
    share = params["teacher_mixed_alpha"] or 0.0
    student, teacher, made, layout = _laid_out(tensors)
    mask = tensors["in_mask"]
    old = objectives.token_logprobs(rows(_widened(tensors["in_old_logits"]), layout), layout.targets)
    teacher_logprobs = objectives.token_logprobs(teacher, layout.targets)
    sampler = ((1 - share) * old.exp() + share * teacher_logprobs.exp()).log()
    logprobs = {"student_logprobs": old, "teacher_logprobs": teacher_logprobs, "sampler_logprobs": sampler}

    settings = {
        "clip_epsilon": params["cliprange"],
        "teacher_mix": share,
        "reward_scaling": params["reward_scaling"],
        "reward_clip": float(params["cliprange_reward"]),
    }
    ours = _method("lmops", {"length_normalization": True, **params}, (True, True), whiten=False, **settings)
    scores = _window(ours, made, layout, logprobs)
    advantages = spread(scores["advantages"], layout, student)
    if params["whiten"]:
        advantages = objectives.whiten(advantages, torch.ones_like(advantages))
        scores["advantages"] = advantages[mask]
    outputs = loss_and_grad(ours, student, {"teacher": teacher}, Batch(made, layout, token_scores=scores), None)
    metrics = ours.loss(rows(student, layout), {"teacher": teacher}, Batch(made, layout, token_scores=scores)).metrics
    rewards = objectives.log_ratio_rewards(
        old, teacher_logprobs, torch.ones_like(old), scaling=ours.config.reward_scaling, clip=ours.config.reward_clip
    )
    weights = spread((old - sampler).exp(), layout, student)
    return {
        "out_rewards": spread(rewards, layout, student),
        "out_weights": torch.where(mask, weights, 1.0),
        "out_advantages": advantages,
        "out_loss_pg": _mean(metrics["loss_pg"]),
        "out_loss_reg": _mean(metrics["loss_single_step"]),
        "out_grad": outputs["out_grad"][:, :-1],
    }


def _method(mode: str, params: dict[str, Any], terms: tuple[bool, bool], **settings: Any) -> Method:
    defaults = {
        "use_distribution_distillation": None,
        "kd_temperature": 1.0,
        "clip_epsilon": None,
        "num_substeps": 1,
        "teacher_mix": None,
        "reward_scaling": None,
        "reward_clip": None,
        "whiten": None,
        "lm_coef": None,
        "kd_ratio": 0.5,
    }
    return method(
        "minillm",
        mode=mode,
        rkl_advantage=terms[0],
        single_step_decomposition=terms[1],
        gamma=params["gamma"],
        length_normalization=params["length_normalization"],
        **{**defaults, **settings},
    )


def _laid_out(tensors: dict[str, Tensor]) -> tuple[Tensor, Dense, list[TokenSequence], Layout]:
    """The student's logits and the teacher's scores behind a prompt of one token, the sequences and their layout."""
    tokens = tensors["in_tokens"]
    labels = pad(tokens.where(tensors["in_mask"], IGNORED), (1, 0), value=IGNORED)
    made, layout = sequences(labels, pad(tokens, (1, 0)))
    teacher = rows(_widened(tensors["in_teacher_logits"]), layout)
    return _widened(tensors["in_student_logits"]), teacher, made, layout


def _widened(logits: Tensor) -> Tensor:
    """The last token's own logits predict nothing."""
    return pad(logits, (0, 0, 0, 1))


def _window(ours: Method, made: list[TokenSequence], layout: Layout, logprobs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The step's token scores after the method's window."""
    for row, sequence in enumerate(made):
        sequence.token_scores = {name: values[layout.owner == row] for name, values in logprobs.items()}
    ours.window(made, lambda tensor: tensor)
    return {name: torch.cat([sequence.token_scores[name] for sequence in made]) for name in made[0].token_scores}


def _mean(metric: tuple[Tensor, float]) -> Tensor:
    return metric[0] / metric[1]


EVALUATORS: dict[str, Evaluator] = {"minillm": _minillm, "minillm_paper": _minillm_paper}

"""Completions sampled from a model, each token from its own addressed uniform number.

A completion depends on (model, prompt, settings, address) alone: not on the batch it was sampled in, not on the global
random state, not on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd.config import Rollout
from opd.lockstep import in_step
from opd.models import causal_lm, evaluation_mode
from opd.randomness import generator
from opd.sharding import communicates
from opd.tokenizers import Vocabulary


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    max_completion_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64

    @classmethod
    def of(cls, rollout: Rollout) -> Sampling:
        """As the config's rollout section has it."""
        return cls(rollout.max_completion_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.batch_size)


@dataclass(frozen=True)
class Completion:
    """Sampled ids, the stop token included; `finished` is false where the length ran out before one came."""

    ids: list[int]
    finished: bool
    entropy: float  # mean over its tokens of the entropy of the distribution sampled from, nats
    logprobs: list[float]  # of its tokens under the distribution they were drawn from, nats


@dataclass(frozen=True)
class Mixture:
    """Two models, whose next-token probabilities are averaged: (1 - share) · student + share · teacher (MiniLLM)."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    share: float


def sample(
    model: PreTrainedModel | Mixture,
    prompts: Sequence[list[int]],
    *,
    addresses: Sequence[tuple],
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> list[Completion]:
    """One completion a prompt, in the order of the prompts. `addresses[i]` = (seed, purpose, *numbers) of prompt i.

    With a sharded model it is collective: a rank with fewer prompts, none, or shorter completions takes part until all
    are done.
    """
    mixed = model if isinstance(model, Mixture) else Mixture(model, model, 0.0)
    models = [(causal_lm(mixed.student), 1 - mixed.share)]
    models += [(causal_lm(mixed.teacher), mixed.share)] if mixed.share else []
    together = [(each, partial(_accompany, each)) for each, _ in models if communicates(each)]
    if not prompts and not together:
        return []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    with evaluation_mode(models[0][0]), in_step(*together):  # a teacher is in it already
        for start in range(0, len(order), sampling.batch_size):
            chosen = order[start : start + sampling.batch_size]
            uniforms = np.stack([generator(*addresses[i]).random(sampling.max_completion_tokens) for i in chosen])
            batch = _sample_batch(models, [prompts[i] for i in chosen], uniforms, sampling, vocabulary)
            completions.update(zip(chosen, batch, strict=True))
    return [completions[i] for i in range(len(prompts))]


def _accompany(model: PreTrainedModel) -> None:
    """Take part in another rank's next token."""
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)


def _sample_batch(
    models: Sequence[tuple[PreTrainedModel, float]],
    prompts: list[list[int]],
    uniforms: np.ndarray,
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> list[Completion]:
    device = models[0][0].device
    width = max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[vocabulary.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    # Padded on the left, so that the next token is the last column of every row; positions count real tokens.
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(sorted(vocabulary.stop_ids), device=device)
    draws = torch.from_numpy(uniforms).to(device)
    caches = [DynamicCache(config=model.config) for model, _ in models]
    alive = torch.ones_like(lengths, dtype=torch.bool)
    tokens, logprobs = [], []
    entropies, counts = torch.zeros(len(prompts), device=device), torch.zeros_like(lengths)
    for step in range(sampling.max_completion_tokens):
        logits = [
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1, : vocabulary.size]
            for (model, _), cache in zip(models, caches, strict=True)
        ]
        token, logprob, entropy = _draw(logits, [share for _, share in models], draws[:, step], sampling)
        tokens.append(token)
        logprobs.append(logprob)
        entropies += entropy * alive
        counts += alive
        alive &= ~torch.isin(token, stops)
        if not alive.any():
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    columns = zip(
        torch.stack(tokens, dim=1).tolist(),
        torch.stack(logprobs, dim=1).tolist(),
        counts.tolist(),
        (~alive).tolist(),
        entropies.tolist(),
        strict=True,
    )
    return [Completion(row[:n], done, entropy / n, scores[:n]) for row, scores, n, done, entropy in columns]


def _draw(
    logits: Sequence[Tensor], shares: Sequence[float], uniform: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """The token whose share of the cumulative distribution holds the uniform number, its log-probability, the entropy.

    `logits`: (B, V) of each model; the distributions are averaged by `shares`. All three results are (B,).
    """
    if sampling.temperature == 0:
        scores = [each.float() if len(logits) == 1 else each.float().softmax(1) for each in logits]
        token = _average(scores, shares).argmax(1)
        return token, torch.zeros_like(uniform, dtype=torch.float32), torch.zeros_like(uniform, dtype=torch.float32)
    average = _average([(each.float() / sampling.temperature).softmax(1) for each in logits], shares)
    probabilities = _truncate(average, sampling)
    cumulative = probabilities.double().cumsum(1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    token = token.clamp(max=probabilities.shape[1] - 1)
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(1)
    return token, probabilities.gather(1, token[:, None]).squeeze(1).log(), entropy


def _average(distributions: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if len(distributions) == 1:
        return distributions[0]
    return torch.stack([share * each for share, each in zip(shares, distributions, strict=True)]).sum(0)


def _truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """top_k, then the nucleus: the fewest likeliest tokens whose mass reaches top_p. Renormalised."""
    if sampling.top_k:
        floor = probabilities.topk(min(sampling.top_k, probabilities.shape[1]), dim=1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= floor, 0.0)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(dim=1, descending=True)
        outside = ordered.cumsum(1) - ordered >= sampling.top_p
        probabilities = torch.zeros_like(ordered).scatter(1, index, ordered.masked_fill(outside, 0.0))
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return probabilities

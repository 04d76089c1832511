"""Completions sampled from a model, each token from its own addressed uniform number.

A completion depends on (model, prompt, settings, address) alone: not on the batch it was sampled in, not on the global
random state, not on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd.models import Vocabulary, causal_lm
from opd.randomness import generator


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    max_completion_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Completion:
    """Sampled ids, the stop token included; `finished` is false where the length ran out before one came."""

    ids: list[int]
    finished: bool
    entropy: float  # mean over its tokens of the entropy of the distribution sampled from, nats


def sample(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    addresses: Sequence[tuple],
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> list[Completion]:
    """One completion a prompt, in the order of the prompts. `addresses[i]` = (seed, purpose, *numbers) of prompt i."""
    model = causal_lm(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    with evaluation_mode(model):
        for start in range(0, len(order), sampling.batch_size):
            chosen = order[start : start + sampling.batch_size]
            uniforms = np.stack([generator(*addresses[i]).random(sampling.max_completion_tokens) for i in chosen])
            batch = _sample_batch(model, [prompts[i] for i in chosen], uniforms, sampling, vocabulary)
            completions.update(zip(chosen, batch, strict=True))
    return [completions[i] for i in range(len(prompts))]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, and then as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _sample_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    uniforms: np.ndarray,
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> list[Completion]:
    device = model.device
    width = max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[vocabulary.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    # Padded on the left, so that the next token is the last column of every row; positions count real tokens.
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(sorted(vocabulary.stop_ids), device=device)
    draws = torch.from_numpy(uniforms).to(device)
    cache, alive = DynamicCache(config=model.config), torch.ones_like(lengths, dtype=torch.bool)
    tokens, entropies, counts = [], torch.zeros(len(prompts), device=device), torch.zeros_like(lengths)
    for step in range(sampling.max_completion_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token, entropy = _draw(output.logits[:, -1, : vocabulary.size].float(), draws[:, step], sampling)
        tokens.append(token)
        entropies += entropy * alive
        counts += alive
        alive &= ~torch.isin(token, stops)
        if not alive.any():
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    rows, finished = torch.stack(tokens, dim=1).tolist(), (~alive).tolist()
    return [
        Completion(row[:count], done, entropy / count)
        for row, count, done, entropy in zip(rows, counts.tolist(), finished, entropies.tolist(), strict=True)
    ]


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The token whose share of the cumulative distribution holds the uniform number, (B,); and the entropy, (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(1), torch.zeros_like(logits[:, 0])
    probabilities = _truncate((logits / sampling.temperature).softmax(1), sampling)
    cumulative = probabilities.double().cumsum(1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(1)
    return token.clamp(max=logits.shape[1] - 1), entropy


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

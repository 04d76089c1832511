"""Whether completions end as they should, and rollouts are drawn from what the config says."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from opd.models import causal_lm, computing, evaluation_mode, hidden_states, predicting_states, read_head
from opd.objectives.fused import final_logits
from opd.preflight.findings import Finding
from opd.preflight.trial import Trial
from opd.protocols import Batch, Dense, TokenSequence
from opd.window import Window

_EXAMINED = 8  # sequences whose distributions are computed again


def check_ends(trial: Trial, window: Window) -> Iterator[Finding]:
    """A finished completion ends in a stop token, which is a loss token; a rollout has none before its end."""
    stops, limit = trial.texts.vocabulary.stop_ids, trial.config.rollout.max_completion_tokens
    masked, late, early, open_ended, ended = [], [], [], [], 0
    for sequence, last_target in _with_last_targets(window):
        ids = sequence.completion_ids
        if not ids:
            continue
        ends = ids[-1] in stops
        ended += ends
        if ends and last_target != ids[-1] and len(sequence.prompt_ids) + len(ids) > 1:
            masked.append(sequence)
        if sequence.origin != "dataset":
            late += [sequence] if stops & set(ids[:-1]) else []
            early += [sequence] if not ends and len(ids) < limit else []
        elif not ends and sequence.kind in ("single", "chosen") and len(ids) < trial.config.data.max_completion_length:
            open_ended.append(sequence)
    if masked:
        yield Finding(
            "gradient.eos",
            "error",
            f"{len(masked)} completions end in a stop token that is no loss token, e.g. that of row {masked[0].row}",
            "the student would never learn to stop",
            "mask by length, never by id: pad may be the same id",
        )
    if late or early:
        yield Finding(
            "gradient.eos",
            "error",
            f"{len(late)} rollouts go on behind a stop token, {len(early)} end without one",
            "their lengths and endings are not the student's",
            f"stop ids are {sorted(stops)}: compare them with the generation config",
        )
    if open_ended and not ended and not trial.needs.rollouts:
        yield Finding(
            "gradient.eos",
            "warning",
            f"none of the first {len(open_ended)} completions ends in a stop token {sorted(stops)}",
            "the student would not learn to stop",
            "end the data's answers with the student's eos, or set a chat template that does",
        )


def check_rollouts(trial: Trial, window: Window) -> Iterator[Finding]:
    """The same prompts give the same rollouts whatever the global random state, and with a cache of keys and values."""
    if not trial.needs.rollouts:
        return
    counted = _TokenCounter(causal_lm(trial.student))
    random.random()
    np.random.random()
    torch.rand(1)
    state = torch.random.get_rng_state()
    with counted, computing(trial.config.hardware):
        _, again = trial.source.sequences(trial.prompts())
    drew = not torch.equal(state, torch.random.get_rng_state())
    first = [s.completion_ids for s in window.sequences if s.origin != "dataset"]
    second = [s.completion_ids for s in again]
    if drew or first != second:
        yield Finding(
            "gradient.reproducible",
            "error",
            "rollouts draw from the global random state" if drew else "the same prompts gave other rollouts",
            "evaluation and resuming would change the training",
            "draw from addressed generators alone (opd.randomness)",
        )
    mine = [s for s in again if s.origin in ("student", "mixture")]
    longest = max((len(s.prompt_ids) for s in mine), default=0) + max((len(s.completion_ids) for s in mine), default=0)
    if counted.tokens > len(mine) * longest:
        yield Finding(
            "gradient.cache",
            "warning",
            f"{counted.tokens} tokens went through the student for {len(mine)} rollouts of {longest} and fewer",
            "the cache of keys and values is not used: sampling takes many times as long",
            "look for use_cache=False, and for gradient checkpointing that is on while sampling",
        )


def check_sampler(trial: Trial, window: Window) -> Iterator[Finding]:
    """What rollouts recorded of their distributions is so in a fresh forward at rollout.temperature."""
    rollout = trial.config.rollout
    mine = [s for s in window.sequences if s.origin == "student" and s.completion_ids][:_EXAMINED]
    if not mine:
        return
    batch = trial.batches().batch(mine)
    own = _student_logits(trial, batch)
    setting = f"rollout.temperature={rollout.temperature} rollout.top_p={rollout.top_p} rollout.top_k={rollout.top_k}"
    why = "rollouts are not what the method takes them for; importance weights would be wrong"
    remedy = "let sampling and scoring take the temperature from rollout.temperature alone"
    if rollout.temperature == 0:
        behind = own.amax(1) - own.gather(1, batch.layout.targets[:, None]).squeeze(1)
        if float((behind > (1e-3 if trial.exact else 0.5)).float().mean()) > 0.1:
            yield Finding("gradient.temperature", "error", f"{setting}: rollouts are not greedy", why, remedy)
        return
    logprobs = _drawn_from(own, rollout.temperature, rollout.top_p, rollout.top_k)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(1)
    told = torch.tensor([s.entropy for s in mine for _ in range(s.num_loss_tokens)], device=entropy.device)
    tolerance = 1e-3 if trial.exact else 0.1
    if abs(float(entropy.mean() - told.mean())) > tolerance * (1 + float(entropy.mean())):
        what = f"rollouts were drawn at an entropy of {told.mean():.4f} nats, a fresh forward has {entropy.mean():.4f}"
        yield Finding("gradient.temperature", "error", f"{setting}: {what}", why, remedy)
        return
    if all("sampler_logprobs" in sequence.token_scores for sequence in mine):
        recorded = torch.cat([s.token_scores["sampler_logprobs"] for s in mine]).to(logprobs.device)
        fresh = logprobs.gather(1, batch.layout.targets[:, None]).squeeze(1)
        gap = (recorded - fresh)[torch.isfinite(fresh)].abs()  # rounding decides at the edge of a nucleus
        if len(gap) and float(gap.mean()) > tolerance:
            what = f"recorded log-probabilities differ from a fresh forward's by {gap.mean():.4f} nats in the mean"
            yield Finding("gradient.temperature", "error", f"{setting}: {what}", why, remedy)


class _TokenCounter:
    """How many tokens a model embeds while it is open."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens, self._model = 0, model

    def __enter__(self) -> _TokenCounter:
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        self._handle = embedding.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _count(self, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.tokens += arguments[0].numel()


def _with_last_targets(window: Window) -> Iterator[tuple[TokenSequence, int | None]]:
    """Each sequence, and the last target that its layout has of it."""
    for batch in window.batches:
        last = dict(zip(batch.layout.owner.tolist(), batch.layout.targets.tolist(), strict=True))
        yield from ((sequence, last.get(i)) for i, sequence in enumerate(batch.sequences))


def _student_logits(trial: Trial, batch: Batch) -> Tensor:
    """(N, V) of the loss tokens, at the positions that predict them."""
    inner = causal_lm(trial.student)
    with evaluation_mode(inner), computing(trial.config.hardware):
        if not trial.needs.label_states:
            hidden = predicting_states(inner, batch.layout)
        else:
            layout = batch.layout
            states = hidden_states(inner, layout.input_ids, layout.attention_mask, layout.position_ids)
            hidden = states.flatten(0, 1)[layout.predictors - 1]
        head = read_head(inner, trial.texts.vocabulary.size)
        return final_logits(Dense(hidden, head), slice(None)).float()


def _drawn_from(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Log-probabilities of what is drawn from: the likeliest ids of that number and then of that mass, renormalised."""
    logprobs, ids = (logits / temperature).log_softmax(1).sort(dim=1, descending=True)
    if top_k:
        logprobs[:, top_k:] = -torch.inf
        logprobs = logprobs.log_softmax(1)
    if top_p < 1:
        before = logprobs.exp().cumsum(1) - logprobs.exp()
        logprobs = logprobs.masked_fill(before >= top_p, -torch.inf).log_softmax(1)
    return torch.empty_like(logprobs).scatter(1, ids, logprobs)

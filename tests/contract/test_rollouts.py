"""Rollouts: greedy ones are transformers' own, sampled ones follow their distribution, and none knows its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from contract.tiny import PAD, SHAPES, STOPS, STUDENT_VOCAB, VOCABULARY, make_examples, make_model
from opd.sources.rollouts import Mixture, Sampling, sample
from opd.tokenizers import Vocabulary

transformers_logging.set_verbosity_error()

PROMPTS = [example.prompt_ids for example in make_examples(24)]


def draw(model, prompts=PROMPTS, *, first=0, vocabulary=VOCABULARY, length=12, **settings):
    """Completions of the prompts; prompt i is addressed by first + i."""
    addresses = [(0, "rollout", first + i) for i in range(len(prompts))]
    return sample(model, prompts, addresses=addresses, sampling=Sampling(length, **settings), vocabulary=vocabulary)


@pytest.mark.parametrize("kind", SHAPES)
def test_greedy_is_that_of_generate_token_for_token(kind):
    """Ours in ragged batches, theirs one prompt at a time; up to a tie, which rounding decides, where there is one."""
    model, ties = make_model(kind, 3).eval(), 0
    ours = draw(model, length=16, temperature=0.0, batch_size=7)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=sorted(STOPS),
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_logits=True,
        )
        theirs = answer.sequences[0, len(prompt) :].tolist()
        best = torch.cat(answer.logits).topk(2).values
        tied = (best[:, 0] - best[:, 1] < 1e-5).nonzero().flatten().tolist()
        if tied:
            ties += 1
            assert completion.ids[: tied[0]] == theirs[: tied[0]]
        else:
            assert completion.ids == theirs
            assert completion.finished == (theirs[-1] in STOPS)
    assert ties <= 1


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}], ids=str)
def test_a_completion_does_not_depend_on_the_batch_it_was_sampled_in(kind, settings):
    model = make_model(kind, 3)
    alone, together = (draw(model, batch_size=size, **settings) for size in (1, 8))
    assert [c.ids for c in alone] == [c.ids for c in together]
    assert np.allclose([c.entropy for c in alone], [c.entropy for c in together], atol=1e-5)


def test_a_completion_does_not_depend_on_the_order_of_the_prompts_nor_on_global_randomness():
    model = make_model("llama", 3)
    torch.manual_seed(1)
    forwards = draw(model)
    torch.manual_seed(2)
    np.random.seed(3)
    order = list(range(len(PROMPTS)))[::-1]
    addresses = [(0, "rollout", i) for i in order]
    backwards = sample(
        model, [PROMPTS[i] for i in order], addresses=addresses, sampling=Sampling(12), vocabulary=VOCABULARY
    )
    assert [c.ids for c in forwards] == [c.ids for c in backwards[::-1]]


def test_sampling_leaves_the_global_random_state_and_the_models_mode_alone():
    model = make_model("llama", 3).train()
    before = torch.get_rng_state()
    draw(model)
    assert torch.equal(before, torch.get_rng_state()) and model.training


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}], ids=str)
def test_a_completion_ends_in_its_first_stop_token_or_is_cut_with_none_appended(settings):
    done = draw(make_model("llama", 3), PROMPTS * 4, length=10, **settings)
    assert {completion.finished for completion in done} == {True, False}
    for completion in done:
        assert not set(STOPS) & set(completion.ids[:-1])
        assert completion.finished == (completion.ids[-1] in STOPS)
        assert completion.finished or len(completion.ids) == 10


def test_every_stop_token_of_the_set_stops():
    done = draw(make_model("llama", 3), PROMPTS * 40, length=10)
    assert {completion.ids[-1] for completion in done if completion.finished} == set(STOPS)


def test_no_id_beyond_the_shared_vocabulary_is_drawn():
    model, shared = make_model("llama", 3, vocab_size=80), Vocabulary(STUDENT_VOCAB, frozenset(STOPS), PAD)
    ids = {token for completion in draw(model, PROMPTS * 10, vocabulary=shared) for token in completion.ids}
    assert max(ids) < STUDENT_VOCAB
    whole = draw(model, PROMPTS * 10, vocabulary=Vocabulary(80, frozenset(STOPS), PAD))
    assert max(token for completion in whole for token in completion.ids) >= STUDENT_VOCAB


def truncated(logits, temperature=1.0, top_p=1.0, top_k=0):
    """The distribution by its definition, one token at a time."""
    scaled = logits / temperature
    weights = np.exp(scaled - scaled.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities)
    kept = order[: top_k or len(order)]
    mass, nucleus = 0.0, []
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += probabilities[token] / probabilities[kept].sum()
    result = np.zeros_like(probabilities)
    result[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_p": 0.7},
        {"top_k": 6},
        {"temperature": 1.5, "top_p": 0.8, "top_k": 20},
        {"top_p": 1e-6},
        {"top_k": 1},
    ],
    ids=str,
)
def test_frequencies_are_the_distributions(settings):
    """20,000 draws of one token: within four standard deviations and a half, and never outside the nucleus."""
    model, prompt, draws = make_model("llama", 3).eval(), PROMPTS[2], 20_000
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().numpy()
    expected = truncated(logits, **settings)
    done = draw(model, [prompt] * draws, length=1, batch_size=2000, **settings)
    counts = np.bincount([completion.ids[0] for completion in done], minlength=len(expected))
    assert not counts[expected == 0].any()
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 4.5 * deviation + 1).all()
    entropy = -sum(p * np.log(p) for p in expected if p > 0)
    assert done[0].entropy == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_mixture_draws_from_the_average_of_both_models_probabilities(share):
    student, teacher = make_model("llama", 3).eval(), make_model("llama", 4).eval()
    for prompt, completion in zip(PROMPTS[:6], draw(Mixture(student, teacher, share), PROMPTS[:6]), strict=True):
        ids = torch.tensor([[*prompt, *completion.ids]])
        with torch.no_grad():
            mine, theirs = (
                model(ids).logits[0, len(prompt) - 1 : -1, :STUDENT_VOCAB].softmax(1) for model in (student, teacher)
            )
        averaged = ((1 - share) * mine + share * theirs).log()
        assert torch.allclose(
            torch.tensor(completion.logprobs), averaged[range(len(completion.ids)), completion.ids], atol=1e-5
        )
        entropy = float(-(averaged.exp() * averaged).sum(1).mean())
        assert completion.entropy == pytest.approx(entropy, rel=1e-4)

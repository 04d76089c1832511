"""Whether every score belongs to the token that it is taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd.models import causal_lm, computing, evaluation_mode, predicting_states
from opd.objectives.fused import final_logits, tiles
from opd.preflight.findings import Finding
from opd.preflight.trial import Engine, Trial
from opd.protocols import Batch, Dense, Layout, Scores, TokenSequence, TokenView
from opd.teachers import asked_unevenly
from opd.window import Window

Score = Callable[[Layout, Sequence[TokenSequence]], Tensor]
"""Something of every loss token that its whole distribution decides, (N, …)."""
_AT_ALL = 1e-6  # of a score's size: a forward that is made twice gives the same numbers
_BUCKETS = 4096


def check_alignment(trial: Trial, engine: Engine, window: Window) -> Iterator[Finding]:
    """Scores of a token depend on all that precedes it and on nothing else, in every model's own view."""
    sequences = max(window.batches, key=lambda batch: len(batch.layout.targets)).sequences
    batch = trial.batches().batch(sequences)
    yield from _check_targets(trial, batch)
    if trial.needs.label_states:
        yield Finding("gradient.alignment", "note", "the method reads scores one position late, as its authors' code")
    inner = causal_lm(trial.student)

    def student(layout: Layout, _: Sequence[TokenSequence]) -> Tensor:
        with evaluation_mode(inner), computing(trial.config.hardware):
            return predicting_states(inner, layout).float()

    yield from _probe(trial, "the student", None, sequences, student)
    for name, teacher in trial.teachers.items():
        if teacher.is_kept:
            continue  # it tells what was computed, of these very ids alone

        def scores(layout: Layout, about: Sequence[TokenSequence], teacher=teacher) -> Tensor:
            with torch.no_grad():
                return _rows(teacher.score(layout, about))

        with asked_unevenly([teacher]):
            yield from _probe(trial, f"teacher {name}", name, sequences, scores)
    yield from _check_logprobs(trial, engine, window)


def _check_targets(trial: Trial, batch: Batch) -> Iterator[Finding]:
    """The targets are the loss tokens of the views, in their order; views of the same ids have the same ones."""
    views = {"the student": (batch.layout, [sequence.student_view for sequence in batch.sequences])}
    for name, layout in batch.views.items():
        views[f"teacher {name}"] = (layout, [sequence.views[name] for sequence in batch.sequences])
    for reader, (layout, read) in views.items():
        wanted = [view.ids[t] for view in read for t in _loss_positions(view)]
        if layout.attention_mask is not None and layout.attention_mask.sum(1).tolist() != [len(v.ids) for v in read]:
            yield _misaligned(f"{reader}: the attention mask does not follow the lengths of its sequences")
        late = int(trial.needs.label_states)
        if layout.position_ids is not None and layout.position_ids.flatten()[layout.predictors].tolist() != [
            t - 1 + late for view in read for t in _loss_positions(view)
        ]:
            yield _misaligned(f"{reader}: the positions of packed sequences do not begin again")
        if layout.targets.tolist() != wanted:
            yield _misaligned(f"{reader}: the targets are not the loss tokens of its sequences")
    for name, layout in batch.views.items():
        if name not in batch.alignments and not torch.equal(layout.targets, batch.layout.targets):
            yield _misaligned(f"teacher {name}: it scores other tokens than the student")
    text_views = trial.texts.text_views
    for name, groups in batch.alignments.items():
        student, teacher = batch.layout.targets.tolist(), batch.views[name].targets.tolist()
        apart = [
            (a, b, c, d)
            for _, a, b, c, d in groups.tolist()
            if b > a and d > c and text_views and not text_views.same_text(student[a:b], teacher[c:d])
        ]
        if apart:
            a, b, c, d = apart[0]
            pair = f"e.g. {student[a:b]} and {teacher[c:d]}"
            yield _misaligned(f"teacher {name}: {len(apart)} of {len(groups)} groups spell different texts, {pair}")


def _probe(
    trial: Trial, reader: str, name: str | None, sequences: list[TokenSequence], score: Score
) -> Iterator[Finding]:
    """Change one token, and see whose scores change."""
    views = [_view(sequence, name) for sequence in sequences]
    spot = next(
        ((i, t) for i, view in enumerate(views) for t in _loss_positions(view) if t + 1 in _loss_positions(view)), None
    )
    if spot is None:
        return
    chosen, t = spot
    places = [(i, position) for i, view in enumerate(views) for position in _loss_positions(view)]
    row = places.index(spot)
    before = _scored(trial, name, sequences, score)
    other_self = _scored(trial, name, _changed(sequences, chosen, t, name), score)
    other_previous = _scored(trial, name, _changed(sequences, chosen, t - 1, name), score)
    at_itself = _moved(before, other_self, 1e-4 if trial.exact else 2e-2)
    if len(before) != len(places):
        yield _misaligned(f"{reader}: {len(before)} scores of {len(places)} loss tokens")
        return
    if trial.needs.label_states:
        if not _moved(before, other_self, _AT_ALL)[row]:
            yield _misaligned(f"{reader}: the scores at a label do not depend on it, though the method reads them so")
        return
    foreign = [n for n, (i, position) in enumerate(places) if at_itself[n] and (i != chosen or position <= t)]
    if any(places[n][0] == chosen for n in foreign):
        yield _misaligned(f"{reader}: the scores of a token depend on itself or on later tokens")
    if any(places[n][0] != chosen for n in foreign):
        yield _misaligned(f"{reader}: the scores of a sequence depend on another sequence of the micro-batch")
    # Of confident models in half precision the one token moves little; without a way to it, nothing.
    if not _moved(before, other_self, _AT_ALL)[row + 1] or not _moved(before, other_previous, _AT_ALL)[row]:
        yield _misaligned(f"{reader}: the scores of a token do not depend on the token before it")


def _check_logprobs(trial: Trial, engine: Engine, window: Window) -> Iterator[Finding]:
    """Lone log-probabilities are those of the distributions, at their own tokens, and so are the window's."""
    needs, tolerance = trial.needs, 1e-3 if trial.exact else 0.3
    temperature = needs.window_temperature if needs.window else 1.0
    for batch in window.batches:
        if needs.window:
            fresh = engine.student_logprobs(batch, temperature)
            if _differ(fresh, batch.token_scores["student_logprobs"], tolerance):
                yield _misaligned("the student's log-probabilities of the step are not those of its loss tokens")
        for name, need in needs.teachers.items():
            teacher = trial.teachers[name]
            asked = need.kinds is None and (needs.window or need.scores == "logprobs")
            if teacher.is_kept or not asked or name in batch.alignments:
                continue
            layout = batch.views.get(name, batch.layout)
            scores = teacher.score(layout, batch.sequences)
            if not isinstance(scores, Dense):
                continue
            told = batch.token_scores.get(f"{name}_logprobs")
            if told is None:
                told = teacher.logprobs(layout, batch.sequences, temperature=temperature)
            if _differ(_gathered(scores, layout.targets, temperature), told, tolerance):
                yield _misaligned(f"teacher {name}: its log-probabilities are not those of the loss tokens")


def _misaligned(what: str) -> Finding:
    return Finding(
        "gradient.alignment",
        "error",
        what,
        "the loss would compare distributions of different positions",
        "look at layouts, attention masks and position ids (opd.data.collate, opd.window)",
    )


def _view(sequence: TokenSequence, name: str | None) -> TokenView:
    return sequence.student_view if name is None else sequence.views.get(name, sequence.student_view)


def _loss_positions(view: TokenView) -> list[int]:
    return [t for t, counted in enumerate(view.loss_mask) if counted and t > 0]


def _changed(sequences: list[TokenSequence], chosen: int, t: int, name: str | None) -> list[TokenSequence]:
    """Another token at t of what `name` reads of one of the sequences."""
    sequence, others = sequences[chosen], list(sequences)
    if name is not None and name in sequence.views:
        view = sequence.views[name]
        ids = [*view.ids[:t], _another(view.ids[t]), *view.ids[t + 1 :]]
        others[chosen] = replace(sequence, views={**sequence.views, name: TokenView(ids, view.loss_mask)})
        return others
    ids, start = sequence.prompt_ids + sequence.completion_ids, len(sequence.prompt_ids)
    ids[t] = _another(ids[t])
    others[chosen] = replace(sequence, prompt_ids=ids[:start], completion_ids=ids[start:])
    return others


def _another(token: int) -> int:
    return token - 1 if token else 1


def _scored(trial: Trial, name: str | None, sequences: list[TokenSequence], score: Score) -> Tensor:
    batch = trial.batches().batch(sequences)
    layout = batch.layout if name is None else batch.views.get(name, batch.layout)
    return score(layout, sequences)


def _moved(before: Tensor, after: Tensor, tolerance: float) -> list[bool]:
    """Of every loss token, whether its scores changed, beyond this share of their size."""
    gap, size = (tensor.flatten(1).norm(dim=1) for tensor in (before - after, before))
    return (gap > tolerance * size.clamp(min=1e-30)).tolist()


def _rows(scores: Scores) -> Tensor:
    """Hidden states; of sparse scores the log-probabilities, from -60 on, by id, some ids together."""
    if isinstance(scores, Dense):
        return scores.hidden.float()
    rows = scores.logprobs.new_zeros((len(scores.ids), _BUCKETS), dtype=torch.float32)
    return rows.scatter_add(1, scores.ids % _BUCKETS, scores.logprobs.float().clamp(min=-60) + 61)


@torch.no_grad()
def _gathered(scores: Dense, targets: Tensor, temperature: float) -> Tensor:
    parts = []
    for rows in tiles(scores):
        logprobs = (final_logits(scores, rows) / temperature).log_softmax(1)
        parts.append(logprobs.gather(1, targets[rows][:, None]).squeeze(1))
    return torch.cat(parts)


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """In the mean over tokens: half precision makes a single one uncertain."""
    return len(one) != len(other) or bool(len(one) and (one - other).abs().mean() > tolerance)

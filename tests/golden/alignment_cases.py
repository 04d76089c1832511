"""Gold and its alignment."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from pieces import IGNORED, Evaluator, loss_and_grad, method, sequences
from torch import Tensor

from opd.objectives import VocabularyMatch
from opd.objectives.alignment import align, align_positions
from opd.protocols import Batch, Dense, Group, Head


def _ends(offsets: Tensor, labels: Tensor, skip_eos: bool) -> list[int]:
    """Byte ends of a row's loss tokens, without the stop token that ends every case's answer."""
    ends = offsets[labels != IGNORED][:, 1].tolist()
    return ends[:-1] if skip_eos else ends


def _gold(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = method(
        "gold",
        beta=params["beta"],
        lmbda=0.0,
        seq_kd=False,
        kd_temperature=params["student_temperature"],
        teacher_temperature=params["teacher_temperature"],
        use_uld_loss=True,
        extended=params["extended"],
        merge=params["strategy"],
        hybrid=params["hybrid"],
        matched_weight=params["matched_weight"],
        unmatched_weight=params["unmatched_weight"],
        skip_student_eos=params["skip_student_eos"],
        skip_teacher_eos=params["skip_teacher_eos"],
        ce_weight=0.0,
        distill_weight=1.0,
    )
    teacher_ids, student_ids = tensors["in_vocab_pairs"].reshape(-1, 2).unbind(1)
    ours.match = VocabularyMatch(student_ids, teacher_ids)
    made, layout = sequences(tensors["in_student_labels"], tensors["in_student_ids"])
    _, view = sequences(tensors["in_teacher_labels"], tensors["in_teacher_ids"])
    alignment: list[tuple[int, ...]] = []
    student_start = teacher_start = 0
    for row in range(len(made)):
        labels = tensors["in_student_labels"][row], tensors["in_teacher_labels"][row]
        student = _ends(tensors["in_student_offsets"][row], labels[0], params["skip_student_eos"])
        teacher = _ends(tensors["in_teacher_offsets"][row], labels[1], params["skip_teacher_eos"])
        pairs: list[Group] = (
            align(student, teacher) if params["extended"] else align_positions(len(student), len(teacher))
        )
        alignment += [
            (row, a + student_start, b + student_start, c + teacher_start, d + teacher_start) for a, b, c, d in pairs
        ]
        student_start += int((labels[0] != IGNORED).sum())
        teacher_start += int((labels[1] != IGNORED).sum())
    batch = Batch(made, layout, {"teacher": view}, {"teacher": torch.tensor(alignment).reshape(-1, 5)})
    if ours.needs.label_states:
        batch.layout.predictors.add_(1)
        view.predictors.add_(1)
    teacher_rows = tensors["in_teacher_logits"].flatten(0, 1)[view.predictors]
    return loss_and_grad(ours, tensors["in_student_logits"], {"teacher": Dense(teacher_rows, Head(None))}, batch, None)


def _gold_align(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    pairs = align(tensors["in_s_offsets"][:, 1].tolist(), tensors["in_t_offsets"][:, 1].tolist())
    sides = [[list(range(a, b)) for a, b, _, _ in pairs], [list(range(c, d)) for _, _, c, d in pairs]]
    return {"out_groups": np.array(json.dumps(sides))}


EVALUATORS: dict[str, Evaluator] = {"gold": _gold, "gold_align": _gold_align}

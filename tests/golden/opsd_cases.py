"""Opsd: the teacher's numbers lie at other positions than the student's, on longer rows."""

from __future__ import annotations

from typing import Any

from pieces import Evaluator, loss_and_grad, method, rows, sequences
from torch import Tensor

from opd.data.collate import lay_out
from opd.protocols import Batch


def _opsd(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = method(
        "opsd",
        beta=params["beta"],
        lmbda=1.0,
        kd_temperature=params["temperature"],
        loss="distribution",
        token_clip=params.get("token_clip"),
        top_k=params.get("top_k"),
        teacher_mode="current",
        ema_decay=0.999,
        teacher_prompt="messages",
        layout="template",
        bridge_message=None,
        privileged_template="{user}\n\n{privileged}",
        on_empty_privileged="error",
        max_privileged_length=None,
    )
    made, layout = sequences(tensors["in_student_labels"])
    read, _ = sequences(tensors["in_teacher_labels"])
    for sequence, other in zip(made, read, strict=True):
        sequence.views["teacher"] = other.student_view
    teacher_layout = lay_out([sequence.views["teacher"] for sequence in made], pad_id=0)
    assert (teacher_layout.targets == layout.targets).all()
    teacher = rows(tensors["in_teacher_logits"], teacher_layout)
    batch = Batch(made, layout, views={"teacher": teacher_layout})
    return loss_and_grad(ours, tensors["in_student_logits"], {"teacher": teacher}, batch, params["num_items"])


EVALUATORS: dict[str, Evaluator] = {"opsd": _opsd}

"""One tiny run, loaded as a training would have it, and what the checks of its gradient find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from contract.tiny import VOCABULARY, as_needed, make_examples, make_model, make_trainer
from contract.tokens import student_tokenizer
from contract.variants import ALL_VARIANTS, Variant, tiny_config

from opd.config import LoRA
from opd.data import DataSet
from opd.loading import Texts
from opd.models import add_lora, causal_lm
from opd.preflight import Finding
from opd.preflight.gradient import check_gradient
from opd.protocols import Example
from opd.sharding import is_sharded

ADAPTER = LoRA(r=2, alpha=4, dropout=0.1, targets="all-linear")
NAMED = {str(variant): variant for variant in ALL_VARIANTS}


def find(
    variant: Variant | str,
    *,
    kind: str = "llama",
    lora: LoRA | None = None,
    examples: Sequence[Example] | None = None,
    models: Any = None,
    student: Any = None,
    spoil: Callable[[Any], None] = lambda student: None,
    before: Callable[[], None] = lambda: None,
    **sections: dict[str, Any],
) -> list[Finding]:
    """The findings about this variant; `spoil` does something to the student, `before` comes last."""
    config = tiny_config(NAMED[variant] if isinstance(variant, str) else variant, **sections)
    student = make_model(kind, seed=1) if student is None else student
    student = student if lora is None else add_lora(student, lora)
    spoil(student)
    rows = make_examples() if examples is None else list(examples)
    trainer, told = make_trainer(config, student=student, models=models, examples=rows)
    if not is_sharded(student):
        for name in ("forward", "plain_forward"):  # the trainer's: a run is checked before it has one
            vars(causal_lm(student)).pop(name)
    method, source = trainer.method, told.source
    needed = [as_needed(example, method.needs) for example in rows]
    data = DataSet(needed, needed[:6], lambda example, text, finished: {})
    texts = Texts(student_tokenizer(), VOCABULARY, data, VOCABULARY, source._text_views)
    before()
    return check_gradient(config, method, texts, student=student, teachers=told.teachers, source=source)


def heeded(findings: Sequence[Finding]) -> list[str]:
    """What is more than a note, in a line each."""
    return [finding.line for finding in findings if finding.severity != "note"]

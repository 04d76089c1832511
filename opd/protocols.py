"""What passes between the rooms: sequences, views of them, scores, terms of a loss.

docs/architecture.md holds these types against every method. Three rules carry the rest: masks come from lengths, never
from token ids; a loss is a sum with the name of its count, never a mean; nothing has the size [batch, length, vocab].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Origin = Literal["dataset", "student", "teacher", "replay"]


@dataclass(frozen=True)
class Example:
    """One row of data, in the student's ids.

    `completion_mask[k]` says whether completion token k is a loss token (an assistant turn, say); None: every one is.
    `completion_ids` is None for a row that only has a prompt. `fields`: the row's own columns, for scores and samples.
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[int] | None = None
    completion_mask: list[bool] | None = None
    fields: dict[str, Any] = field(default_factory=dict)


class ExampleSet(Protocol):
    """Data as training sees it: a length, and rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...


@dataclass(frozen=True)
class TokenView:
    """One model's reading of a sequence. `loss_mask[t]`: token t is a target; token 0 is predicted by nothing."""

    ids: list[int]
    loss_mask: list[bool]


@dataclass
class TokenSequence:
    """A prompt and one completion of it, with where both came from.

    `finished`: the completion ends in a real stop token (a truncated rollout does not). `views` holds what models other
    than the student read, by teacher name; a teacher without an entry reads the student's view. `token_scores` are
    numbers a loss token, set by the window part of a method: {name: [loss tokens]}.
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[bool]
    origin: Origin = "dataset"
    finished: bool = True
    member: int = 0
    kind: Literal["single", "chosen", "rejected", "response"] = "single"
    views: dict[str, TokenView] = field(default_factory=dict)
    token_scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def student_view(self) -> TokenView:
        """The ids and loss mask that the student sees."""
        return TokenView(self.prompt_ids + self.completion_ids, [False] * len(self.prompt_ids) + self.completion_mask)

    @property
    def num_loss_tokens(self) -> int:
        """Loss tokens of the student's view; a token at position 0 is not predicted and does not count."""
        mask = self.student_view.loss_mask
        return sum(mask[1:])


@dataclass(frozen=True)
class Layout:
    """Several views in one right-padded tensor, and where their loss tokens lie. N = loss tokens of all rows."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), from lengths
    predictors: Tensor  # (N,) index into the flattened (B·T) positions: the position whose logits score targets[n]
    targets: Tensor  # (N,)
    owner: Tensor  # (N,) row in 0..B-1


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: logits = softcap(scale · (hidden Wᵀ + bias)), cut to `vocab_size` columns.

    weight None stands for the identity: hidden states that already are logits.
    """

    weight: Tensor | None  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap what the linear map gave."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits


@dataclass(frozen=True)
class Dense:
    """Scores over the whole vocabulary, kept as what makes them."""

    hidden: Tensor  # (N, H)
    head: Head


@dataclass(frozen=True)
class Sparse:
    """Log-probabilities of k ids a position, and the log of the mass that lies outside them."""

    ids: Tensor  # (N, k)
    logprobs: Tensor  # (N, k), nats
    tail: Tensor  # (N,), log of the remaining mass


Scores = Dense | Sparse


@dataclass
class Batch:
    """A micro-batch: its sequences, laid out for the student, and each loss token's window scores.

    `views` are the layouts of teachers that read something else than the student; their loss tokens are the same, in
    the same order, unless an alignment says otherwise. `weights` carries `loss_normalization`: None where every
    token counts the same.
    """

    sequences: list[TokenSequence]
    layout: Layout
    views: dict[str, Layout] = field(default_factory=dict)
    token_scores: dict[str, Tensor] = field(default_factory=dict)  # {name: (N,)}
    weights: Tensor | None = None  # (N,)


@dataclass(frozen=True)
class Term:
    """weight · sum / (the count of that name over the whole optimizer step and all ranks).

    "tokens" is what `loss_normalization` makes of the loss tokens; other names come from Method.counts.
    """

    sum: Tensor
    count: str
    weight: float = 1.0


@dataclass
class Terms:
    """What a method returns for a micro-batch. A metric is (numerator, denominator), divided after all reductions."""

    terms: list[Term]
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a method asks of the run; the pipeline refuses, before a weight is loaded, what does not fit.

    `teachers`: name -> kind of scores it is read for. `turns`: which assistant turns of a conversation are completion.
    `completions`: "required" (every row must bring one), "optional", or "unused".
    `window`: the method wants token log-probabilities of the whole optimizer step before its loss (Method.window).
    `prompt_loss`: the prompt's tokens are targets too.
    """

    teachers: dict[str, Literal["dense", "any", "logprobs"]] = field(default_factory=dict)
    turns: Literal["all", "last"] = "last"
    completions: Literal["required", "optional", "unused"] = "required"
    rollouts: bool = False
    window: bool = False
    prompt_loss: bool = False
    student_dropout: bool = False
    sequences_per_row: int = 1
    num_substeps: int = 1


class Method(ABC):
    """A distillation method: what it needs, where its sequences come from, and its loss as sums.

    Config (a pydantic model, torch-free) stands beside each method; `config` is the validated instance.
    """

    Config: ClassVar[type]

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What this method, configured as it is, asks of the run."""

    def origin(self, coin: float) -> Origin:
        """Where the completion of one row comes from; `coin` is that row's uniform draw, the same on all ranks."""
        del coin
        return "dataset"

    def counts(self, sequences: Sequence[TokenSequence]) -> dict[str, float]:
        """Denominators beside "tokens", of these sequences; the trainer adds them up over the step and all ranks."""
        del sequences
        return {}

    def window(self, sequences: Sequence[TokenSequence], total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Turn "student_logprobs" and "<teacher>_logprobs" of a whole step into further token scores; metrics of it.

        `total` adds a tensor up over all ranks (every rank calls this). Only if `needs.window`.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for a window and does not use it")

    @abstractmethod
    def loss(self, student: Dense, teachers: dict[str, Scores], batch: Batch) -> Terms:
        """The loss of one micro-batch, as sums over its loss tokens."""

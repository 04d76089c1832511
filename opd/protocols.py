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

Origin = Literal["dataset", "student", "teacher", "mixture"]
"""Who completed a prompt; "mixture": each token from the student's and the teacher's distribution averaged."""

Kind = Literal["single", "chosen", "rejected", "response"]
"""What a completion is to its row: its only one, the preferred one, the other one, or an answer beside these."""


@dataclass(frozen=True)
class Example:
    """One row of data, in the student's ids.

    `completion_mask[k]` says whether completion token k is a loss token (an assistant turn, say); None: every one is.
    `completion_ids` is None for a row that only has a prompt; of preference data it is the chosen answer.
    `alternatives`: further answers to the same prompt, by kind ("rejected", "response"). `teacher_prompts`: what a
    teacher of that name reads before the completion instead of the prompt, in that teacher's ids. `fields`: the row's
    own columns, for scores and samples.
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[int] | None = None
    completion_mask: list[bool] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    alternatives: dict[str, list[int]] = field(default_factory=dict)
    teacher_prompts: dict[str, list[int]] = field(default_factory=dict)


class ExampleSet(Protocol):
    """Data as training sees it: a length, and rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...


Group = tuple[int, int, int, int]
"""Loss tokens [a, b) of the student's view and [c, d) of a teacher's that spell the same text: (a, b, c, d)."""


@dataclass(frozen=True)
class TokenView:
    """One model's reading of a sequence. `loss_mask[t]`: token t is a target; token 0 is predicted by nothing."""

    ids: list[int]
    loss_mask: list[bool]


@dataclass
class TokenSequence:
    """A prompt and one completion of it, with where both came from.

    `finished`: the completion ends in a real stop token (a truncated rollout does not). `views` holds what models other
    than the student read, by teacher name; a teacher without an entry reads the student's view. `alignments`: for a
    view in other tokens, which of its loss tokens say what which of the student's say. `token_scores` are numbers a
    loss token: a rollout's "sampler_logprobs", and what the window part of a method sets. {name: (loss tokens,)}.
    `entropy`: of a rollout, the mean over its tokens of the entropy of what they were drawn from, nats.
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[bool]
    origin: Origin = "dataset"
    finished: bool = True
    member: int = 0
    kind: Kind = "single"
    views: dict[str, TokenView] = field(default_factory=dict)
    alignments: dict[str, list[Group]] = field(default_factory=dict)
    token_scores: dict[str, Tensor] = field(default_factory=dict)
    entropy: float = 0.0

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
    """Several views in one tensor, and where their loss tokens lie. N = loss tokens of all views, in their order.

    Padded: a view a row, filled up on the right. Packed: several views in a row, told apart by positions that begin
    again at 0; there is no attention mask then, and models keep the views apart by the positions.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor | None  # (B, T), from lengths
    position_ids: Tensor | None  # (B, T), of a packed layout
    predictors: Tensor  # (N,) index into the flattened (B·T) positions: the position whose logits score targets[n]
    targets: Tensor  # (N,)
    owner: Tensor  # (N,) number of the view


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

    def at(self, tokens: Tensor) -> Dense:
        """The scores of some of the tokens; `tokens` (n,) are their numbers."""
        return Dense(self.hidden[tokens], self.head)


@dataclass(frozen=True)
class Sparse:
    """Log-probabilities of k ids a position, and the log of the mass that lies outside them."""

    ids: Tensor  # (N, k)
    logprobs: Tensor  # (N, k), nats
    tail: Tensor  # (N,), log of the remaining mass

    def at(self, tokens: Tensor) -> Sparse:
        """The scores of some of the tokens; `tokens` (n,) are their numbers."""
        return Sparse(self.ids[tokens], self.logprobs[tokens], self.tail[tokens])


Scores = Dense | Sparse


@dataclass
class Batch:
    """A micro-batch: its sequences, laid out for the student, and each loss token's window scores.

    `views` are the layouts of teachers that read something else than the student; their loss tokens are the same, in
    the same order, unless `alignments` says otherwise: (G, 5) = the sequence, then its Group counted over the loss
    tokens of the whole batch. `token_scores` holds "<teacher>_logprobs" of every teacher that is asked for these alone.
    `weights` carries `loss_normalization`: None where every token counts the same.
    """

    sequences: list[TokenSequence]
    layout: Layout
    views: dict[str, Layout] = field(default_factory=dict)
    alignments: dict[str, Tensor] = field(default_factory=dict)  # {teacher: (G, 5)}
    token_scores: dict[str, Tensor] = field(default_factory=dict)  # {name: (N,)}
    weights: Tensor | None = None  # (N,)

    def tokens_of(self, kind: Kind) -> Tensor:
        """The numbers of the loss tokens of sequences of this kind, (n,)."""
        owner, kinds = self.layout.owner, [float(sequence.kind == kind) for sequence in self.sequences]
        return owner.new_tensor(kinds)[owner].nonzero()[:, 0]

    def weights_of(self, tokens: Tensor) -> Tensor | None:
        """`weights` of some of the tokens."""
        return None if self.weights is None else self.weights[tokens]


@dataclass(frozen=True)
class Term:
    """weight · sum / (the count of that name over the whole optimizer step and all ranks).

    "tokens" is what `loss_normalization` makes of the loss tokens, "<kind>_tokens" the same of one kind of sequences;
    other names come from Method.counts.
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
class TeacherNeed:
    """What is asked of one teacher, and whose weights it has.

    `scores`: its whole distributions, those or sparse ones, or the log-probability of each loss token alone.
    `model`: "teacher" is model.teacher; "current", "initial" and "ema" are the student itself, as it is, as it was
    before training, or averaged over training; anything else is the key of the config that names a folder, of a model
    or of scores that mode=scores kept of one.
    `kinds`: the sequences it is asked about; scores of the others' tokens are NaN. None: all.
    `precompute`: ask it about every row before training, keep that, and let it go.
    `ema_decay`: of "ema", averaged ← decay · averaged + (1 - decay) · current, after every optimizer step.
    """

    scores: Literal["dense", "any", "logprobs"] = "dense"
    model: str = "teacher"
    kinds: tuple[Kind, ...] | None = None
    precompute: bool = False
    ema_decay: float = 0.999

    @property
    def is_student(self) -> bool:
        """Whether its weights are the student's own."""
        return self.model in ("current", "initial", "ema")


@dataclass(frozen=True)
class Privileged:
    """How a teacher's prompt holds what the student does not see (opd.data.privileged)."""

    template: str  # with {user} and {privileged}: how a string is folded into the last user message
    bridge: str | None  # user message behind privileged messages that end with the assistant
    teacher_prompt: Literal["messages", "full"]  # inserted messages, or the row's own teacher_messages
    layout: Literal["template", "concat"]  # concat: ids of the two prompts one after the other
    on_empty: Literal["error", "keep", "skip"]
    max_length: int | None  # tokens of the teacher's prompt; oldest privileged messages are dropped beyond


@dataclass(frozen=True)
class TextAlignment:
    """How completions are paired with another tokenizer's tokens (opd.sources.text_views)."""

    extended: bool  # by the bytes they spell; false: by position
    skip_student_eos: bool  # the stop token is left out of the comparison
    skip_teacher_eos: bool


@dataclass(frozen=True)
class Needs:
    """What a method asks of the run; the pipeline refuses, before a weight is loaded, what does not fit.

    `sequences`: the kinds that a row is made into; they stay in one micro-batch, in this order.
    `turns`: which assistant turns of a conversation are completion.
    `completions`: "required" (every row must bring one), "optional", or "unused".
    `rows`: use only the first rows of the data.
    `window`: the method wants token log-probabilities of the whole optimizer step before its loss (Method.window), at
    `window_temperature`.
    `teacher_share`: the α of "mixture" rollouts. `alignment`: the teacher reads the same text in its own template and
    ids. `label_states`: the student's and teachers' scores are wanted at the labels' own positions instead of those
    that predict them. `privileged`: the teacher's prompt holds what the student does not see.
    `prompt_loss`: the prompt's tokens are targets too.
    `fixed_point`: a teacher equal to the student leaves nothing to learn: the gradient is zero then.
    `surrogate`: the loss holds the student itself as a constant, so that its value does not follow its gradient.
    """

    teachers: dict[str, TeacherNeed] = field(default_factory=dict)
    sequences: tuple[Kind, ...] = ("single",)
    turns: Literal["all", "last"] = "last"
    completions: Literal["required", "optional", "unused"] = "required"
    rows: int | None = None
    rollouts: bool = False
    teacher_share: float = 0.0
    window: bool = False
    window_temperature: float = 1.0
    alignment: TextAlignment | None = None
    label_states: bool = False
    privileged: Privileged | None = None
    prompt_loss: bool = False
    fixed_point: bool = False
    surrogate: bool = False
    student_dropout: bool = False
    num_substeps: int = 1

    @property
    def pairs(self) -> bool:
        """Whether rows must be preference pairs."""
        return "rejected" in self.sequences

    @property
    def stored_responses(self) -> bool:
        """Whether rows must bring the student's own answers."""
        return "response" in self.sequences and not self.rollouts

    def asked(self, mode: str) -> dict[str, TeacherNeed]:
        """The teachers that a run of this mode asks: none for answers; for scores, those with weights of their own."""
        kept = {"responses": (), "scores": [name for name, need in self.teachers.items() if not need.is_student]}
        return {name: self.teachers[name] for name in kept.get(mode, self.teachers)}


class Method(ABC):
    """A distillation method: what it needs, where its sequences come from, and its loss as sums.

    Config (a pydantic model, torch-free) stands beside each method; `config` is the validated instance.
    """

    Config: ClassVar[type]

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        """Called once, before `needs` is read for loading, where there is a teacher; raises ConfigError."""
        del student_tokenizer, teacher_tokenizer

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What this method, configured as it is, asks of the run."""

    def origin(self, coin: float, kind: Kind) -> Origin:
        """Where a row's completion of this kind comes from; `coin` is its uniform draw, the same on all ranks."""
        del coin, kind
        return "dataset"

    def notes(self) -> list[str]:
        """Warnings about legal but surprising settings, one line each; said once at start."""
        return []

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

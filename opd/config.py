"""The typed schema of everything the YAML may say. No torch here: a bad value is refused before anything is loaded.

Methods keep their own schema beside their loss; `parse` joins the two. A refusal is one line a problem:
`method.beta=3.0: must be less than or equal to 1`.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from opd.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
PathStr = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]  # ~ is one's home


class Schema(BaseModel):
    """A section of the config: immutable, no key beyond those named, types as they are written, finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Run(Schema):
    """Which run this is and where it writes."""

    name: str = Field(min_length=1, description="experiment name; part of the default run.dir")
    dir: PathStr = Field(description="folder of this run; the same command with it continues the run")
    seed: Count = Field(description="seed of every addressed draw: order, rollouts, coins, initial student base")
    resume: PathStr = Field(description="auto: continue an interrupted run.dir; never: refuse one; or a checkpoint")
    preflight: Literal["strict", "warn", "off"] = Field(
        default="strict", description="the checks of mode=check before training: refuse on an error, tell it, or none"
    )


class LoRA(Schema):
    """Low-rank adapters on the student (peft)."""

    r: PositiveInt
    alpha: PositiveInt
    dropout: float = Field(ge=0, lt=1)
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"]


class WalkRecipe(Schema):
    """How a model of the embedded number-walk task is trained from nothing, by the project's own sft."""

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    vocab_size: int = Field(ge=261, description="asked of the tokenizer's training; 512 reaches 468 entries")
    detour_probability: Fraction = Field(description="share of random legal moves in the corpus; never a target")
    hint_probability: Fraction = Field(default=0.0, description="share of prompts in the corpus that show a solution")
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: float = Field(gt=0)
    seed: Count


class Model(Schema):
    """A causal language model: a folder, a hub id, or a recipe that the project trains on first use."""

    path: PathStr | None = Field(description="folder or hub id")
    revision: str | None = Field(default=None, description="hub revision")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(description="auto: follow hardware.precision")
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    trust_remote_code: bool
    chat_template: PathStr | None = Field(
        default=None,
        min_length=1,
        description="file with a chat template that replaces the model's; training: TRL's for this family",
    )
    thinking: bool | None = Field(default=None, description="enable_thinking of the chat template; null: its default")
    quantization: Literal["8bit", "4bit"] | None = Field(default=None, description="bitsandbytes, frozen weights")
    recipe: WalkRecipe | None = None


class Student(Model):
    """The model that learns."""

    init: PathStr | None = Field(default=None, description="weights to start from instead: a folder, or stage:NAME")
    lora: LoRA | None = None
    gradient_checkpointing: bool = False


class Teacher(Model):
    """The model that scores. path and recipe both null: there is none."""

    top_k: PositiveInt | None = Field(
        default=None,
        description="score only the teacher's k likeliest ids and the tail's mass; null: whole vocabulary",
    )

    @property
    def exists(self) -> bool:
        """Whether a teacher is configured."""
        return self.path is not None or self.recipe is not None


class Models(Schema):
    """The student and the teacher."""

    student: Student
    teacher: Teacher


class Origin(Schema):
    """Where rows come from: a file, a folder of dataset files, or a hub id; and what its columns are called."""

    path: PathStr | None = Field(default=None, description="file, dataset folder or hub id")
    subset: str | None = Field(default=None, description="configuration of a hub data set")
    split: str = Field(default="train", description="of a hub data set or a folder")
    revision: str | None = Field(default=None, description="hub revision")
    columns: dict[str, str | None] = Field(default_factory=dict, description="opd's column: the file's; null: the same")


class MixedOrigin(Origin):
    """One part of a mixture."""

    weight: float = Field(gt=0, description="its share of the rows, relative to the other parts")


class Data(Origin):
    """Prompts, and the completions some methods need."""

    name: Literal["walk", "file", "hub", "mixture"]
    variant: Literal["plain", "bold", "short", "hint"] = Field(default="plain", description="of the walk: docs/walk.md")
    sources: dict[str, MixedOrigin] = Field(default_factory=dict, description="the parts of data=mixture, by name")
    eval_path: PathStr | None = Field(default=None, description="rows for evaluation from here, not held-out ones")
    eval_split: str | None = Field(default=None, description="rows for evaluation from this split of path")
    streaming: bool = Field(default=False, description="read rows as training reaches them; needs train.max_steps")
    shuffle_buffer: PositiveInt = Field(default=10_000, description="rows that a stream is shuffled within")
    bad_rows: Literal["refuse", "drop"] = Field(default="refuse", description="a row that cannot be read: drop counts")
    system_prompt: str | None = Field(default=None, description="system message of conversations that bring none")
    responses: PathStr | None = Field(default=None, description="folder of answers to the prompts (mode=responses)")
    limit: PositiveInt | None = Field(default=None, description="use only the first rows")
    eval_prompts: Count = Field(description="prompts held out for evaluation")
    max_prompt_length: PositiveInt = Field(description="tokens; a longer prompt is dropped and counted")
    max_completion_length: PositiveInt = Field(description="tokens; a longer data completion is cut and counted")

    @property
    def origins(self) -> dict[str, Origin]:
        """Where training rows come from, by the key that says so: data, or data.sources.NAME."""
        if self.name == "mixture":
            return {f"data.sources.{name}": self.sources[name] for name in sorted(self.sources)}
        return {"data": self}

    @property
    def paths(self) -> dict[str, str]:
        """Every file, folder or hub id that rows come from, by its key."""
        named = {f"{key}.path": origin.path for key, origin in self.origins.items()}
        return {key: path for key, path in {**named, "data.eval_path": self.eval_path}.items() if path is not None}


class Hardware(Schema):
    """Where the run computes. No hyper-parameter of a method belongs here."""

    name: str
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(description="auto: CUDA, MPS or CPU, whichever is there")
    nodes: PositiveInt
    processes_per_node: PositiveInt
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(description="auto: on CUDA bf16, else fp32")
    threads: PositiveInt = Field(description="CPU threads a process; more than one can be slower on tiny models")
    sharding: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        default="ddp", description="what of the student lies on one rank only: ddp nothing, zero1 optimizer state, …"
    )
    teacher_placement: Literal["local", "fsdp2", "zero3", "cpu_offload"] = Field(
        default="local", description="local: whole on every rank; fsdp2, zero3: in shards; cpu_offload: in main memory"
    )
    deepspeed: PathStr | None = Field(default=None, description="a DeepSpeed JSON instead of opd's own")

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.nodes * self.processes_per_node


class Rollout(Schema):
    """How completions are sampled. Nothing here touches the loss."""

    engine: Literal["hf"]
    max_completion_tokens: PositiveInt
    temperature: float = Field(ge=0, description="0: greedy")
    top_p: float = Field(gt=0, le=1)
    top_k: Count = Field(description="0: off")
    group_size: PositiveInt = Field(description="completions a prompt")
    batch_size: PositiveInt = Field(description="sequences sampled together on a rank")


class Train(Schema):
    """The optimizer steps."""

    max_steps: PositiveInt | None = Field(description="optimizer steps; null: num_epochs decides")
    num_epochs: float = Field(gt=0, description="passes over the prompts, if max_steps is null")
    batch_size: PositiveInt = Field(description="prompts in one optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(description="sequences in one forward; changes memory, not the result")
    packing: bool = Field(default=False, description="several sequences in a row instead of padding; same result")
    learning_rate: float = Field(gt=0)
    optimizer: Literal["adamw", "rmsprop", "sgd"]
    adam_betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), strict=False)
    weight_decay: float = Field(ge=0)
    lr_scheduler: Literal["constant", "linear", "cosine"]
    warmup_steps: Count
    warmup_ratio: Fraction = Field(description="share of the steps; used where warmup_steps is 0")
    min_lr_ratio: Fraction = Field(default=0.0, description="cosine ends at this share of the learning rate")
    max_grad_norm: float = Field(ge=0, description="0: no clipping")
    eval_every_steps: Count = Field(description="0: only before and after")
    save_every_steps: Count = Field(description="0: no checkpoints, so no resume; the final model is always saved")
    save_every_epoch: bool = Field(default=False, description="a checkpoint a pass over the prompts instead")
    keep_checkpoints: PositiveInt
    log_every_steps: PositiveInt
    sample_every_steps: Count = Field(description="write rollouts to samples.jsonl; 0: only before and after")


class LmEval(Schema):
    """Tasks of lm-eval (EleutherAI), before and after training."""

    tasks: list[PathStr] = Field(default_factory=list, description="names, or files of task YAML; []: none")
    limit: PositiveInt | None = Field(default=None, description="documents a task; null: all")
    num_fewshot: Count | None = Field(default=None, description="null: what the task says")
    chat_template: bool = Field(default=True, description="ask through the student's chat template, if it has one")


class Evaluation(Schema):
    """What is measured before and after (and every train.eval_every_steps)."""

    greedy: bool
    sampled: bool = Field(description="also at temperature 1: the ranking of methods differs")
    divergence: bool = Field(description="KL to the teacher, both ways, in nats a token")
    divergence_prompts: PositiveInt
    max_completion_tokens: PositiveInt | None = Field(description="null: rollout.max_completion_tokens")
    batch_size: PositiveInt
    lm_eval: LmEval = Field(default_factory=LmEval)


class Tracking(Schema):
    """Experiment trackers beside the run folder, which always holds everything."""

    backend: Literal["none", "wandb", "tensorboard"]
    project: str | None = None
    name: str | None = Field(default=None, description="what the tracker calls the run; null: its folder's name")
    mode: Literal["online", "offline", "disabled"] = "offline"
    tags: list[str] = Field(default_factory=list)


class Artifacts(Schema):
    """Where what is made once and used again is kept, addressed by content."""

    dir: PathStr


class MethodConfig(Schema):
    """What every method's config has."""

    name: str
    loss_normalization: Literal["token", "sequence", "sum", "constant"] = "token"


_DECIDE = ("lmbda", "seq_kd", "kd_temperature")  # of a method: whether it samples, and what it asks its teachers


class Config(Schema):
    """One run, resolved."""

    mode: Literal["train", "check", "plan", "eval", "responses", "scores"]
    run: Run
    model: Models
    method: MethodConfig
    data: Data
    hardware: Hardware
    rollout: Rollout
    train: Train
    evaluation: Evaluation
    tracking: Tracking
    artifacts: Artifacts

    @property
    def trains(self) -> bool:
        """Whether this run trains, or is checked as one that would."""
        return self.mode in ("train", "check")

    @property
    def is_embedded(self) -> bool:
        """Whether it is of the embedded task: its rows, or models that are trained before it begins."""
        models = (self.model.student, self.model.teacher)
        return self.data.name == "walk" or any(model.path is None and model.recipe is not None for model in models)

    @property
    def method_words(self) -> str:
        """The method, with the settings that what it needs depends on."""
        told = {key: getattr(self.method, key) for key in _DECIDE if hasattr(self.method, key)}
        return " ".join([f"method={self.method.name}", *(f"method.{key}={value}" for key, value in told.items())])

    def at(self, key: str) -> Any:
        """The value of a dotted key, e.g. "method.beta"."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value


def parse(raw: dict[str, Any], method_schema: type[MethodConfig]) -> Config:
    """The validated config. Raises ConfigError with one line a problem."""
    schema = create_model("Config", __base__=Config, method=(method_schema, ...))
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(schema, error.errors()))) from None


def did_you_mean(word: str, candidates: list[str]) -> str:
    """'; did you mean X?' for the nearest candidate, else all of them."""
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(candidates))}"


def _lines(schema: type[BaseModel], problems: list[ErrorDetails]) -> list[str]:
    """One a key: what each kind of value that it takes has against this one."""
    lines: dict[str, str] = {}
    for problem in problems:
        # Of a key that takes several kinds of values, the kind is the last part ("list[str]").
        location = [str(part) for part in problem["loc"] if "[" not in str(part)]
        key = ".".join(location)
        line = _line(schema, location, problem)
        lines[key] = f"{lines[key]}, or {line.partition(': must ')[2]}" if key in lines else line
    return list(lines.values())


def _line(schema: type[BaseModel], location: list[str], problem: ErrorDetails) -> str:
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = list(_section(schema, location[:-1]).model_fields)
        return f"{key}={problem['input']!r}: unknown key; {did_you_mean(location[-1], known)}"
    if problem["type"] == "missing":
        return f"{key}: missing; set it on the command line or in a config file"
    message = re.sub(r"^(Input|\w+) should ", "must ", problem["msg"])
    if problem["type"] == "list_type":
        message += f"; write [{problem['input'] if isinstance(problem['input'], str) else 'a, b'}]"
    return f"{key}={problem['input']!r}: {message}"


def _section(schema: type[BaseModel], location: list[str]) -> type[BaseModel]:
    for part in location:
        field = schema.model_fields.get(part)
        annotation = field.annotation if field else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            break
        schema = nested[0]
    return schema

"""What cannot run is refused in one line a problem that names key, value and remedy, and touches nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.bad_input import is_refused, names
from e2e.command import ENVIRONMENT, ROOT, call, snapshot
from e2e.model_folders import file_run

ROWS = "data=file data.path=rows.jsonl"
FILE = f"{ROWS} model/student=path"
STREAM = f"{ROWS} data.streaming=true train.max_steps=1"
LORA, PLUS = "model/adapter=lora", "+data.sources.a"
PART = f"data=mixture {PLUS}"

# The command's words -> for every line of stderr, what it has to name.
KNOWN_FROM_THE_CONFIG: dict[str, list[tuple[str, ...]]] = {
    # Keys and groups
    "train.learnin_rate=1": [("train.learnin_rate: unknown key", "did you mean train.learning_rate?")],
    "+train.learnin_rate=1": [("train.learnin_rate=1: unknown key", "did you mean learning_rate?")],
    "++train.extra=1": [("train.extra=1: unknown key", "known here: adam_betas, batch_size")],
    "+zzz=1": [("zzz=1: unknown key", "known here: artifacts, data")],
    "method=sft method.beta=1": [("method.beta: unknown key", "method=adpa (or method=dpo, method=gkd) has it")],
    "model.student.lora.r=8": [("model.student.lora.r: unknown key", "model/adapter=lora has it")],
    f"{FILE} data.columns.promt=q": [("data.columns.promt: unknown key", "did you mean data.columns.prompt?")],
    "method=gdk": [("method=gdk: no such option", "did you mean gkd?")],
    "model/student=wlk": [("model/student=wlk: no such option", "did you mean walk?")],
    "tracking=tensorbord": [("tracking=tensorbord: no such option", "did you mean tensorboard?")],
    "experiment=nope": [("experiment=nope: no such option", "choose from", "walk_gkd")],
    "methd=gkd": [("methd: unknown key", "did you mean method?")],
    "model/studnt=walk": [("model/studnt: unknown key", "did you mean model/student?")],
    "method.name=foo": [
        ("method.name='foo': unknown method", "known here: adpa, dckd, dpo, gkd, gold, minillm, opsd, reverse_kl, sft")
    ],
    # How an override is written
    "train.max_steps=[1": [("train.max_steps=[1: not an override", "write key=value")],
    "train.max_steps": [("train.max_steps: not an override", "write key=value")],
    "run.dir=${nope}": [("run.dir: Interpolation key 'nope' not found", "mend what stands in ${…}")],
    "run.dir=${oc.env:OPD_NOPE}": [("run.dir:", "Environment variable 'OPD_NOPE' not found", "mend")],
    # Types
    "train.max_steps=abc": [("train.max_steps='abc': must be a valid integer",)],
    "train.max_steps=2.5": [("train.max_steps=2.5: must be a valid integer",)],
    "train.batch_size=true": [("train.batch_size=True: must be a valid integer",)],
    "train.batch_size=null": [("train.batch_size=None: must be a valid integer",)],
    "evaluation.greedy=perhaps": [("evaluation.greedy='perhaps': must be a valid boolean",)],
    "method.beta=[1,2]": [("method.beta=[1, 2]: must be a valid number",)],
    "method.beta=": [("method.beta='': must be a valid number",)],
    "train=5": [("train=5: must be a valid dictionary",)],
    "train.optimizer=sgd train.adam_betas=[0.9,0.95] train.lr_scheduler=linear train.min_lr_ratio=0.1": [
        ("train.adam_betas=[0.9, 0.95]: train.optimizer=sgd has none", "set it to [0.9, 0.999], or"),
        ("train.min_lr_ratio=0.1: train.lr_scheduler=linear has no such end", "set it to 0, or"),
    ],
    "train.optimizer=lion": [("train.optimizer='lion': must be 'adamw', 'rmsprop' or 'sgd'",)],
    "hardware.device=tpu": [("hardware.device='tpu': must be 'auto', 'cpu', 'cuda' or 'mps'",)],
    "mode=trian": [("mode='trian': must be 'train', 'check', 'plan', 'eval', 'responses' or 'scores'",)],
    "run.name=": [("run.name='': must have at least 1 character",)],
    "train.adam_betas=[0.9]": [("train.adam_betas.1: missing", "set it")],
    "model.student.lora={r:8,alpha:8,dropout:0.0}": [("model.student.lora.targets: missing", "set it")],
    # Two problems, two lines
    "train.max_steps=-1 method.beta=3": [
        ("method.beta=3: must be less than or equal to 1",),
        ("train.max_steps=-1: must be greater than or equal to 1",),
    ],
    "data.limit=10000 data.eval_prompts=600": [
        ("data.limit=10000:", "lower it to 6941 or less"),
        ("data.eval_prompts=600:", "lower it to 512 or less"),
    ],
    # What does not go together
    "data=file": [("data.path: missing", "set data.path=")],
    "model/student=path": [("model.student.path: missing", "set model.student.path=")],
    "model/teacher=path": [("model.teacher.path: missing", "set model.teacher.path=")],
    "model/teacher=none": [("model/teacher=none: method=gkd needs a teacher", "set model/teacher=path")],
    "model.student.recipe=null": [("model.student.path=None: the student needs a folder or hub id", "model/student=")],
    "model.student.recipe.hidden_size=33": [
        ("model.student.recipe.hidden_size=33: not a multiple", "choose a multiple of 8")
    ],
    "data=file data.path=/nonexistent/rows.jsonl": [("data.path=/nonexistent/rows.jsonl: no such file", "give a")],
    "data=file data.path=/usr": [("data.path=/usr: is a folder", "name one file in it")],
    "method=sft data=file data.path=rows.txt": [
        ("data.path=rows.txt: a .txt file holds prompts only", "method=sft", "give .jsonl rows")
    ],
    "model/student=path model.student.path=/nonexistent": [
        ("model.student.path=/nonexistent: no such folder", "give a model folder")
    ],
    "model/student=path model.student.path=/usr": [
        ("model.student.path=/usr: not a model folder (no config.json)", "save_pretrained")
    ],
    "train.batch_size=7 hardware=cpu_2rank": [
        ("train.batch_size=7: not a multiple of the 2 processes of hardware=cpu_2rank", "choose one that is")
    ],
    "method=sft rollout.group_size=2": [("rollout.group_size=2: method=sft", "samples nothing", "set it to 1")],
    "model.teacher.top_k=4 method.kd_temperature=2": [("model.teacher.top_k=4:", "whole distribution", "null")],
    "mode=plan": [("mode=plan: not built yet", "use train, check, eval, responses or scores")],
    "hardware.nodes=2": [("hardware.nodes=2: nobody started", "hydra/launcher=slurm", "srun")],
    "hardware.sharding=fsdp2": [("hardware.sharding=fsdp2:", "one process", "set it to ddp")],
    "hardware.teacher_placement=zero3": [("hardware.teacher_placement=zero3:", "one process", "set it to local")],
    "hardware.deepspeed=own.json": [("hardware.deepspeed=own.json:", "hardware.sharding=ddp", "set it to null")],
    "hardware=cpu_2rank hardware.sharding=fsdp2 hardware.precision=fp16": [("hardware.precision=fp16:", "bf16")],
    # Models and adapters
    "model/student=qwen3_8b_bas": [("model/student=qwen3_8b_bas: no such option", "did you mean qwen3_8b_base?")],
    "model/teacher=qwen3_32": [("model/teacher=qwen3_32: no such option", "did you mean qwen3_32b?")],
    "model/adapter=lor": [("model/adapter=lor: no such option", "did you mean lora?")],
    "experiment=walk_gdk": [("experiment=walk_gdk: no such option", "did you mean walk_gkd?")],
    "model.student.path=": [("model.student.path='': must have at least 1 character",)],
    "model.student.chat_template=": [("model.student.chat_template='': must have at least 1 character",)],
    "model.student.chat_template=chatlm": [("model.student.chat_template=chatlm: no such file", "one of training, ch")],
    "model/student=path model.student.path=model model.student.revision=v2": [
        ("model.student.revision=v2: model.student.path=model is a folder", "set it to null")
    ],
    "model/teacher=path model.teacher.path=model model.teacher.revision=v2": [
        ("model.teacher.revision=v2: model.teacher.path=model is a folder", "set it to null")
    ],
    "model.student.revision=5": [("model.student.revision=5: must be a valid string",)],
    "model.student.dtype=fp8": [("model.student.dtype='fp8': must be 'auto', 'float32', 'bfloat16' or 'float16'",)],
    "model.student.attention=sdp": [("model.student.attention='sdp': must be 'sdpa', 'eager' or 'flash_attention_2'",)],
    "model.student.thinking=maybe": [("model.student.thinking='maybe': must be a valid boolean",)],
    "model.student.trust_remote_code=5": [("model.student.trust_remote_code=5: must be a valid boolean",)],
    "model.student.quantization=3bit": [("model.student.quantization='3bit': must be '8bit' or '4bit'",)],
    "model.student.quantization=4bit": [
        ("model.student.quantization=4bit: quantized weights cannot be trained", "add model/adapter=lora")
    ],
    f"{LORA} model.student.lora.targets=null": [
        ("model.student.lora.targets=None: must be a valid list", "write [a, b], or be 'all-linear'")
    ],
    f"{LORA} model.student.lora.targets=q_proj": [
        ("model.student.lora.targets='q_proj': must be a valid list; write [q_proj], or be 'all-linear'",)
    ],
    f"{LORA} model.student.lora.targets=[]": [("model.student.lora.targets=[]: must have at least 1 item",)],
    f"{LORA} model.student.lora.rank=8": [("model.student.lora.rank: unknown key", "mean model.student.lora.r?")],
    f"{LORA} model.student.lora.dropout=1": [("model.student.lora.dropout=1: must be less than 1",)],
    # Data
    "data=tulu": [("data=tulu: no such option", "did you mean tulu3?")],
    "data=hub": [("data.path: missing", "set data.path=")],
    "data=hub data.path=/nonexistent/set": [("data.path=/nonexistent/set: no such file", "folder or a hub id")],
    f"{ROWS} data.path=": [("data.path='': must have at least 1 character",)],
    f"{ROWS} data.bad_rows=maybe": [("data.bad_rows='maybe': must be 'refuse' or 'drop'",)],
    f"{ROWS} data.eval_path=nope.jsonl": [("data.eval_path=nope.jsonl: no such file", "give a")],
    f"{ROWS} data.eval_split=test": [("data.eval_split=test: data=file has no splits", "set data.eval_path")],
    f"{ROWS} data.eval_path=rows.json data.eval_prompts=0": [
        ("data.eval_path=rows.json: data.eval_prompts=0 evaluates on no row", "set data.eval_path to null")
    ],
    f"{ROWS} data.subset=chat": [("data.subset=chat: data=file reads one file", "leave it null, or use data=hub")],
    f"{ROWS} data.revision=v2": [("data.revision=v2: data=file reads one file", "leave it null, or use data=hub")],
    f"{ROWS} data.split=test": [("data.split=test: data=file reads one file", "leave it train, or use data=hub")],
    f"{ROWS} data.columns=prompt": [("data.columns='prompt': must be a valid dictionary",)],
    f"{ROWS} +data.sources.a={{path:rows.jsonl,weight:1}}": [("data.sources: data=file has one source", "=mixture")],
    "data=prompts_file data.path=rows.txt method=dpo": [
        ("data.path=rows.txt: a .txt file holds prompts only", "method=dpo", "give .jsonl rows")
    ],
    # Mixtures and streams
    "data=mixture": [("data.sources={}: a mixture of nothing", "+data.sources.NAME.path=")],
    f"{PART}.path=rows.jsonl": [("data.sources.a.weight: missing", "set it")],
    f"{PART}.weight=1": [("data.sources.a.path=None: data=mixture reads rows", "set data.sources.a.path to a file")],
    f"{PART}.path=rows.jsonl {PLUS}.weight=0": [("data.sources.a.weight=0: must be greater than 0",)],
    f"{PART}.path=rows.jsonl {PLUS}.weight=-1": [("data.sources.a.weight=-1: must be greater than 0",)],
    f"{PART}.path=nope.jsonl {PLUS}.weight=1": [("data.sources.a.path=nope.jsonl: no such file", "give a")],
    f"{PART}.path=rows.jsonl {PLUS}.weight=1 {PLUS}.colums=1": [
        ("data.sources.a.colums=1: unknown key", "did you mean columns?")
    ],
    "data=mixture data.sources.a.path=rows.jsonl": [("data.sources.a: no such source yet", "put a + before")],
    "data=mixture +data.sources=[rows.jsonl]": [("data.sources=[rows.jsonl]: not the kind of value", "--cfg job")],
    f"{PART}={{path:rows.jsonl,weight:1}} data.streaming=true train.max_steps=1": [
        ("data.streaming=true: data=mixture needs to know how many rows there are", "set it to false")
    ],
    f"{ROWS} data.streaming=true": [("train.max_steps=None: data.streaming=true knows no end", "set train.max_steps")],
    f"{STREAM} data.path=rows.json": [("data.streaming=true: data.path=rows.json can only be read whole", ".jsonl")],
    f"{STREAM} train.save_every_epoch=true": [
        ("train.save_every_epoch=true: data.streaming", "train.save_every_steps")
    ],
    f"{STREAM} mode=responses": [("data.streaming=true: mode=responses goes over all rows", "set it to false")],
    "data.streaming=true": [("data.streaming: unknown key", "data=file (or data=hub, data=tulu3) has it")],
    # Checks, tasks and trackers
    "run.preflight=true": [("run.preflight=True: must be 'strict', 'warn' or 'off'",)],
    "evaluation.lm_eval.tasks=gsm8k": [("evaluation.lm_eval.tasks='gsm8k': must be a valid list; write [gsm8k]",)],
    "evaluation.lm_eval.tasks=[no.yaml]": [("evaluation.lm_eval.tasks=no.yaml: no such file", "give a task's YAML")],
    "evaluation.lm_eval.limit=0": [("evaluation.lm_eval.limit=0: must be greater than or equal to 1",)],
    "tracking=mlflow": [("tracking=mlflow: no such option", "choose from none, tensorboard, wandb")],
    "tracking=wandb tracking.mode=onlin": [("tracking.mode='onlin': must be 'online', 'offline' or 'disabled'",)],
    # The run's folder
    "run.dir=rows.txt/run": [("run.dir=rows.txt/run: lies in a file", "choose another folder")],
    "run.dir=": [("run.dir='': must have at least 1 character",)],
    "run.dir=rows.txt": [("run.dir=rows.txt: is a file", "choose another folder")],
    "run.dir=/usr": [("run.dir=/usr: not empty, and not a run's folder (no config.yaml)", "choose another folder")],
    "run.resume=/nonexistent": [("run.resume=/nonexistent: not a checkpoint folder", "auto, never, or a checkpoint-N")],
}
OUT_OF_RANGE = {
    "run.seed": ("-1", ">= 0"),
    "train.max_steps": ("0", ">= 1"),
    "train.num_epochs": ("0", "> 0"),
    "train.batch_size": ("0", ">= 1"),
    "train.micro_batch_size": ("0", ">= 1"),
    "train.learning_rate": ("0", "> 0"),
    "train.adam_betas": ("[0.9,1.0]", "< 1"),
    "train.weight_decay": ("-0.1", ">= 0"),
    "train.warmup_steps": ("-1", ">= 0"),
    "train.warmup_ratio": ("1.5", "<= 1"),
    "train.min_lr_ratio": ("-0.5", ">= 0"),
    "train.max_grad_norm": ("-1", ">= 0"),
    "train.eval_every_steps": ("-1", ">= 0"),
    "train.save_every_steps": ("-1", ">= 0"),
    "train.keep_checkpoints": ("0", ">= 1"),
    "train.log_every_steps": ("0", ">= 1"),
    "train.sample_every_steps": ("-1", ">= 0"),
    "rollout.max_completion_tokens": ("0", ">= 1"),
    "rollout.temperature": ("-0.1", ">= 0"),
    "rollout.top_p": ("0", "> 0"),
    "rollout.top_k": ("-1", ">= 0"),
    "rollout.group_size": ("0", ">= 1"),
    "rollout.batch_size": ("0", ">= 1"),
    "data.limit": ("0", ">= 1"),
    "data.eval_prompts": ("-1", ">= 0"),
    "data.max_prompt_length": ("0", ">= 1"),
    "data.max_completion_length": ("0", ">= 1"),
    "evaluation.divergence_prompts": ("0", ">= 1"),
    "hardware.threads": ("0", ">= 1"),
    "model.teacher.top_k": ("0", ">= 1"),
    "model.teacher.recipe.vocab_size": ("100", ">= 261"),
    "method.beta": ("1.01", "<= 1"),
    "method.lmbda": ("-0.01", ">= 0"),
    "method.kd_temperature": ("0", "> 0"),
    "method=reverse_kl method.kl_coef": ("0", "> 0"),
    "method=reverse_kl method.kl_discount": ("1.5", "<= 1"),
    "method=reverse_kl method.num_substeps": ("0", ">= 1"),
    "method=reverse_kl method.clip_epsilon": ("1.0", "< 1"),
}
BOUNDS = {
    ">=": "must be greater than or equal to",
    ">": "must be greater than",
    "<=": "must be less than or equal to",
    "<": "must be less than",
}
NOT_FINITE = {"train.learning_rate": "nan", "method.beta": "nan", "train.weight_decay": "inf"}

for words, (value, bound) in OUT_OF_RANGE.items():
    key, (sign, number) = words.split()[-1], bound.split()
    line = f"{key}=" if value.startswith("-") or "[" not in value else f"{key}.1="
    # The walk student's seed follows run.seed, and is refused with it.
    extra = [("model.student.recipe.seed=-1",)] if key == "run.seed" else []
    KNOWN_FROM_THE_CONFIG[f"{words}={value}"] = [(line, f"{BOUNDS[sign]} {number}"), *extra]
for key, value in NOT_FINITE.items():
    KNOWN_FROM_THE_CONFIG[f"{key}={value}"] = [(f"{key}={value}: must be a finite number",)]

ASK_ALL = """
import json, sys, time
from e2e.command import call, snapshot
from pathlib import Path
answers = {}
for words in json.load(sys.stdin):
    before, started = snapshot(Path()), time.process_time()
    answer = call(*([] if "run.dir=" in words else ["run.dir=run"]), *words.split())
    answers[words] = {
        "code": answer.code, "stdout": answer.stdout, "lines": answer.lines, "touched": snapshot(Path()) != before,
        "torch": "torch" in sys.modules, "seconds": time.process_time() - started,
    }
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def config_answers(tmp_path_factory):
    """All of them asked in one process, which never needs torch."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "rows.txt").write_text("What is 2 plus 2?\n")
    (folder / "rows.json").write_text('[{"prompt": "What is 2 plus 2?", "completion": "4"}]')
    (folder / "rows.jsonl").write_text('{"prompt": "What is 2 plus 2?", "completion": "4"}\n')
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL],
        input=json.dumps(list(KNOWN_FROM_THE_CONFIG)),
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", KNOWN_FROM_THE_CONFIG)
def test_what_the_config_alone_forbids_is_refused_without_torch(config_answers, words):
    answer = config_answers[words]
    assert answer["code"] == 2
    names(answer["lines"], KNOWN_FROM_THE_CONFIG[words])
    assert not answer["stdout"]
    assert not answer["touched"]
    assert not answer["torch"]
    assert answer["seconds"] < 2


def test_the_same_command_with_nothing_broken_runs(place):
    assert call(*place.words("train.max_steps=1")).code == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("data=walk_bold method=opsd", ("data.variant=bold: method=opsd needs a hint", "use data=walk_hint")),
        ("data=walk method=dpo", ("data.variant=plain: method=dpo learns from preference", "use data=walk_bold")),
    ],
)
def test_a_walk_without_what_the_method_needs_is_refused_before_its_models_are_made(words, parts, monkeypatch):
    monkeypatch.setattr("opd.pipeline.ensure_models", lambda _: pytest.fail("models are made"))
    answer = call("run.dir=run", *words.split())
    assert answer.code == 2
    names(answer.lines, [parts])
    assert not snapshot(Path())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, student, teacher, rows):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert call(*file_run(folder, rows, student, teacher)).code == 0
    return folder


@pytest.mark.parametrize(
    ("more", "is_finished", "parts"),
    [
        ("", True, ("holds a finished run", "choose another run.dir")),
        ("run.resume=never", False, ("holds a run, and run.resume=never", "or run.resume=auto")),
        ("method.beta=0.25", False, ("another config (method.beta: 0.5 there, 0.25 here)", "choose another folder")),
        ("method=reverse_kl train.batch_size=4", False, ("another config (", "; and ", " more)")),
    ],
)
def test_a_folder_that_holds_another_run_is_left_as_it_was(place, finished_run, more, is_finished, parts):
    shutil.copytree(finished_run, place.run)
    if not is_finished:
        result = json.loads((place.run / "result.json").read_text())
        (place.run / "result.json").write_text(json.dumps({"before": result["before"]}))
    before = snapshot(place.run)
    answer = call(*place.words(*more.split()))
    assert answer.code == 2
    names(answer.lines, [(f"run.dir={place.run}: ", *parts)])
    assert snapshot(place.run) == before


def test_a_folder_that_cannot_be_made_is_refused(place):
    place.run = Path("/proc/opd/run")
    answer = call(*place.words())
    assert answer.code == 2
    names(answer.lines, [("run.dir=/proc/opd/run: cannot be made", "choose another folder")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_in_a_read_only_one_is_refused(place):
    parent = place.folder / "closed"
    parent.mkdir(mode=0o500)
    place.run = parent / "run"
    answer = call(*place.words())
    assert answer.code == 2
    names(answer.lines, [(f"run.dir={place.run}: cannot be made (Permission denied)", "choose another folder")])


def test_a_folder_on_a_disk_that_is_read_only_is_refused(place, small_disk):
    disk, resize = small_disk
    assert resize(100, "ro")
    place.run = disk / "run"
    is_refused(place, (), (f"run.dir={place.run}: cannot be made (Read-only file system)", "choose another folder"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_rows_that_may_not_be_read_are_refused(place):
    place.rows = place.write("closed.jsonl", '{"prompt": "a", "completion": "b"}\n')
    place.rows.chmod(0)
    is_refused(place, (), (f"data.path={place.rows}: cannot be read (Permission denied)", "its permissions"))


def test_a_run_whose_loss_is_no_number_fails_in_one_line(place):
    answer = call(*place.words("train.learning_rate=1e30", "train.optimizer=sgd", "train.max_grad_norm=0"))
    assert answer.code == 1
    names(answer.lines[-1:], [("step 2: the loss is nan", "lower train.learning_rate")])
    assert "ERROR step 2: the loss is nan" in (place.run / "training.log").read_text().splitlines()[-1]
    assert "Traceback" not in answer.stderr


FOUR_STEPS = ("train.max_steps=4", "train.save_every_steps=2", "evaluation.sampled=false")


def _fails_to_save(answer, place) -> None:
    assert answer.code == 1
    names(answer.lines[-1:], [(f"run.dir={place.run}: checkpoint-", "could not be saved", "free space and run the")])
    assert "Traceback" not in answer.stderr


def _continues(place) -> None:
    assert call(*place.words(*FOUR_STEPS)).code == 0
    steps = [json.loads(line)["step"] for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps) - {0}) == [1, 2, 3, 4]
    assert not list(place.run.glob(".*"))
    assert (place.run / "final_model" / "model.safetensors").is_file()


@pytest.fixture
def file_limit(student):
    """Limits the bytes of every file that is written from then on, as a share of the student's weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = (student / "model.safetensors").stat().st_size
    yield lambda share: resource.setrlimit(resource.RLIMIT_FSIZE, (int(weights * share) if share else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["weights", "moments of the optimizer"])
def test_a_file_that_cannot_be_written_fails_the_run_and_leaves_no_half_checkpoint(place, file_limit, share):
    file_limit(share)
    answer = call(*place.words(*FOUR_STEPS))
    file_limit(None)
    _fails_to_save(answer, place)
    assert not list(place.run.glob("checkpoint-*"))
    _continues(place)


def test_a_final_model_that_cannot_be_written_fails_the_run_and_the_same_command_finishes_it(place, file_limit):
    words = place.words("train.save_every_steps=0")
    file_limit(0.5)
    answer = call(*words)
    file_limit(None)
    assert answer.code == 1
    names(answer.lines[-1:], [(f"run.dir={place.run}: final_model could not be written", "free space and run the")])
    assert call(*words).code == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system that can be given its size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(kilobytes: int, *options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={kilobytes}k"]), "tmpfs", str(disk)]
        return (
            shutil.which("mount") is not None
            and subprocess.run(words, capture_output=True, check=False).returncode == 0
        )

    if os.geteuid() or not resize(100):
        pytest.skip("needs the right to mount")
    yield disk, lambda kilobytes, *options: resize(kilobytes, "remount", *options)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_fails_the_run_whose_earlier_checkpoint_continues_it(place, small_disk, finished_run):
    disk, resize = small_disk
    checkpoint = sum(-(-file.stat().st_size // 4096) * 4 for file in (finished_run / "checkpoint-2").iterdir())
    assert resize(checkpoint * 3 // 2)
    place.run = disk / "run"
    _fails_to_save(call(*place.words(*FOUR_STEPS)), place)
    assert [path.name for path in place.run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert resize(64_000)
    _continues(place)
    assert "continues the interrupted run" in (place.run / "training.log").read_text()

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

from e2e.command import ENVIRONMENT, ROOT, call, snapshot
from e2e.model_folders import CHATML, build_model, build_tokenizer, file_run

FILE = "data=file data.path=rows.jsonl model/student=path"

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
    "train.optimizer=lion": [("train.optimizer='lion': must be 'adamw', 'rmsprop' or 'sgd'",)],
    "hardware.device=tpu": [("hardware.device='tpu': must be 'cpu', 'cuda' or 'mps'",)],
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
    "hardware.nodes=2": [("hardware.nodes=2: several nodes are not built yet", "set it to 1")],
    # The run's folder
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
    _names(answer["lines"], KNOWN_FROM_THE_CONFIG[words])
    assert not answer["stdout"]
    assert not answer["touched"]
    assert not answer["torch"]
    assert answer["seconds"] < 2


def _names(lines: list[str], expected: list[tuple[str, ...]]) -> None:
    """Every line is one problem's, and names what it should."""
    assert len(lines) == len(expected), lines
    for line, parts in zip(lines, expected, strict=True):
        assert line.startswith("opd: ")
        missing = [part for part in parts if part not in line]
        assert not missing, f"{missing} not in {line!r}"


class Place:
    """A student, a teacher and rows that would run, for one thing about them to be broken."""

    def __init__(self, folder: Path, student: Path, teacher: Path, rows: Path) -> None:
        self.folder, self.student, self.teacher, self.rows = folder, student, teacher, rows
        self.run = folder / "run"

    def words(self, *more: str) -> list[str]:
        return file_run(self.run, self.rows, self.student, self.teacher, *more)

    def copy_student(self) -> Path:
        self.student = Path(shutil.copytree(self.student, self.folder / "student"))
        return self.student

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path


@pytest.fixture
def place(tmp_path, student, teacher, rows):
    return Place(tmp_path, student, teacher, rows)


def _empty_file(place):
    place.rows = place.write("bad.jsonl", "")
    return (), ("data.path=", "bad.jsonl: the file is empty", "give a file with at least one row")


def _unknown_suffix(place):
    place.rows = place.write("bad.yaml", "a")
    return (), ("data.path=", "cannot tell the format from '.yaml'", "convert or rename")


def _json_syntax(place):
    place.rows = place.write("bad.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n')
    return (), ("data.path=", "bad.jsonl: line 2: not JSON", "fix that line")


def _missing_column(place):
    place.rows = place.write("bad.jsonl", '{"question": "a"}\n' * 20)
    return (), ("data.path=", "row 1: no column", "found: question", "data.columns.prompt=question")


def _renamed_column_missing(place):
    place.rows = place.write("bad.jsonl", '{"question": "a"}\n' * 20)
    return ("data.columns.prompt=qestion",), ("data.columns.prompt=qestion: no such column", "did you mean question?")


def _empty_prompt(place):
    place.rows = place.write("bad.jsonl", '{"prompt": "a", "completion": "b"}\n' * 20 + '{"prompt": "  "}\n')
    return (), ("data.path=", "row 21: the prompt is empty", "fill it in or remove the row")


def _prompts_only(place):
    place.rows = place.write("bad.jsonl", '{"prompt": "hello"}\n' * 20)
    return ("method=sft",), ("data.path=", "row 1: the method needs a completion", "add a completion column")


def _every_prompt_too_long(place):
    return ("data.max_prompt_length=3",), ("data.path=", "none of 20 rows is kept", "raise", "max_prompt_length=3")


def _fewer_rows_than_a_batch(place):
    return ("train.batch_size=100",), ("train.batch_size=100: the data has only 16", "lower it to 16 or less")


def _fewer_rows_than_held_out(place):
    return ("data.eval_prompts=100",), ("data.eval_prompts=100: only 20 rows", "lower it to 19 or less")


def _same_tokens_other_ids(place):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = json.loads(build_tokenizer().backend_tokenizer.to_str())
    ids = model["model"]["vocab"]
    ids["!"], ids["a"] = ids["a"], ids["!"]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(model)), eos_token="<|im_end|>", chat_template=CHATML
    )
    place.teacher = build_model(place.folder / "teacher", tokenizer=swapped)
    return (), ("model.teacher.path=", "not the student's: 2 tokens differ", "choose a teacher of the same family")


def _same_size_other_tokens(place):
    place.teacher = build_model(place.folder / "teacher", tokenizer=build_tokenizer(reverse=True))
    return (), ("model.teacher.path=", "is not the student's", "choose a teacher of the same family")


def _no_tokenizer(place):
    for file in place.copy_student().glob("*token*"):
        file.unlink()
    return (), ("model.student.path=", "no tokenizer lies there", "give a complete folder")


def _broken_tokenizer(place):
    (place.copy_student() / "tokenizer.json").write_text("{")
    return (), ("model.student.path=", "no tokenizer loads from it", "give a complete folder")


def _no_eos(place):
    file = place.copy_student() / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    (place.student / "generation_config.json").unlink()
    return (), ("model.student.path=", "has no eos token", "set eos_token")


def _no_config_json(place):
    (place.copy_student() / "config.json").unlink()
    return (), ("model.student.path=", "not a model folder (no config.json)", "save_pretrained")


def _unknown_model_type(place):
    (place.copy_student() / "config.json").write_text('{"model_type": "frobnicate"}')
    return (), ("model.student.path=", "no model that transformers knows", "`frobnicate`", "upgrade transformers")


def _not_a_language_model(place):
    (place.copy_student() / "config.json").write_text('{"model_type": "clip"}')
    return (), ("model.student.path=", "its weights do not load", "CLIPConfig", "give a complete folder")


def _no_weights(place):
    (place.copy_student() / "model.safetensors").unlink()
    return (), ("model.student.path=", "its weights do not load", "model.safetensors", "give a complete folder")


def _truncated_weights(place):
    file = place.copy_student() / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return (), ("model.student.path=", "its weights do not load", "not fully covered", "give a complete folder")


def _a_weight_left_out(place):
    from safetensors.torch import load_file, save_file

    file = place.copy_student() / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    return (), ("model.student.path=", "1 weights are not in it, e.g. model.layers.1.mlp.up_proj.weight", "complete")


def _other_shapes(place):
    file = place.copy_student() / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": 32}))
    return (), ("model.student.path=", "its weights do not load", "give a complete folder")


def _no_chat_template_file(place):
    return ("model.student.chat_template=no.jinja",), ("model.student.chat_template=no.jinja: no such file", "name a")


def _broken_chat_template(place):
    file = place.write("bad.jinja", "{% for x %}")
    return (f"model.student.chat_template={file}",), ("model.student.chat_template=", "not a Jinja template", "mend it")


def _attention_that_is_not_there(place):
    return ("model.student.attention=flash_attention_2",), (
        "model.student.attention=flash_attention_2: has no kernel for hardware.device=cpu",
        "set it to sdpa",
    )


def _lora_targets_that_are_not_there(place):
    lora = "model.student.lora={r:4,alpha:8,dropout:0.0,targets:[nope]}"
    return (lora,), ("model.student.lora.targets=['nope']: does not fit this model", "use all-linear")


def _devices_that_are_not_there(place):
    import torch

    if torch.cuda.device_count() >= 2:
        pytest.skip("this machine has them")
    return ("hardware=a800x2", "train.batch_size=4"), ("hardware=a800x2: needs 2 CUDA devices", "use hardware=cpu_tiny")


def _no_metal(place):
    import torch

    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    return ("hardware.device=mps",), ("hardware.device=mps: this machine has none", "use hardware.device=cpu")


BROKEN = [
    _empty_file,
    _unknown_suffix,
    _json_syntax,
    _missing_column,
    _renamed_column_missing,
    _empty_prompt,
    _prompts_only,
    _every_prompt_too_long,
    _fewer_rows_than_a_batch,
    _fewer_rows_than_held_out,
    _same_tokens_other_ids,
    _same_size_other_tokens,
    _no_tokenizer,
    _broken_tokenizer,
    _no_eos,
    _no_config_json,
    _unknown_model_type,
    _not_a_language_model,
    _no_weights,
    _truncated_weights,
    _a_weight_left_out,
    _other_shapes,
    _no_chat_template_file,
    _broken_chat_template,
    _attention_that_is_not_there,
    _lora_targets_that_are_not_there,
    _devices_that_are_not_there,
    _no_metal,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda case: case.__name__.strip("_"))
def test_a_broken_model_or_file_is_refused_before_the_run_has_a_folder(place, broken):
    more, parts = broken(place)
    answer = call(*place.words(*more))
    assert answer.code == 2
    _names(answer.lines, [parts])
    assert not place.run.exists()


def test_the_same_command_with_nothing_broken_runs(place):
    assert call(*place.words("train.max_steps=1")).code == 0


def test_a_process_that_torchrun_started_is_refused(place, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    answer = call(*place.words())
    assert answer.code == 2
    _names(answer.lines, [("RANK=0: opd starts its own ranks", "without torchrun")])
    assert not place.run.exists()


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
    _names(answer.lines, [(f"run.dir={place.run}: ", *parts)])
    assert snapshot(place.run) == before


def test_a_folder_that_cannot_be_made_is_refused(place):
    place.run = Path("/proc/opd/run")
    answer = call(*place.words())
    assert answer.code == 2
    _names(answer.lines, [("run.dir=/proc/opd/run: cannot be made", "choose another folder")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_in_a_read_only_one_is_refused(place):
    parent = place.folder / "closed"
    parent.mkdir(mode=0o500)
    place.run = parent / "run"
    answer = call(*place.words())
    assert answer.code == 2
    _names(answer.lines, [(f"run.dir={place.run}: cannot be made (Permission denied)", "choose another folder")])


def test_a_run_whose_loss_is_no_number_fails_in_one_line(place):
    answer = call(*place.words("train.learning_rate=1e30", "train.optimizer=sgd", "train.max_grad_norm=0"))
    assert answer.code == 1
    _names(answer.lines[-1:], [("step 2: the loss is nan", "lower train.learning_rate")])
    assert "Traceback" not in answer.stderr


FOUR_STEPS = ("train.max_steps=4", "train.save_every_steps=2", "evaluation.sampled=false")


def _fails_to_save(answer, place) -> None:
    assert answer.code == 1
    _names(answer.lines[-1:], [(f"run.dir={place.run}: checkpoint-", "could not be saved", "free space and run the")])
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
    _names(answer.lines[-1:], [(f"run.dir={place.run}: final_model could not be written", "free space and run the")])
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
    yield disk, lambda kilobytes: resize(kilobytes, "remount")
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

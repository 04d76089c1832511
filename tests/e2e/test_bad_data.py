"""Rows, files and data sets that cannot be read are refused in one line, before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from e2e.bad_input import Case, Place, is_refused
from e2e.model_folders import ROWS, write_rows

SAMPLES = Path(__file__).parents[1] / "data" / "samples"
SFT = ("method=sft",)
DPO = ("method=dpo",)
SHORT = ("data.max_prompt_length=64", "data.max_completion_length=32")


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


def _question_and(answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": "What is 2 plus 2?"}, {"role": "assistant", "content": answer}]}


def _empty_answer(place: Place) -> Case:
    place.write_rows(_question_and(" "))
    return SFT, ("row 20: the assistant's completion is empty", "fill it in or remove the row", "data.bad_rows=drop")


def _role_of_another_vendor(place: Place) -> Case:
    place.write_rows({"messages": [{"role": "human", "content": "What is 2 plus 2?"}]})
    return (), ("row 20: messages[0] has the role 'human'", "did you mean user?", "data.bad_rows=drop")


def _half_a_character(place: Place) -> Case:
    place.write_rows({"prompt": "What is \ud800?", "completion": "x"})
    return (), ("row 20: half a character", "repair the row's text", "data.bad_rows=drop")


def _answer_before_a_question(place: Place) -> Case:
    place.write_rows({"messages": [{"role": "assistant", "content": "4"}]})
    return SFT, ("row 20: the prompt is empty: the conversation begins with the assistant", "data.bad_rows=drop")


def _prompt_that_ends_in_an_answer(place: Place) -> Case:
    place.write_rows({"prompt": _question_and("4")["messages"], "completion": "It is 4."})
    return SFT, ("row 20: prompt ends in an assistant turn", "name the column messages")


def _pair_that_prefers_nothing(place: Place) -> Case:
    place.write_rows({"prompt": "What is 2 plus 2?", "chosen": "4", "rejected": "4"})
    return DPO, ("row 20: chosen and rejected are the same", "it prefers nothing", "data.bad_rows=drop")


def _pair_with_an_empty_side(place: Place) -> Case:
    place.write_rows({"prompt": "What is 2 plus 2?", "chosen": "4", "rejected": ""})
    return DPO, ("row 20: rejected must be a string or a list of messages", "got nothing", "fill it in")


def _pair_without_a_worse_answer(place: Place) -> Case:
    place.write_rows({"prompt": "What is 2 plus 2?", "chosen": "4"})
    return DPO, ("row 20: no column rejected; columns found: prompt, chosen", "data.columns.rejected=worse")


def _answers_without_a_pair(place: Place) -> Case:
    return DPO, ("row 1: no column chosen; columns found: messages", "data.columns.chosen=preferred")


def _content_in_parts(place: Place) -> Case:
    place.write_rows({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2?"}]}]})
    return (), ("row 20: messages[0] needs a string as its content, got list", "both strings", "data.bad_rows=drop")


def _tool_call_without_content(place: Place) -> Case:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    place.write_rows({"messages": turns})
    return SFT, ("row 20: messages[1] needs a string as its content, got NoneType", "tool_calls", "data.bad_rows=drop")


def _messages_in_a_csv(place: Place) -> Case:
    quoted = json.dumps(_question_and("4")["messages"]).replace('"', '""')
    place.rows = place.write("bad.csv", "messages\n" + f'"{quoted}"\n' * 20)
    return (), ("bad.csv, row 1: messages must be a list of messages, got str", ".csv cannot")


def _open_quote_in_a_csv(place: Place) -> Case:
    place.rows = place.write("bad.csv", 'prompt,completion\n"What is 2?,4\n')
    return (), ("bad.csv: row 1: not CSV", "check its quotes")


def _half_a_parquet(place: Place) -> Case:
    whole = write_rows(place.folder / "whole.parquet").read_bytes()
    place.rows = place.folder / "half.parquet"
    place.rows.write_bytes(whole[: len(whole) // 2])
    return (), ("half.parquet: not a whole parquet file", "download or write it again")


def _download_that_is_not_finished(place: Place) -> Case:
    place.rows = place.write("rows.parquet.incomplete", "PAR1")
    return (), ("rows.parquet.incomplete: a download that is not finished", "download it again")


def _latin_1(place: Place) -> Case:
    place.rows = place.folder / "bad.txt"
    place.rows.write_bytes("Grüß Gott\n".encode("latin-1") * 20)
    return ("method=reverse_kl",), ("bad.txt: line 1 is not UTF-8", "save the file as UTF-8")


def _pipe(place: Place) -> Case:
    place.rows = place.folder / "null.jsonl"
    place.rows.symlink_to("/dev/null")
    return (), ("null.jsonl: is not a regular file", "write the rows to a file first")


def _every_row_bad_and_dropped(place: Place) -> Case:
    place.rows = place.write("bad.jsonl", '{"question": "a"}\n' * 20)
    return ("data.bad_rows=drop",), ("bad.jsonl: none of 20 rows can be read", "data.columns.prompt=question")


def _system_prompt_that_the_template_refuses(place: Place) -> Case:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    file = place.write("plain.jinja", template)
    more = (f"model.student.chat_template={file}", "data.system_prompt='be brief'")
    return more, ("data.system_prompt=be brief: ", "refuses a system message (System role not supported)", "null")


def _system_prompt_that_the_template_leaves_out(place: Place) -> Case:
    file = place.write("plain.jinja", "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}")
    more = (f"model.student.chat_template={file}", "data.system_prompt='be brief'")
    return more, ("data.system_prompt=be brief: ", "does not show a system message", "null")


# Evaluation rows


def _all_evaluation_rows_trained_on(place: Place) -> Case:
    return (f"data.eval_path={place.rows}",), ("data.eval_path=", "all of its 20 prompts are also trained on", "null")


def _evaluation_rows_without_columns(place: Place) -> Case:
    other = place.write("other.jsonl", '{"question": "a"}\n')
    return (f"data.eval_path={other}",), ("data.eval_path=", "other.jsonl, row 1: no column", "data.columns.prompt")


def _empty_evaluation_file(place: Place) -> Case:
    return (f"data.eval_path={place.write('other.jsonl', '')}",), ("data.eval_path=", "other.jsonl: the file is empty")


def _evaluation_folder_without_rows(place: Place) -> Case:
    (place.folder / "set").mkdir()
    return (f"data.eval_path={place.folder / 'set'}",), (f"data.eval_path={place.folder / 'set'}: holds no data files",)


# Data sets


def _sample(place: Place, name: str = "capybara") -> Path:
    place.rows = Path(shutil.copytree(SAMPLES / name, place.folder / "set"))
    return place.rows


def _hub_id_without_a_network(place: Place) -> Case:
    place.rows = Path("nobody/nothing")
    return ("data=hub",), ("data.path=nobody/nothing: it is not in the cache", "HF_HUB_OFFLINE is set", "set data.path")


def _preset_without_a_network(place: Place) -> Case:
    place.rows = Path("trl-lib/tldr")
    return ("data=tulu3",), ("data.path=trl-lib/tldr: it is not in the cache", "unset HF_HUB_OFFLINE")


def _no_such_split(place: Place) -> Case:
    _sample(place)
    return ("data=hub", "data.split=trian"), ("data.split=trian: data.path=", "no such split", "choose from", "train")


def _no_such_evaluation_split(place: Place) -> Case:
    _sample(place)
    return ("data=hub", "data.eval_split=tset"), ("data.eval_split=tset: ", "no such split", "choose from")


def _no_such_subset(place: Place) -> Case:
    _sample(place)
    return ("data=hub", "data.subset=chat"), ("data.subset=chat: data.path=", "no such subset", "name one it has")


def _data_set_without_files(place: Place) -> Case:
    place.rows = place.folder / "set"
    place.rows.mkdir()
    return ("data=hub",), (f"data.path={place.rows}: holds no data files", "check the folder or id")


def _data_set_cut_short(place: Place) -> Case:
    file = _sample(place) / "data" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:500])
    return ("data=hub",), (f"data.path={place.rows} data.split=train: cannot be read", "download it again")


def _data_set_of_which_a_file_is_missing(place: Place) -> Case:
    file = _sample(place) / "data" / "train-00000-of-00001.parquet"
    file.rename(file.with_name("train-00000-of-00003.parquet"))
    return ("data=hub",), ("data.split=train: 1 of the 3 files of this split are there", "download the others")


def _data_set_of_git_lfs_pointers(place: Place) -> Case:
    file = _sample(place) / "data" / "train-00000-of-00001.parquet"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    return ("data=hub",), ("data/train-00000-of-00001.parquet is a pointer of git-lfs", "git lfs pull")


def _data_set_of_pairs_without_a_prompt_column(place: Place) -> Case:
    _sample(place, "deepmath")
    return ("data=hub",), (
        "data.split=train, row 1: no column messages, prompt or text",
        "data.columns.prompt=question",
    )


# Mixtures


def _mixture(place: Place, *more: str, **files: Path) -> tuple[str, ...]:
    parts = [f"+data.sources.{name}.path={file}" for name, file in files.items()]
    return ("data=mixture", "data.path=null", *parts, *(f"+data.sources.{name}.weight=1" for name in files), *more)


def _source_with_a_bad_line(place: Place) -> Case:
    bad = place.write("bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    return _mixture(place, good=place.rows, bad=bad), ("data.sources.bad.path=", "bad.jsonl: line 2: not JSON")


def _source_without_the_columns(place: Place) -> Case:
    bad = place.write("bad.jsonl", '{"question": "a"}\n' * 20)
    parts = ("data.sources.bad.path=", "bad.jsonl, row 1: no column", "data.sources.bad.columns.prompt=question")
    return _mixture(place, good=place.rows, bad=bad), parts


def _source_with_a_column_that_is_not_there(place: Place) -> Case:
    more = _mixture(place, "+data.sources.good.columns.prompt=qestion", good=place.rows)
    return more, ("data.sources.good.columns.prompt=qestion: no such column", "name one of them")


def _source_that_gets_no_row(place: Place) -> Case:
    small = write_rows(place.folder / "small.jsonl", ROWS[:1])
    more = _mixture(place, "data.sources.good.weight=1000", good=place.rows, small=small)
    return more, ("data.sources.small.weight=1", "its share of", "rows is less than one", "raise it, or leave it out")


def _source_without_a_network(place: Place) -> Case:
    more = _mixture(place, good=place.rows, far=Path("nobody/nothing"))
    return more, ("data.sources.far.path=nobody/nothing: it is not in the cache", "HF_HUB_OFFLINE is set")


# Streams


def _bad_row_of_a_stream(place: Place) -> Case:
    place.write_rows({"prompt": " ", "completion": "x"})
    return (*SHORT, "data.streaming=true"), ("bad.jsonl, row 20: the prompt is empty", "data.bad_rows=drop")


def _stream_of_which_no_row_fits(place: Place) -> Case:
    more = (*SHORT, "data.streaming=true", "data.eval_prompts=0", "data.max_prompt_length=3")
    return more, ("none of 20 rows is kept (prompt_too_long 20)", "raise the limits (data.max_prompt_length=3")


def _stream_of_a_method_that_scores_first(place: Place) -> Case:
    more = ("data.streaming=true", "method=dpo", "method.precompute_reference=true")
    return more, ("data.streaming=true: method=dpo looks up what was kept of each row", "set it to false")


def _stream_beyond_the_models_positions(place: Place) -> Case:
    more = ("data.streaming=true", "data.eval_prompts=0")
    return more, ("model.student.path: it has 128 positions", "lower data.max_prompt_length=1024")


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
    _empty_answer,
    _role_of_another_vendor,
    _half_a_character,
    _answer_before_a_question,
    _prompt_that_ends_in_an_answer,
    _pair_that_prefers_nothing,
    _pair_with_an_empty_side,
    _pair_without_a_worse_answer,
    _answers_without_a_pair,
    _content_in_parts,
    _tool_call_without_content,
    _messages_in_a_csv,
    _open_quote_in_a_csv,
    _half_a_parquet,
    _download_that_is_not_finished,
    _latin_1,
    _pipe,
    _every_row_bad_and_dropped,
    _system_prompt_that_the_template_refuses,
    _system_prompt_that_the_template_leaves_out,
    _all_evaluation_rows_trained_on,
    _evaluation_rows_without_columns,
    _empty_evaluation_file,
    _evaluation_folder_without_rows,
    _hub_id_without_a_network,
    _preset_without_a_network,
    _no_such_split,
    _no_such_evaluation_split,
    _no_such_subset,
    _data_set_without_files,
    _data_set_cut_short,
    _data_set_of_which_a_file_is_missing,
    _data_set_of_git_lfs_pointers,
    _data_set_of_pairs_without_a_prompt_column,
    _source_with_a_bad_line,
    _source_without_the_columns,
    _source_with_a_column_that_is_not_there,
    _source_that_gets_no_row,
    _source_without_a_network,
    _bad_row_of_a_stream,
    _stream_of_which_no_row_fits,
    _stream_of_a_method_that_scores_first,
    _stream_beyond_the_models_positions,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda case: case.__name__.strip("_"))
def test_rows_that_cannot_be_read_are_refused_before_a_weight_is_loaded(place, broken, monkeypatch):
    more, parts = broken(place)
    monkeypatch.setattr("opd.pipeline.load_trained_student", lambda *_: pytest.fail("weights were loaded"))
    is_refused(place, more, parts)

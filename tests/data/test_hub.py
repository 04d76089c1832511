"""Data sets as folders: clones of the hub's, and what save_to_disk writes; each trouble in one line."""

import os
import subprocess
import sys

import datasets
import pytest
from own_rows import SAMPLES, loaded, questions, refused, rows_of, write_lines

SFT = ("method=sft", "model/teacher=none", "data.eval_prompts=0")


def hub(path, *words):
    return ("data=hub", f"data.path={path}", *SFT, *words)


def prompts(data):
    return [row.fields["prompt"] for row in rows_of(data.train)]


@pytest.fixture
def clone(tmp_path):
    """A folder of .jsonl as people clone them, with two splits."""
    folder = tmp_path / "a set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", questions(1, 2, 3))
    write_lines(folder / "test.jsonl", questions(8))
    return folder


def test_a_folder_of_jsonl_is_read_by_its_splits(clone):
    assert prompts(loaded(*hub(clone))) == [row["prompt"] for row in questions(1, 2, 3)]
    assert prompts(loaded(*hub(clone, "data.split=test"))) == [row["prompt"] for row in questions(8)]


def test_what_save_to_disk_wrote_is_read(tmp_path):
    rows = datasets.Dataset.from_list(questions(1, 2))
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "held": datasets.Dataset.from_list(questions(7))}).save_to_disk(
        str(tmp_path / "several")
    )
    assert prompts(loaded(*hub(tmp_path / "one"))) == [row["prompt"] for row in questions(1, 2)]
    assert prompts(loaded(*hub(tmp_path / "several", "data.split=held"))) == ["What is 7 + 7?"]
    parts = ["data.split=nope", "choose from train, held"]
    refused(*hub(tmp_path / "several", "data.split=nope"), parts=parts)


def test_rows_count_from_one_and_a_bad_one_is_named(clone):
    write_lines(clone / "train.jsonl", [*questions(1), {"prompt": "", "completion": "x", "n": 0}])
    refused(*hub(clone), parts=["data.split=train, row 2:", "the prompt is empty"])


def test_a_split_that_is_not_there_is_refused_with_those_that_are(clone):
    refused(*hub(clone, "data.split=trian"), parts=["data.split=trian", "choose from", "train", "test"])


def test_a_subset_that_is_not_there_is_refused(clone):
    refused(*hub(clone, "data.subset=chat"), parts=["data.subset=chat", "no such subset"])


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(*hub(tmp_path / "empty"), parts=[f"data.path={tmp_path / 'empty'}", "no data files"])


def test_a_file_that_git_cloned_without_its_content_is_refused_with_the_remedy(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (folder / "train-00000-of-00001.parquet").write_text(pointer)
    refused(*hub(tmp_path / "set"), parts=["data/train-00000-of-00001.parquet", "git lfs pull"])


def test_a_download_that_broke_off_is_refused(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    whole = (SAMPLES / "tulu3" / "data" / "train-00000-of-00001.parquet").read_bytes()
    (folder / "train-00000-of-00001.parquet").write_bytes(whole[: len(whole) // 2])
    refused(*hub(tmp_path / "set"), parts=[f"data.path={tmp_path / 'set'}", "cannot be read", "download it again"])


def test_a_broken_line_is_refused(clone):
    (clone / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    refused(*hub(clone), parts=[f"data.path={clone}", "cannot be read"])


def test_an_id_that_is_not_in_the_cache_is_refused_without_a_network():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    refused(*hub("nobody/nothing"), parts=["data.path=nobody/nothing", "HF_HUB_OFFLINE", "folder"])


@pytest.mark.slow  # the library asks five times, with pauses
def test_a_hub_that_does_not_answer_is_refused_in_one_line():
    """In a process of its own: the library reads where the hub is when it is imported."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from own_rows import refused\n"
        "from test_hub import hub\n"
        "refused(*hub('nobody/nothing', 'data.limit=2'), parts=['data.path=nobody/nothing', 'cannot be reached'])\n"
    )
    here = os.path.dirname(__file__)
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = [sys.executable, "-c", program, here, os.path.dirname(here)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_row_behind_the_limit_is_read(clone):
    write_lines(clone / "train.jsonl", [*questions(1, 2), {"prompt": 5, "completion": None}])
    assert len(loaded(*hub(clone, "data.limit=2")).train) == 2
    refused(*hub(clone), parts=[f"data.path={clone}"])


def test_no_file_behind_the_limit_is_opened(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    whole = (SAMPLES / "tulu3" / "data" / "train-00000-of-00001.parquet").read_bytes()
    (folder / "train-00000-of-00002.parquet").write_bytes(whole)
    (folder / "train-00001-of-00002.parquet").write_bytes(whole[:100])
    assert len(loaded(*hub(tmp_path / "set", "data.limit=3")).train) == 3


def test_evaluation_rows_may_come_from_another_file_or_split(clone, tmp_path):
    other = write_lines(tmp_path / "other.jsonl", questions(1, 9, 8, 7))
    data = loaded(*hub(clone), "data.eval_prompts=2", f"data.eval_path={other}")
    assert [row.fields["n"] for row in data.evaluation] == [9, 8]
    assert len(data.train) == 3 and data.summary["evaluation_in_train"] == 1
    data = loaded(*hub(clone), "data.eval_prompts=9", "data.eval_split=test")
    assert [row.fields["n"] for row in data.evaluation] == [8]
    parts = ["data.eval_split=tset", "choose from"]
    refused(*hub(clone), "data.eval_prompts=1", "data.eval_split=tset", parts=parts)


def test_evaluation_rows_that_are_all_trained_on_are_refused(clone, tmp_path):
    other = write_lines(tmp_path / "other.jsonl", questions(1, 2))
    refused(*hub(clone), "data.eval_prompts=2", f"data.eval_path={other}", parts=["data.eval_path", "trained on"])


def test_the_summary_stands_in_the_metrics(clone):
    write_lines(clone / "train.jsonl", [*questions(1, 2), {"prompt": "long " * 40, "completion": "x", "n": 0}])
    counts = loaded(*hub(clone, "data.max_prompt_length=30")).counts()
    assert counts["data/rows"] == 3 and counts["data/kept"] == 2 and counts["data/dropped_prompt_too_long"] == 1

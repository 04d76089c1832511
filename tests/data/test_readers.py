import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from opd.data.readers import Row, read_rows
from opd.errors import ConfigError

ROWS = [{"prompt": "2+2", "completion": "4"}, {"prompt": "Grüße, 你好", "completion": "hé"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, *parts: str, key: str = "data.path") -> None:
    """The file is refused in one line that names the key, the file and every one of `parts`."""
    with pytest.raises(ConfigError) as caught:
        read_rows(path, limit=None, key=key)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{key}={path}: ", "; ", *parts):
        assert part in message, message


def test_a_json_list_becomes_its_objects_in_order(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(ROWS))
    assert read_rows(path, limit=None) == [Row(1, ROWS[0]), Row(2, ROWS[1])]


def test_a_json_object_that_holds_one_list_becomes_that_list(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"version": 2, "data": ROWS}))
    assert [row.fields for row in read_rows(path, limit=None)] == ROWS


def test_a_json_object_that_holds_two_lists_is_refused(tmp_path):
    refusal(write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS})), "train, test", "one list")


def test_a_json_scalar_is_refused(tmp_path):
    refusal(write(tmp_path / "a.json", "3"), "int")


def test_jsonl_rows_are_numbered_by_line_and_blank_lines_counted(tmp_path):
    lines = f"{json.dumps(ROWS[0])}\n\n  \r\n{json.dumps(ROWS[1], ensure_ascii=False)}\r\n"
    rows = read_rows(write(tmp_path / "a.jsonl", lines), limit=None)
    assert rows == [Row(1, ROWS[0]), Row(4, ROWS[1])]
    assert rows.blank_lines == 2


def test_a_unicode_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", '{"prompt": "a\u2028b\x85c"}\n'), limit=None)
    assert rows == [Row(1, {"prompt": "a\u2028b\x85c"})]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, name):
    body = {"a.json": '[{"prompt": "x"}]', "a.jsonl": '{"prompt": "x"}', "a.csv": "prompt\nx\n", "a.txt": "x"}
    path = write(tmp_path / name, b"\xef\xbb\xbf" + body[name].encode())
    assert [row.fields for row in read_rows(path, limit=None)] == [{"prompt": "x"}]


def test_csv_cells_stay_strings_and_keep_their_line_breaks(tmp_path):
    text = 'id,prompt,note\r\n007,"two\nlines, ""quoted""",NA\r\n1.0,,\r\n'
    rows = read_rows(write(tmp_path / "a.csv", text), limit=None)
    assert rows == [
        Row(1, {"id": "007", "prompt": 'two\nlines, "quoted"', "note": "NA"}),
        Row(2, {"id": "1.0", "prompt": "", "note": ""}),
    ]


def test_a_csv_cell_may_be_longer_than_the_csv_module_allows(tmp_path):
    import csv

    csv.field_size_limit(131_072)
    rows = read_rows(write(tmp_path / "a.csv", "prompt\n" + "x" * 200_000 + "\n"), limit=None)
    assert len(rows[0].fields["prompt"]) == 200_000
    assert csv.field_size_limit() == 131_072


def test_blank_csv_lines_are_counted_and_numbered_past(tmp_path):
    rows = read_rows(write(tmp_path / "a.csv", "prompt,answer\na,1\n\nb,2\n"), limit=None)
    assert [row.number for row in rows] == [1, 2]
    assert rows.blank_lines == 1


def test_parquet_keeps_nested_messages(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    parquet.write_table(pyarrow.table({"messages": [messages], "n": [3]}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", limit=None) == [Row(1, {"messages": messages, "n": 3})]


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    rows = read_rows(write(tmp_path / "a.txt", "first \n\n  \nsecond\r\n"), limit=None)
    assert rows == [Row(1, {"prompt": "first "}), Row(4, {"prompt": "second"})]
    assert rows.blank_lines == 2


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt", "a.parquet", "a.JSONL"])
def test_the_limit_keeps_the_first_rows(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"]}), path)
    else:
        objects = [{"prompt": p} for p in "abc"]
        lines = "\n".join(map(json.dumps, objects))
        bodies = {
            ".json": json.dumps(objects),
            ".csv": "prompt\na\nb\nc\n",
            ".txt": "a\nb\nc\n",
            ".jsonl": lines,
        }
        write(path, bodies[path.suffix.lower()])
    assert [row.fields["prompt"] for row in read_rows(path, limit=2)] == ["a", "b"]
    assert len(read_rows(path, limit=5)) == 3


def test_a_line_behind_the_limit_is_not_read(tmp_path):
    assert len(read_rows(write(tmp_path / "a.jsonl", '{"prompt": "a"}\nbroken\n'), limit=1)) == 1


def test_a_missing_file_is_refused_with_its_neighbour_of_a_similar_name(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    refusal(tmp_path / "trian.jsonl", "no such file", "did you mean train.jsonl?")


def test_a_missing_folder_is_named(tmp_path):
    refusal(tmp_path / "nowhere" / "train.jsonl", "no such file", f"{tmp_path / 'nowhere'} does not exist")


def test_the_refusal_names_the_key_it_was_given(tmp_path):
    refusal(tmp_path / "x.jsonl", "no such file", key="data.eval_path")


def test_a_folder_is_refused(tmp_path):
    refusal(tmp_path, "is a folder", ".parquet")


@pytest.mark.parametrize("name", ["a.xlsx", "a.jsonl.gz", "noextension"])
def test_an_unknown_extension_is_refused_with_the_known_ones(tmp_path, name):
    refusal(write(tmp_path / name, "x"), ".json, .jsonl, .csv, .parquet, .txt")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    refusal(write(tmp_path / name, content), "no rows" if content else "empty")


def test_a_csv_of_nothing_but_a_header_an_empty_list_and_an_empty_table_are_refused(tmp_path):
    refusal(write(tmp_path / "a.csv", "prompt,completion\n"), "no rows")
    refusal(write(tmp_path / "a.json", "[]"), "no rows")
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    refusal(tmp_path / "a.parquet", "no rows")


def test_broken_json_is_refused_with_its_line(tmp_path):
    refusal(write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": \n'), "line 3", "not JSON")
    refusal(write(tmp_path / "a.json", '[\n{"a": 1},\n{"a" 2}\n]'), "line 3", "not JSON")


def test_json_of_absurd_depth_is_refused_like_any_other(tmp_path):
    refusal(write(tmp_path / "a.jsonl", "[" * 100_000 + "\n"), "line 1")


def test_json_lines_under_the_wrong_name_are_told_the_right_one(tmp_path):
    refusal(write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n'), "line 2", ".jsonl")


def test_a_row_that_is_no_object_is_refused_with_its_place(tmp_path):
    refusal(write(tmp_path / "a.jsonl", '{"a": 1}\n["a"]\n'), "line 2", "list")
    refusal(write(tmp_path / "a.json", '[{"a": 1}, "b"]'), "row 2", "str")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path, name):
    refusal(write(tmp_path / name, '"prompt"\n"é"\n'.encode("latin-1")), "line 2 is not UTF-8", "UTF-8")


def test_a_ragged_csv_row_is_refused_with_its_number(tmp_path):
    refusal(write(tmp_path / "a.csv", 'a,b\n"1\n1",2\n1,2,3\n'), "row 2 (ends on line 4)", "3 cells", "2")
    refusal(write(tmp_path / "b.csv", "a,b\n1\n"), "row 1", "1 cells")


def test_an_unclosed_quote_does_not_swallow_the_rest_of_the_file(tmp_path):
    refusal(write(tmp_path / "a.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n'), "row 2: not CSV", "quote")


def test_unnamed_and_repeated_csv_columns_are_refused(tmp_path):
    refusal(write(tmp_path / "a.csv", "a,b,a\n1,2,3\n"), "repeated columns: a")
    refusal(write(tmp_path / "b.csv", ",a\n0,1\n"), "(no name)")


def test_a_corrupt_parquet_file_is_refused(tmp_path):
    refusal(write(tmp_path / "a.parquet", b"PAR1 and then nothing"), "parquet")
    parquet.write_table(pyarrow.table({"prompt": ["a" * 1000]}), tmp_path / "b.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    refusal(write(tmp_path / "b.parquet", whole[: len(whole) // 2]), "parquet")


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "{}")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # chmod does not stop root
    refusal(path, "Permission denied", "permissions")


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    refusal(tmp_path / "a.jsonl", "not a regular file")

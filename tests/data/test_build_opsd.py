import csv
import io
import json
import os
import sys
from subprocess import run

import pytest

from opd.data import build_opsd
from opd.data.build_opsd import main
from opd.data.opsd_rows import Columns, cell, opsd_rows
from opd.data.readers import Row

CHAIN = [
    "generate_text",
    "validate_text",
    "fix_text",
    "judge_0_text",
    "fix_1_text",
    "judge_1_text",
    "fix_2_text",
    "judge_2_text",
]
HEADER = ["自动编号", "input", *CHAIN, "final_text"]
FULL = {name: f"{name} 1" for name in HEADER} | {"自动编号": "7"}
SYSTEM = {"role": "system", "content": "Be brief."}
NAMES = ["opsd_student_messages.jsonl", "opsd_teacher_messages.jsonl", "opsd_combined_messages.jsonl"]


def row(**cells):
    """A row with an id and an input, and these cells; everything else is empty."""
    return dict.fromkeys(HEADER, "") | {"自动编号": "1", "input": "asked"} | cells


def without(*names):
    return FULL | dict.fromkeys(names, "")


def table(rows, header=HEADER):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Builder:
    def __init__(self, folder, capsys):
        self.prompt, self.csv, self.out = folder / "system.txt", folder / "导出 视图.csv", folder / "out"
        self.folder, self.capsys = folder, capsys
        self.prompt.write_text("  Be brief.\n\n", encoding="utf-8")

    def write(self, content):
        self.csv.write_bytes(content.encode() if isinstance(content, str) else content)

    def __call__(self, *flags):
        self.code = main(
            ["--system_prompt_path", str(self.prompt), "--source_csv", str(self.csv), "--output_dir", str(self.out)]
            + [str(flag) for flag in flags]
        )
        self.stdout, self.stderr = self.capsys.readouterr()
        return self.code

    def rows(self, rows, *flags):
        """The combined rows that the command makes of these."""
        self.write(table(rows))
        assert self(*flags) == 0, self.stderr
        return self.read("combined")

    def read(self, name):
        return [json.loads(line) for line in (self.out / f"opsd_{name}_messages.jsonl").open(encoding="utf-8")]

    def refused(self, *parts, flags=()):
        """One line that has all of `parts`, exit code 2, nothing written."""
        before = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        assert self(*flags) == 2
        assert self.stderr.count("\n") == 1 and self.stderr.startswith("build_opsd: ") and not self.stdout
        for part in parts:
            assert part in self.stderr, self.stderr
        assert {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()} == before


@pytest.fixture
def build(tmp_path, capsys):
    return Builder(tmp_path, capsys)


def contents(messages):
    return [message["content"] for message in messages]


def test_the_three_files_hold_the_answer_the_chain_and_both(build):
    (combined,) = build.rows([FULL])
    asked = [SYSTEM, {"role": "user", "content": "input 1"}]
    answer = {"role": "assistant", "content": "final_text 1"}
    roles = ["assistant", "user"] * 4
    chain = [{"role": role, "content": f"{name} 1"} for role, name in zip(roles, CHAIN, strict=True)]
    assert combined == {
        "id": "7",
        "messages": [*asked, answer],
        "privileged_messages": chain,
        "teacher_messages": asked + chain,
    }
    assert build.read("student") == [{"id": "7", "messages": [*asked, answer]}]
    assert build.read("teacher") == [{"id": "7", "messages": asked + chain}]


@pytest.mark.parametrize("nothing", ["", "  \n\t", "nan", "NaN", "None", " null ", "NULL", "　"])
def test_a_cell_that_says_nothing_is_missing(nothing):
    assert cell(nothing) is None


@pytest.mark.parametrize("text", ["NA", "N/A", "n/a", "<NA>", "-nan", "0", "false", "no", "nothing", "none of them"])
def test_a_cell_that_says_something_is_kept_as_it_is(text):
    assert cell(f" {text}\n") == text


def test_an_answer_of_na_and_ids_with_zeros_come_through_as_text(build):
    rows = build.rows([row(自动编号="007", final_text="NA"), row(自动编号="", final_text="1.0"), row(final_text="x")])
    assert [r["id"] for r in rows] == ["007", None, "1"]
    assert [r["messages"][-1]["content"] for r in rows] == ["NA", "1.0", "x"]


@pytest.mark.parametrize("position", range(5))
def test_the_answer_is_the_first_target_column_that_is_filled(build, position):
    targets = ["final_text", "fix_2_text", "fix_1_text", "fix_text", "generate_text"]
    (combined,) = build.rows([without(*targets[:position])])
    assert combined["messages"][-1] == {"role": "assistant", "content": f"{targets[position]} 1"}


@pytest.mark.parametrize("position", range(1, 8))
def test_the_chain_ends_before_its_first_missing_cell(build, position):
    (combined,) = build.rows([without(CHAIN[position])], "--include_final_assistant")
    assert contents(combined["privileged_messages"]) == [f"{name} 1" for name in CHAIN[:position]]


def test_a_missing_optional_cell_does_not_end_the_chain(build):
    (combined,) = build.rows([without("generate_text")])
    assert contents(combined["privileged_messages"]) == [f"{name} 1" for name in CHAIN[1:]]


def test_a_whole_chain_ends_in_the_final_answer_if_asked_for(build):
    whole, no_final = build.rows([without("generate_text"), without("final_text")], "--include_final_assistant")
    assert whole["privileged_messages"][-1] == {"role": "assistant", "content": "final_text 1"}
    assert whole["teacher_messages"][2:] == whole["privileged_messages"]
    assert contents(no_final["privileged_messages"]) == [f"{name} 1" for name in CHAIN]


def test_without_being_asked_for_the_final_answer_stays_with_the_student(build):
    (combined,) = build.rows([FULL])
    assert "final_text 1" not in contents(combined["teacher_messages"])


def test_rows_without_input_then_without_answer_are_skipped_and_counted(build):
    rows = [
        FULL,
        without("input"),
        without(*CHAIN, "final_text"),
        without(*CHAIN, "final_text", "input"),
        without("judge_0_text"),
    ]
    assert len(build.rows(rows)) == 2
    for count in ("total_rows: 5", "kept_rows: 2", "skipped_missing_input: 2", "skipped_missing_target: 1"):
        assert f"{count}\n" in build.stdout
    for stage in ("generate_text: 2", "fix_text: 2", "judge_0_text: 1", "judge_2_text: 1"):
        assert f"  {stage}\n" in build.stdout


def test_rows_with_nothing_privileged_are_kept_with_a_warning_that_counts_them(build):
    rows = build.rows([FULL, row(final_text="x"), row(final_text="y", fix_text="after a hole")])
    assert [len(r["privileged_messages"]) for r in rows] == [8, 0, 0]
    assert "empty_privileged: 2\n" in build.stdout
    assert "2 of 3 kept rows have empty privileged_messages" in build.stderr and "rows 2, 3" in build.stderr


def test_rows_of_one_id_are_all_kept_with_a_warning_that_names_it(build):
    ids = ["7", " 7 ", "8", "7", "8", "9"]
    skipped = FULL | {"自动编号": "9", "input": ""}
    rows = build.rows([*(FULL | {"自动编号": name} for name in ids), skipped])
    assert [r["id"] for r in rows] == ["7", "7", "8", "7", "8", "9"]
    assert "duplicate_ids: 2\n" in build.stdout
    assert "5 kept rows share 2 ids" in build.stderr and "7 (3 rows), 8 (2 rows)\n" in build.stderr


def test_rows_without_an_id_are_no_duplicates_of_each_other(build):
    rows = build.rows([FULL, FULL | {"自动编号": "nan"}, FULL | {"自动编号": ""}])
    assert [r["id"] for r in rows] == ["7", None, None]
    assert "duplicate_ids: 0\n" in build.stdout and "missing_ids: 2\n" in build.stdout
    assert "2 of 3 kept rows have no id" in build.stderr


def test_a_clean_table_has_no_warnings(build):
    build.rows([FULL])
    assert build.stderr == ""


def test_line_breaks_quotes_commas_and_line_separators_inside_cells_survive(build):
    text = 'a "quoted", cell\nof two lines\r\nand three\u2028and four'
    (combined,) = build.rows([row(input=text, final_text=text)])
    assert contents(combined["messages"][1:]) == [text, text]
    assert (build.out / NAMES[0]).read_bytes().count(b"\n") == 1


def test_a_cell_of_a_million_characters_is_read(build):
    (combined,) = build.rows([row(final_text="长" * 1_000_000)])
    assert len(combined["messages"][-1]["content"]) == 1_000_000


def test_byte_order_marks_are_no_part_of_the_first_column_or_the_prompt(build):
    build.prompt.write_bytes("\ufeff你好".encode())
    build.write("\ufeff" + table([FULL]))
    assert build() == 0
    (combined,) = build.read("combined")
    assert combined["id"] == "7"
    assert combined["messages"][0] == {"role": "system", "content": "你好"}


def test_chinese_is_written_as_it_is_and_not_escaped(build):
    build.rows([row(final_text="文档")])
    assert "文档".encode() in (build.out / NAMES[0]).read_bytes()


def test_columns_of_other_names_are_read_from_a_file(build):
    build.write(
        table([{"n": "3", "问题": "Q", "draft": "D", "review": "R", "改": "F"}], ["n", "问题", "draft", "review", "改"])
    )
    path = build.folder / "columns.yaml"
    path.write_text(
        "id_column: n\ninput_column: 问题\ntarget_columns: [改, draft]\nfinal_column: 改\n"
        "chain:\n- {column: draft, role: assistant}\n- {column: review, role: user}\n",
        encoding="utf-8",
    )
    assert build("--columns", path, "--include_final_assistant") == 0, build.stderr
    (combined,) = build.read("combined")
    assert combined["id"] == "3"
    assert contents(combined["messages"]) == ["Be brief.", "Q", "F"]
    assert [(m["role"], m["content"]) for m in combined["privileged_messages"]] == [
        ("assistant", "D"),
        ("user", "R"),
        ("assistant", "F"),
    ]


def test_json_names_columns_too_and_what_it_leaves_out_keeps_its_default(build):
    path = build.folder / "columns.json"
    path.write_text(json.dumps({"id_column": None, "chain": [{"column": "generate_text", "role": "assistant"}]}))
    (combined,) = build.rows([FULL], "--columns", path)
    assert combined["id"] is None
    assert contents(combined["privileged_messages"]) == ["generate_text 1"]
    assert combined["messages"][-1]["content"] == "final_text 1"
    assert build.stderr == ""  # a table without ids was asked for


def test_flags_name_columns_over_the_file(build):
    path = build.folder / "columns.yaml"
    path.write_text("id_column: nowhere\ninput_column: nowhere")
    flags = ["--id_column", "fix_text", "--input_column", "fix_1_text", "--target_columns", "generate_text", "fix_text"]
    (combined,) = build.rows([FULL], "--columns", path, *flags)
    assert combined["id"] == "fix_text 1"
    assert contents(combined["messages"][1:]) == ["fix_1_text 1", "generate_text 1"]


def test_an_empty_id_column_means_a_table_without_ids(build):
    header = [name for name in HEADER if name != "自动编号"]
    build.write(table([{name: FULL[name] for name in header}], header))
    assert build("--id_column", "") == 0, build.stderr
    assert build.read("student")[0]["id"] is None


def test_columns_nobody_asked_for_may_be_there_and_the_final_one_may_not(build):
    header = [*HEADER[:-1], "comment"]
    build.write(table([dict.fromkeys(header, "x")], header))
    assert build("--target_columns", "fix_text") == 0, build.stderr
    build.refused(
        "no column final_text", flags=["--target_columns", "fix_text", "--include_final_assistant", "--overwrite"]
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("chian: []", ["chian=[]", "did you mean chain?"]),
        ("chain: [{column: a, role: bot}]", ["chain.0.role='bot'", "'user' or 'assistant'"]),
        ("chain: [{column: a, rle: user}]", ["chain.0.role"]),
        ("chain: [{column: a, role: user, optionl: true}]", ["chain.0.optionl=True", "did you mean optional?"]),
        ("chain: []", ["chain=[]"]),
        ("target_columns: final_text", ["target_columns='final_text'", "list"]),
        ("input_column: 3", ["input_column=3", "string"]),
        ("input_column: ''", ["input_column=''"]),
        ("- a", ["holds list"]),
        ("", ["holds NoneType"]),
        ("a: [", ["neither YAML nor JSON"]),
    ],
)
def test_a_bad_columns_file_is_refused_with_the_key(build, text, parts):
    build.write(table([FULL]))
    path = build.folder / "columns.yaml"
    path.write_text(text)
    build.refused(f"--columns={path}: ", "; ", *parts, flags=["--columns", path])


def test_the_columns_that_help_prints_are_the_default_ones(build):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = build.capsys.readouterr().out
    path = build.folder / "columns.yaml"
    path.write_text(text[text.index("id_column: ") :], encoding="utf-8")
    assert build.rows([FULL], "--columns", path) == build.rows([FULL], "--overwrite")


def test_a_missing_column_is_refused_with_those_found_and_the_one_meant(build):
    build.write(table([{"自动编号": "1", "Input ": "x", "fix_text": "y"}], ["自动编号", "Input ", "fix_text"]))
    build.refused(
        f"--source_csv={build.csv}: no column input, final_text, ",
        "columns found: '自动编号', 'Input ', 'fix_text'",
        "did you mean 'Input ' for input",
        "; name yours in --columns",
    )


def test_a_missing_table_prompt_or_columns_file_is_refused(build):
    build.refused(f"--source_csv={build.csv}: no such file")
    build.write(table([FULL]))
    nowhere = build.folder / "nowhere.txt"
    build.refused(f"--columns={nowhere}", "No such file", flags=["--columns", nowhere])
    build.prompt.unlink()
    build.refused(f"--system_prompt_path={build.prompt}", "No such file")


def test_a_prompt_of_white_space_is_refused(build):
    build.write(table([FULL]))
    build.prompt.write_bytes("\ufeff \n\t\n".encode())
    build.refused(f"--system_prompt_path={build.prompt}", "empty")


def test_files_that_are_not_utf8_are_refused(build):
    build.write(table([FULL | {"final_text": "文档"}]).encode("gb18030"))
    build.refused(f"--source_csv={build.csv}: line 1 is not UTF-8")
    build.write(table([FULL]))
    build.prompt.write_bytes("简短".encode("gb18030"))
    build.refused(f"--system_prompt_path={build.prompt}", "not UTF-8")


def test_a_row_with_a_cell_too_many_or_too_few_is_refused(build):
    build.write(table([FULL]) + "2,an input, with a comma\r\n")
    build.refused("row 2 (ends on line 3) has 3 cells, the header 11")
    build.write(table([FULL]) + ",".join("a" * 12) + "\r\n")
    build.refused("row 2", "has 12 cells")


def test_an_unclosed_quote_is_refused_and_does_not_swallow_the_table(build):
    build.write(table([FULL]) + '2,"an input\r\n' + table([FULL, FULL]))
    build.refused("not CSV")


def test_a_table_without_rows_or_with_none_kept_is_refused(build):
    build.write(table([]))
    build.refused("no rows")
    build.write(table([without("input"), without(*CHAIN, "final_text")]))
    build.refused("none of 2 rows is kept (1 without input, 1 without an answer)")


def test_a_table_of_another_format_is_refused(build):
    path = build.folder / "table.jsonl"
    path.write_text(json.dumps(FULL))
    build.refused(f"--source_csv={path}: not a .csv", flags=["--source_csv", path])


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_exists_is_replaced_only_if_asked_for(build, name):
    build.write(table([FULL]))
    build.out.mkdir()
    (build.out / name).write_text("precious")
    build.refused(f"{build.out / name}: exists", "--overwrite")
    assert build("--overwrite") == 0
    assert sorted(path.name for path in build.out.iterdir()) == sorted(NAMES)
    assert json.loads((build.out / name).read_text())["id"] == "7"


def test_each_output_can_be_put_elsewhere(build):
    build.write(table([FULL]))
    paths = [build.folder / "new" / "folder" / f"{name}.jsonl" for name in "abc"]
    assert build("--student_out", paths[0], "--teacher_out", paths[1], "--combined_out", paths[2]) == 0
    keys = [list(json.loads(path.read_text())) for path in paths]
    assert keys == [
        ["id", "messages"],
        ["id", "messages"],
        ["id", "messages", "privileged_messages", "teacher_messages"],
    ]
    assert not build.out.exists()
    assert all(str(path) in build.stdout for path in paths)


def test_an_output_may_be_no_input_no_folder_no_device_and_no_other_output(build):
    build.write(table([FULL]))
    build.refused("is an input", flags=["--student_out", build.csv, "--overwrite"])
    build.refused("is an input", flags=["--student_out", build.prompt, "--overwrite"])
    build.refused("not a regular file", flags=["--teacher_out", build.folder, "--overwrite"])
    build.refused("not a regular file", flags=["--teacher_out", os.devnull, "--overwrite"])
    same = build.folder / "same.jsonl"
    build.refused("two outputs are one file", flags=["--student_out", same, "--teacher_out", same])


def test_an_output_that_cannot_be_made_is_refused(build):
    build.write(table([FULL]))
    build.refused(f"File exists: {build.csv}", flags=["--combined_out", build.csv / "combined.jsonl"])
    build.refused("File name too long", flags=["--combined_out", build.folder / ("x" * 300)])


def test_an_output_behind_a_link_is_replaced_there(build):
    build.write(table([FULL]))
    target, link = build.folder / "target.jsonl", build.folder / "link.jsonl"
    target.write_text("old")
    link.symlink_to(target)
    assert build("--student_out", link, "--overwrite") == 0
    assert link.is_symlink() and json.loads(target.read_text())["id"] == "7"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_failed_write_leaves_what_was_there_and_no_partial_file(build, monkeypatch):
    build.rows([FULL])
    before = {path.name: path.read_bytes() for path in build.out.iterdir()}
    partial = build_opsd._partial

    def on_a_full_disk(path, place):
        """The teacher's file is on a disk that is full."""
        file = partial(path, place)
        if "teacher" in path.name:
            file.unlink()
            file.symlink_to("/dev/full")
        return file

    monkeypatch.setattr(build_opsd, "_partial", on_a_full_disk)
    build.write(table([FULL | {"自动编号": "8"}]))
    assert build("--overwrite") == 1
    assert build.stderr.count("\n") == 1 and "No space left on device" in build.stderr
    assert {path.name: path.read_bytes() for path in build.out.iterdir()} == before


def test_a_second_build_gives_the_same_bytes(build):
    build.rows([FULL, without("fix_text"), row(final_text="x")])
    before = {path.name: path.read_bytes() for path in build.out.iterdir()}
    assert build("--overwrite") == 0
    assert {path.name: path.read_bytes() for path in build.out.iterdir()} == before


def test_an_unknown_or_missing_flag_is_refused(build):
    with pytest.raises(SystemExit) as caught:
        main(["--source_csv", str(build.csv)])
    assert caught.value.code == 2
    assert "--system_prompt_path" in build.capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        build("--overwrit")
    assert caught.value.code == 2


def test_the_command_runs_without_torch_and_on_a_terminal_that_is_not_utf8(build):
    build.write(table([FULL]))
    code = "import sys, runpy; runpy.run_module('opd.data.build_opsd', run_name='__main__', alter_sys=True)"
    check = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules)); "
    )
    flags = ["--system_prompt_path", build.prompt, "--source_csv", build.csv, "--output_dir", build.folder / "输出"]
    done = run(
        [sys.executable, "-c", check + code, *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kept_rows: 1" in done.stdout and done.stdout.endswith("False False\n")
    assert json.loads((build.folder / "输出" / NAMES[0]).read_text(encoding="utf-8"))["id"] == "7"


def test_rows_can_be_built_without_files():
    columns = Columns(id_column=None)
    built = opsd_rows([Row(1, FULL), Row(2, without("input"))], columns, "Be brief.", include_final_assistant=True)
    assert (built.total_rows, built.skipped_missing_input, len(built.combined)) == (2, 1, 1)
    assert built.stages == dict.fromkeys([*CHAIN, "final_text"], 1)

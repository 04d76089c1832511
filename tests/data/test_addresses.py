"""What rows and templates are made of counts in the address of a stage and in provenance.json, by content."""

import shutil

import pytest
from contract.variants import compose, run_alone
from own_rows import BASE, SAMPLES, questions, write_lines

from opd.artifacts.provenance import provenance
from opd.artifacts.store import Store
from opd.conditions import validated
from opd.lineage import recipe


@pytest.fixture
def address(tmp_path):
    def address(*words):
        raw = run_alone(compose(*BASE, "method=sft", "model/teacher=none", "hardware=cpu_tiny", *words))
        store = Store(tmp_path / "store")
        return str(store.address("train", recipe("it", raw, validated(raw), store, {})[0]))

    return address


@pytest.fixture
def rows(tmp_path):
    return write_lines(tmp_path / "rows.jsonl", questions(1, 2))


def test_a_changed_dataset_folder_is_another_address(address, tmp_path):
    shutil.copytree(SAMPLES / "tulu3", tmp_path / "set")
    words = ("data=tulu3", f"data.path={tmp_path / 'set'}")
    first = address(*words)
    assert address(*words) == first
    shutil.copytree(SAMPLES / "tulu3", tmp_path / "elsewhere")
    assert address("data=tulu3", f"data.path={tmp_path / 'elsewhere'}") == first
    part = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    part.write_bytes((SAMPLES / "deita_10k" / "data" / "train_sft-00000-of-00001.parquet").read_bytes())
    assert address(*words) != first


@pytest.mark.parametrize("key", ["+data.sources.a", "data.eval"])
def test_a_changed_source_or_evaluation_file_is_another_address(address, rows, tmp_path, key):
    other = write_lines(tmp_path / "other.jsonl", questions(3))
    words = ["data=file", f"data.path={rows}", f"data.eval_path={other}"]
    if "sources" in key:
        words = ["data=mixture", f"{key}.path={other}", f"{key}.weight=1"]
    first = address(*words)
    assert address(*words) == first
    write_lines(other, questions(4))
    assert address(*words) != first


def test_a_changed_template_is_another_address_and_a_packaged_one_is_known_by_its_text(address, rows, tmp_path):
    from opd.data.templates import packaged_templates

    words, key = ("data=file", f"data.path={rows}"), "model.student.chat_template"
    file = tmp_path / "mine.jinja"
    shutil.copy(packaged_templates()["zephyr"], file)
    packaged = address(*words, f"{key}=zephyr")
    assert address(*words, f"{key}={file}") == packaged != address(*words)
    assert len({packaged, address(*words, f"{key}=chatml"), address(*words, f"{key}=training")}) == 3
    file.write_text("{{ messages }}")
    assert address(*words, f"{key}={file}") != packaged


def test_provenance_hashes_files_and_folders_and_tells_a_hub_id(rows):
    data = {"data.path": str(SAMPLES / "capybara"), "data.eval_path": str(rows), "data.sources.a.path": "some/set"}
    hashes = provenance(seed=0, models={}, data=data)["hashes"]
    assert set(hashes["data"]) == {
        "README.md",
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
    }
    assert len(hashes["data.eval_path"]) == 64
    assert hashes["data.sources.a"] == "not a local file; see data.*.revision"

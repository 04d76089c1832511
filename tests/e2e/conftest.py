"""Models and rows that the end-to-end tests share."""

from __future__ import annotations

import pytest

from e2e.bad_input import Place
from e2e.model_folders import build_model, write_rows


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("student") / "model")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("teacher") / "model", seed=1)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Relative paths, models that are made, and the environment of the command are the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def place(tmp_path, student, teacher, rows):
    """What would run, for a test to break."""
    return Place(tmp_path, student, teacher, rows)

"""One small Slurm for all tests here; where its packages are missing they are skipped, and say so."""

from __future__ import annotations

import pytest
from e2e.conftest import rows, student, teacher  # noqa: F401  fixtures

from slurm.cluster import Cluster, missing_programs


def pytest_collection_modifyitems(items):
    here = [item for item in items if "tests/slurm/" in item.path.as_posix()]
    missing = missing_programs()
    for item in here:
        item.add_marker(pytest.mark.slow)
        if missing:
            reason = f"no {', '.join(missing)} here: apt-get install --no-install-recommends slurm-wlm munge"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Two nodes of four CPUs and two pretended GPUs. Its folder is short: a socket's path may have 107 characters."""
    with Cluster(tmp_path_factory.mktemp("slurm"), gpus=2) as cluster:
        yield cluster

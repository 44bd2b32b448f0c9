"""What several tests of this folder take long to make."""

import pytest

from tests.runs import write_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Run files: `tests.runs.Runs`."""
    return write_runs(tmp_path_factory.mktemp("runs"))

"""The small study, run once for all tests of this folder."""

import pytest
from small_study import prepare


@pytest.fixture(scope="session")
def study(new_study):
    """A study that ran from nothing to every figure and table."""
    study = prepare(new_study("study"))
    done = study.snakemake("figures")
    assert done.returncode == 0, done.stderr[-4000:]
    return study

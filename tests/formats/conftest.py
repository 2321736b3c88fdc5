"""What several of these tests need."""
from functools import partial

import pytest

import export


@pytest.fixture
def command(in_tmp_path):
    """export.py in tmp_path."""
    return partial(in_tmp_path, export.main)

"""What several of these tests need."""
from functools import partial

import pytest

import export
from tests.formats.exports import their_model, with_tokenizer


@pytest.fixture
def command(in_tmp_path):
    """export.py in tmp_path."""
    return partial(in_tmp_path, export.main)


@pytest.fixture
def theirs(rng, tmp_path):
    """The folder `theirs` of a whole model of somebody's, and the model."""
    model = their_model(rng)
    model.save_pretrained(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    return model

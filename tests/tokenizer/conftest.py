"""What several of these tests need."""
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def library_bpe():
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    some_text = Path(__file__).with_name("test_tokenmonster.py").read_text(encoding="utf-8")
    bpe.train_from_iterator([some_text], trainer)
    return bpe

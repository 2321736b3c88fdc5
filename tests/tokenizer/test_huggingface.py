"""A tokenizer.json gives the library's own ids, and what is none is refused in one line."""
import numpy as np
import pytest

import tokenizer as T
from tests.tokenizer.vocabularies import refused, stream


def test_tokenizer_json(library_bpe, tmp_path):
    folder = tmp_path / "mistral"
    folder.mkdir()
    library_bpe.save(str(folder / "tokenizer.json"))
    tokenizer = T.load(folder)
    assert (tokenizer.name, tokenizer.eos_id, tokenizer.vocab_size) == ("mistral", 1, 400)
    assert T.load(folder / "tokenizer.json").sha256 == tokenizer.sha256
    texts = ["def f(x):\n    return x", "", "na\u00efve \U0001f600 \u4e00", " two  spaces"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert ids.dtype == np.uint16 and ids.tolist() == tokenizer.encode(text).tolist()
        assert ids.tolist() == library_bpe.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode([*ids, 1]) == text == stream(tokenizer, ids)
        assert tokenizer.count_bytes(ids) == len(text.encode()) and tokenizer.count_dropped(text) == 0
    assert tokenizer.decode(tokenizer.encode("\ud800")) == "\ufffd"
    assert 1 not in tokenizer.encode("a literal </s> is text") and tokenizer.decode(tokenizer.encode("</s>")) == "</s>"
    with pytest.raises(ValueError, match="is not in mistral"):
        tokenizer.decode([400])


def test_tokenizer_json_with_an_unknown_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "<unk>": 1, "<eos>": 2}, unk_token="<unk>")
    library = tokenizers.Tokenizer(words)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    tokenizer = T.load(tmp_path / "words.json")
    assert (tokenizer.name, tokenizer.eos_id) == ("words", 2)
    assert tokenizer.count_dropped("a \u00e9\u00e9 a b") == 5


def test_tokenizer_json_refusals(library_bpe, tmp_path):
    broken = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"\xff\xfe", b"[1, 2]\n"):
        broken.write_bytes(content)
        refused(lambda: T.load(broken), "not a tokenizer.json")
    broken.write_text(library_bpe.to_str().replace("</s>", "</end>"), encoding="utf-8")
    refused(lambda: T.load(broken), "no end-of-text token")

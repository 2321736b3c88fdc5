"""Models of transformers behind the faces of ours: loaded as they are, or refused in one line. These tests also run
with transformers 4.46 (make compat)."""
import json
import socket
import sys

import pytest
import tokenizers
import torch
import transformers

from cli import BadInput
from decoding.generate import generate, generate_batch
from formats import hf, peers
from tests.formats.exports import llama
from tests.formats.peer import another_model

pytestmark = pytest.mark.usefixtures("offline")


def some_text(rng, words=40):
    """Words, code, accents and the names of special tokens."""
    choices = ["the", "of a", "return self", "(x, y)", "99999", "1 + 1 = 2.", "if x:\n    y", "caf\u00e9",
               "\u65e5\u672c", "\U0001f600", "<eos>", "</s>", "<|endoftext|>"]
    return " ".join(rng.choice(choices) for _ in range(words))


def refusal(load, *arguments, **options):
    """What is said where something is refused: one line."""
    with pytest.raises(BadInput) as error:
        load(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def gpt2(rng, tmp_path):
    """The folder of a GPT-2 with a vocabulary of its own, the model, and how its tokenizer encodes."""
    model, encode, eos = another_model(tmp_path / "gpt2", [some_text(rng)])
    assert eos == 0
    return str(tmp_path / "gpt2"), model, encode


# -----------------------------------------------------------------------------
# what is loaded

@torch.no_grad()
def test_a_model_of_a_folder(rng, gpt2):
    """It is that model, in FP32 and ready to run, whatever the folder keeps it in; its size and context are known from
    its config."""
    name, model, _ = gpt2
    loaded, config = peers.load_model(name), peers.load_config(name)
    ids = torch.randint(model.config.vocab_size, (2, 24))
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert peers.count_parameters(config, name) == model.num_parameters()
    assert peers.context_of(config, 4096) == peers.context_of(config, 24) == 24 and peers.context_of(config, 9) == 9
    model.half().save_pretrained(name)
    loaded = peers.load_model(name)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.float()) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_its_tokenizer(rng, gpt2):
    """The face of ours: any text is text, the name of a special token too; a document ends with its eos, which decodes
    to nothing; and a stream shows what the whole decodes to."""
    name, _, encode = gpt2
    library = tokenizers.Tokenizer.from_file(f"{name}/tokenizer.json")
    library.encode_special_tokens = True
    vocabulary = peers.PeerTokenizer("somebody's", peers.load_tokenizer(name))
    assert (vocabulary.name, vocabulary.eos_id, vocabulary.vocab_size) == ("somebody's", 0, library.get_vocab_size())
    for _ in range(20):
        text = some_text(rng)
        ids, dropped = vocabulary.encode_counted(text)
        assert ids.tolist() == library.encode(text).ids == vocabulary.encode(text).tolist() and dropped == 0
        assert 0 not in ids and vocabulary.decode(ids) == vocabulary.decode([*ids, 0]) == text
        if not any(special in text for special in ("<eos>", "</s>", "<|endoftext|>")):
            assert ids.tolist() == encode(text)
        stream = vocabulary.stream()
        assert "".join(map(stream.push, ids.tolist())) + stream.finish() == text


def test_a_tokenizer_without_an_end(gpt2, monkeypatch):
    """The token that begins documents can also stand between them; one of neither kind is refused."""
    name, *_ = gpt2
    theirs = peers.load_tokenizer(name)
    theirs.eos_token, theirs.bos_token = None, "the"
    assert peers.PeerTokenizer("x", theirs).eos_id == theirs.convert_tokens_to_ids("the")
    theirs.bos_token = None
    assert "x has no token to put between documents" in refusal(peers.PeerTokenizer, "x", theirs)


@torch.no_grad()
def test_a_peer_has_the_face_of_ours(rng):
    """Its logits are the model's, all or the last of them; and with no cache of its own decoding still asks for one."""
    theirs = peers.random_llama(hf.llama_config(llama().config, 2, torch.float32)).eval()
    peer, ids = peers.Peer(theirs, 48), torch.randint(2048, (3, 20))
    assert (peer.config.max_position_embeddings, peer.config.vocab_size) == (48, 2048)
    assert peer.lm_head.weight is theirs.lm_head.weight
    logits, loss = peer(ids)
    assert loss is None and torch.equal(logits, theirs(ids).logits)
    assert torch.equal(peer(ids, logits_to_keep=2)[0], logits[:, -2:])


@torch.no_grad()
@pytest.mark.skipif(transformers.__version__ < "5", reason="the page, which alone asks for a cache, has transformers 5")
def test_a_peer_remembers(rng):
    """With its cache, tokens read in parts have the logits of the whole, also where the newest have been forgotten, and
    where one text has become three; and decoding writes with it as with our model of the same weights."""
    ours = llama(max_position_embeddings=64)
    theirs = peers.random_llama(hf.llama_config(ours.config, 2, torch.float32)).eval()
    theirs.load_state_dict(ours.state_dict())
    peer, ids = peers.Peer(theirs, 64), torch.randint(2048, (3, 30))
    cache = peer.new_cache(64)
    peer(ids[:1, :9], cache)
    cache.repeat(3)
    ids[:] = torch.cat((ids[:1, :9].expand(3, -1), ids[:, 9:]), 1)
    for count in (2, 5, 1):
        cache.length = 9
        fresh = torch.randint(2048, (3, count))
        wanted = theirs(torch.cat((ids[:, :9], fresh), 1)).logits[:, 9:]
        torch.testing.assert_close(peer(fresh, cache)[0], wanted, atol=1e-4, rtol=1e-4)
        assert cache.length == 9 + count
    prompt = [rng.randrange(2048) for _ in range(rng.randint(1, 24))]
    wanted, found = list(generate(ours, prompt, 40)), list(generate(peer, prompt, 40))
    for place, (our_token, token) in enumerate(zip(wanted, found, strict=True)):
        if token != our_token:  # they may part at a rounded tie
            logits = ours(torch.tensor([prompt + wanted[:place]]))[0][0, -1]
            assert logits[our_token] - logits[token] < 1e-4
            break
    assert len(list(generate_batch(peer, prompt, 2, 90))) == 90  # past the context


@pytest.mark.parametrize("asked", ["evil/kernel", "flash_attention_2", "kernels-community/flash-attn@main:x"])
def test_a_config_does_not_choose_the_kernel(gpt2, tmp_path, monkeypatch, asked):
    """A config.json may name a repository, whose code would run: we name PyTorch's attention, and ask nobody."""
    name, model, _ = gpt2
    path = tmp_path / "gpt2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_attn_implementation": asked,
                                                               "attn_implementation": asked}))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("it asked for an address"))
    loaded = peers.load_model(name)
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert peers.count_parameters(peers.load_config(name), name) == model.num_parameters()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_model_without_that_attention(gpt2, monkeypatch):
    """A model that has only its own plain attention is loaded with that; other errors stay what they are."""
    asked = []

    def load(attn_implementation, complaint="X does not support an attention through `scaled_dot_product_attention`"):
        asked.append(attn_implementation)
        if attn_implementation == "sdpa":
            raise ValueError(complaint)
        return "loaded"

    assert peers.our_attention(load)() == "loaded" and asked == ["sdpa", "eager"]
    with pytest.raises(ValueError, match="no such file"):
        peers.our_attention(load)(complaint="no such file")


# -----------------------------------------------------------------------------
# what is not

def test_what_cannot_be_loaded(gpt2, tmp_path, monkeypatch):
    """A folder that is not there or holds no model, a name of the hub without a network, damaged files, and code that
    nobody has allowed, whatever is asked of them; nothing where transformers is missing."""
    (tmp_path / "void").mkdir()  # in other names ("empty") transformers 4 finds a kind of model ("mpt")
    for load in (peers.load_config, peers.load_tokenizer, peers.load_model):
        for name in (str(tmp_path / "void"), str(tmp_path / "nothing"), "nowhere/at_all"):
            assert f"transformers cannot load {name}: " in refusal(load, name)
    name, *_ = gpt2
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"none")
    assert f"transformers cannot load {name}: " in refusal(peers.load_model, name)
    settings = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    theirs = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(settings | {"model_type": "own", "auto_map": theirs}))
    (tmp_path / "gpt2" / "own.py").write_text("raise RuntimeError('it has run')\n")
    for load in (peers.load_config, peers.load_model):
        assert refusal(load, name) == f"{name} comes with code of its own; --trust_remote_code lets it run"
        assert "it has run" in refusal(load, name, trust_remote_code=True)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (peers.load_config, peers.load_tokenizer, peers.load_model):
        assert "pip install transformers" in refusal(load, name)


def test_an_encoder_is_no_causal_model(rng, gpt2):
    """What sees the tokens that it is to predict is refused, though transformers loads it as a causal model."""
    name, model, _ = gpt2
    encoder = transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.5)).eval()
    for eos_id in (0, rng.randrange(1, 300)):
        peers.check_causal(name, model, eos_id)
        assert "bert is not a causal model" in refusal(peers.check_causal, "bert", encoder, eos_id)


# -----------------------------------------------------------------------------
# the same model, here and there

def test_logits_are_compared(rng, tmp_path, monkeypatch):
    """Of the same weights they agree, and that is said; of others, or of numbers that are none, they are refused; and
    without transformers nothing is compared."""
    ours = llama(tie_word_embeddings=rng.random() < 0.5)
    hf.write_settings(tmp_path, ours, hf.tokenizer.load("quickstart-2048"), torch.float32)
    hf.write_tensors(tmp_path, hf.weights(ours, torch.float32))
    said = peers.compare_logits(tmp_path, ours)
    assert said.startswith(f"read with transformers {transformers.__version__}, whose logits differ by ")
    assert float(said.split()[-3]) <= peers.TOLERANCE
    weight = rng.choice(list(ours.parameters()))
    for change in (lambda: weight.data.mul_(1.5), lambda: weight.data.fill_(float("nan"))):
        change()
        assert "other logits" in refusal(peers.compare_logits, tmp_path, ours)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert peers.compare_logits(tmp_path, ours) is None

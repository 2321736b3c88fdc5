"""Models behind one face: ours and those of transformers, loaded once and kept while they are used."""
import threading
import time
from functools import partial

import pytest
import torch
import transformers

import backend
from cli import BadInput
from decoding.choice import Sampler
from decoding.generate import clean_prompt, generate, generate_batch, prompt_ids
from tests.web.models import VOCABULARY, Page, in_float64, last, llama, shelf_of, some_text
from web import html, tabs
from web.shelf import IN_MEMORY, Entry, Loaded, Shelf, their_entry

CPU = backend.pick("cpu", "fp32")


def their_model(folder, kind, rng):
    """A tiny random model of transformers with a byte-level tokenizer, in a folder -> the model."""
    import tokenizers
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator([some_text(rng, 300)], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>").save_pretrained(folder)
    shape = dict(vocab_size=304, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                 max_position_embeddings=48, initializer_range=0.3, bos_token_id=None, eos_token_id=0)
    config, model = {"gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
                     "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}[kind]
    model = model(config(**shape)).eval()
    model.save_pretrained(folder)
    return model, library


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_models_of_transformers(offline, tmp_path, rng, kind):
    """Such a model, loaded from a folder, generates through decoding.generate what transformers generates, streams it
    as its tokenizer decodes it, and is coloured by its own probabilities; its insides are not shown, in a line."""
    theirs, library = their_model(tmp_path / kind, kind, rng)
    entry = their_entry(str(tmp_path / kind), False, CPU)
    assert (entry.name, entry.parameters, entry.ours) == (kind, theirs.num_parameters(), False)
    shelf = Shelf([entry])
    loaded, prompt = shelf.get(kind), some_text(rng, 4)
    ids = prompt_ids(loaded.vocabulary, prompt)
    assert ids == [0, *library.encode(clean_prompt(prompt)).ids] and loaded.vocabulary.vocab_size == 300
    ours = list(generate(loaded.model, ids[:20], 20, Sampler(vocab_size=300), 0))
    wanted = theirs.generate(torch.tensor([ids[:20]]), attention_mask=torch.ones(1, len(ids[:20])), generation_config=(
        transformers.GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=0, pad_token_id=0,
                                      suppress_tokens=[300, 301, 302, 303])))[0, len(ids[:20]):].tolist()
    assert ours == (wanted[:wanted.index(0)] if 0 in wanted else wanted)
    with torch.no_grad():  # one text goes on as three; then what is newest is forgotten, and read in another way
        cache = loaded.model.new_cache(48)
        loaded.model(torch.tensor([ids[:9]]), cache)
        cache.repeat(3)
        for count in (2, 3):
            cache.length = 9
            more = torch.tensor([[rng.randrange(300) for _ in range(count)] for _ in range(3)])
            logits, _ = loaded.model(more, cache)
            wanted = theirs(torch.cat((torch.tensor([ids[:9]] * 3), more), 1)).logits[:, 9:]
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
            assert cache.length == 9 + count
    texts = list(generate_batch(loaded.model, ids[:20], 2, 60, Sampler(1.0, vocab_size=300)))  # of 48
    assert len(texts) == 60 and max(map(max, texts)) < 300
    shown, _, state = last(tabs.explore(shelf, kind, prompt, 15, 1.0, 1.0, 0, "3"))
    with torch.no_grad():
        p = theirs(torch.tensor([state["ids"]])).logits[0, :-1, :300].double().softmax(-1)
    for token in Page(shown).all("span", "token"):
        place = int(token[1]["data-pick"])
        if min(abs(x := float(p[place - 1, state["ids"][place]])) - 0.8, abs(x - 0.35)) > 1e-4:
            assert token[1]["class"].split()[1] == html.shade(x)
    with pytest.raises(BadInput, match="only the insides of our own"):
        last(tabs.examine(shelf, kind, "x", 1, 0))


def test_no_such_model(offline, tmp_path):
    """A folder that is not there, or holds no model, is one line."""
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(BadInput, match="cannot load") as error:
            their_entry(str(name), False, CPU)
        assert "\n" not in str(error.value)


def test_shelf_loads_once(rng):
    """Users who ask for a model at the same time wait for one loading; those used last stay in memory."""
    model, loads = llama(), []

    def load(name):
        loads.append(name)
        time.sleep(0.02)
        return Loaded(name, model, VOCABULARY)

    names = [f"model {i}" for i in range(IN_MEMORY + 2)]
    shelf = Shelf([Entry(name, 1, 1, True, partial(load, name)) for name in names])
    users = [threading.Thread(target=shelf.get, args=(names[0],)) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert loads == [names[0]]
    assert names[1] in tabs.loading(shelf, *names[:2]) and names[0] not in tabs.loading(shelf, *names[:2])
    for name in names[1:]:
        shelf.get(name)
        shelf.get(names[0])
    assert loads == names and set(shelf.loaded) == {names[0], *names[-IN_MEMORY + 1:]}


def test_a_slow_load_keeps_nobody_else_waiting(rng):
    """While one model is loading, another can be had."""
    done, model = threading.Event(), llama()

    def load(name):
        assert name == "b" or done.wait(10), "the other user had to wait"
        return Loaded(name, model, VOCABULARY)

    shelf = Shelf([Entry(name, 1, 1, True, partial(load, name)) for name in "ab"])
    slow = threading.Thread(target=shelf.get, args=("a",))
    slow.start()
    quick = threading.Thread(target=lambda: (shelf.get("b"), done.set()))
    quick.start()
    for user in (quick, slow):
        user.join()
    assert set(shelf.loaded) == set("ab")


def test_models_of_one_name(rng):
    """Of two runs of one name, a picked token shows the alternatives of the model that has read the text."""
    models = [llama(), llama()]
    shelf = shelf_of(*models, names=["run", "run"])
    for name, model in zip(("run", "run (2)"), models):
        state = last(tabs.survey(shelf, name, "def read(self):"))[2]
        p = in_float64(model, state["ids"])[0]
        shown = Page(last(tabs.pick(shelf, state, 1, 1, 1, 0))).all("td")[2][2]
        assert abs(float(shown[:-1]) / 100 - float(p.max())) < 6e-4

"""Generation goes on as transformers' and as a model without a cache does, and draws from what the filters leave."""
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from decoding.choice import Sampler
from decoding.generate import Reader, generate, generate_batch, prompt_ids
from tests.decoding.models import EOS, VOCABULARY, llama


def greedy_slowly(model, ids, count):
    """Greedy generation without a cache: a text that outgrows the context is seen from its newest half on."""
    context, ids = model.config.max_position_embeddings, list(ids)
    start = max(0, len(ids) - context)
    for _ in range(count):
        if len(ids) - start > context:
            start = len(ids) - max(1, context // 2)
        ids.append(int(model(torch.tensor([ids[start:]]))[0][0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_that_of_transformers(rng, penalty):
    """Greedy generation gives transformers' tokens, with a penalty too; they may part at a rounded tie."""
    model, prompt = llama(max_position_embeddings=64), [rng.randrange(60) for _ in range(rng.randint(1, 20))]
    c = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=c.rms_norm_eps, bos_token_id=None,
        eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    theirs.load_state_dict(model.state_dict())
    wanted = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                             generation_config=GenerationConfig(
                                 do_sample=False, repetition_penalty=penalty, max_new_tokens=40,
                                 output_scores=True, return_dict_in_generate=True))
    ours, tokens = list(generate(model, prompt, 40, Sampler(repetition_penalty=penalty))), wanted.sequences[0]
    for token, their_token, scores in zip(ours, tokens[len(prompt):].tolist(), wanted.scores, strict=True):
        if token != their_token:
            assert scores.max() - scores[0, token] < 1e-5
            break


@torch.no_grad()
@pytest.mark.parametrize("context, length", [(8, 3), (8, 8), (8, 9), (7, 30), (2, 1), (1, 1), (1, 5)])
def test_past_the_context(rng, context, length):
    """A text or a prompt that outgrows the context goes on from its newest half, or prompt's last part."""
    model = llama(max_position_embeddings=context, fp32_norms=False, fp32_blocks=()).double()  # no near ties
    prompt = [rng.randrange(60) for _ in range(length)]
    assert list(generate(model, prompt, 40)) == greedy_slowly(model, prompt, 40)


def test_stops_at_eos(rng):
    """Generation ends before the end-of-document token, and after max_new_tokens."""
    model = llama()
    free = list(generate(model, [5], 20))
    for eos_id in set(free):
        assert list(generate(model, [5], 20, eos_id=eos_id)) == free[:free.index(eos_id)]
    assert list(generate(model, [5], 4)) == free[:4]


def test_rows_without_a_token(rng):
    """Rows beyond vocab_size are never generated, however likely; it is as if they were not there."""
    model = llama()
    model.lm_head.weight.data[40:] *= 100
    assert max(generate(model, [1], 20)) >= 40
    for temperature in (0.0, 2.0):
        assert max(generate(model, [1], 100, Sampler(temperature, vocab_size=40))) < 40
    shorter = llama(vocab_size=40)
    weights = model.state_dict()
    weights |= {name: weights[name][:40] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    shorter.load_state_dict(weights)
    drawn = [list(generate(m, [1], 30, Sampler(1.0, generator=torch.Generator().manual_seed(3), vocab_size=40)))
             for m in (model, shorter)]
    assert drawn[0] == drawn[1]


def test_seed(rng):
    """A seed gives the same text again, and another seed another."""
    model = llama()
    drawn = [list(generate(model, [1], 30, Sampler(1.0, generator=torch.Generator().manual_seed(seed))))
             for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}])
def test_frequencies(rng, filters):
    """Of 4,000 tokens drawn each comes as often as its probability says, by chi-square.

    The model's embeddings are all alike, and so are its logits at every place.
    """
    model = llama(vocab_size=8)
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[0].clone()
    temperature = rng.uniform(0.7, 2)
    with torch.no_grad():
        p = (model(torch.tensor([[0]]))[0][0, 0].double() / temperature).exp()
    p = p / p.sum()
    likeliest = p.argsort(descending=True).tolist()
    if filters:
        before = p[likeliest].cumsum(0) - p[likeliest]  # what the likelier tokens have together
        left = likeliest[:3] if "top_k" in filters else [t for t, b in zip(likeliest, before) if b < 0.6]
        p[[t for t in range(8) if t not in left]] = 0
        p = p / p.sum()
    drawn = torch.tensor(list(generate(model, [0], 4000, Sampler(temperature, **filters))))
    counts = torch.bincount(drawn, minlength=8)
    assert not counts[p == 0].any()
    common = 4000 * p > 5  # chi-square is not for rare ones
    chi_square = ((counts - 4000 * p)[common] ** 2 / (4000 * p)[common]).sum()
    assert chi_square < 60, (counts, 4000 * p)  # 7 degrees of freedom


@torch.no_grad()
def batch_slowly(model, prompt, rows, count, sampler, vocab_size):
    """generate_batch without a cache or an end: each text is read anew at every step, with its newest half where it
    has outgrown the context. A list of rows of ids."""
    context, texts = model.config.max_position_embeddings, [list(prompt) for _ in range(rows)]
    start = max(0, len(prompt) - context)
    for _ in range(count):
        if len(texts[0]) - start > context:
            start = len(texts[0]) - max(1, context // 2)
        logits = torch.stack([model(torch.tensor([text[start:]]))[0][0, -1, :vocab_size].float() for text in texts])
        seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, torch.tensor(texts), True)
        for text, token in zip(texts, sampler.choose(logits, seen, sampler.chance(len(texts))).tolist()):
            text.append(token)
    return [text[-count:] for text in texts]


IN_FLOAT64 = {"fp32_norms": False, "fp32_blocks": ()}  # where no two logits are equal but for rounding


@pytest.mark.parametrize("context, length", [(64, 5), (16, 3), (8, 20), (2, 1), (1, 3)])
def test_batch(rng, context, length):
    """All texts of a batch are what they are without a cache and a shared beginning, past the context too; one that
    comes to its end goes on as None, and with the last of them the batch ends."""
    model, prompt = llama(max_position_embeddings=context, **IN_FLOAT64).double(), [7] * (length - 1) + [3]
    settings = dict(temperature=1.5, top_k=rng.choice([None, 9]), top_p=rng.choice([None, 0.9]),
                    repetition_penalty=rng.choice([1.0, 1.5]))
    seed, vocab_size = rng.randrange(2**31), rng.choice([None, 40])
    sampler = Sampler(**settings, generator=torch.Generator().manual_seed(seed))
    rows = batch_slowly(model, prompt, 3, 30, sampler, vocab_size)
    for eos_id in (None, rows[0][0], rows[1][-1], rng.randrange(40)):
        sampler = Sampler(**settings, generator=torch.Generator().manual_seed(seed), vocab_size=vocab_size)
        ours = list(generate_batch(model, prompt, 3, 30, sampler, eos_id))
        ends = [row.index(eos_id) if eos_id in row else 30 for row in rows]
        assert ours == [[row[i] if i < end else None for row, end in zip(rows, ends)] for i in range(max(ends))]


def test_greedy_batch(rng):
    """Greedy, every row of a batch is what generate writes."""
    model = llama(**IN_FLOAT64).double()
    for eos_id in (None, rng.randrange(60)):
        one = list(generate(model, [1, 2, 3], 70, eos_id=eos_id))
        assert list(generate_batch(model, [1, 2, 3], 4, 70, eos_id=eos_id)) == [[token] * 4 for token in one]


def shapes_of(model):
    """A list that grows with every call of the model: the shape of its input."""
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def test_what_is_read(rng):
    """A prompt is read once for all texts, and then one token of each; past the context the newest half of each. The
    head sees the last token alone."""
    model = llama()  # of 32
    shapes, of_the_head = shapes_of(model), shapes_of(model.lm_head)
    list(generate_batch(model, list(range(30)), 3, 22, Sampler(3.0, generator=torch.Generator().manual_seed(1))))
    assert shapes == [(1, 30), (3, 1), (3, 1), (3, 16)] + 16 * [(3, 1)] + [(3, 16), (3, 1)]
    assert [shape[:-1] for shape in of_the_head] == [(rows, 1) for rows, _ in shapes]
    shapes.clear()
    list(generate(model, range(50), 3))
    assert shapes == [(1, 32), (1, 16), (1, 1)]


@torch.no_grad()
@pytest.mark.parametrize("case", range(5))
def test_reader(rng, case):
    """A Reader reads what is new and what has changed, and nothing else, and its logits are those of the whole text."""
    model, rows = llama(**IN_FLOAT64).double(), rng.randint(1, 3)
    shapes, reader = shapes_of(model), Reader(model)
    texts = [[rng.randrange(60) for _ in range(rng.randint(1, 8))]] * rows
    reader.read(texts)
    for _ in range(20):
        kept, count = rng.randint(max(1, len(texts[0]) - 4), len(texts[0])), rng.randint(1, 5)
        if kept + count > 32:
            continue
        texts = [text[:kept] + [rng.randrange(60) for _ in range(count)] for text in texts]
        shapes.clear()
        logits = reader.read(texts, count)
        assert shapes == [(rows, count)] and reader.room(len(texts[0])) == 32 - len(texts[0])
        assert logits.dtype == torch.float32 and logits.shape == (rows, count, 60)
        assert (logits - model(torch.tensor(texts))[0][:, -count:]).abs().max() < 1e-5


@torch.no_grad()
def test_room(rng):
    """room() more tokens are read with the others still in mind; one more, and the newest half is read again."""
    model = llama()
    shapes = shapes_of(model)
    for length in (5, 32, 45):
        reader, text = Reader(model), [rng.randrange(60) for _ in range(80)]
        assert max(0, reader.room(length)) == max(0, 32 - length)
        reader.read([text[:length]])
        room = reader.room(length)
        assert room == max(0, 32 - length)
        shapes.clear()
        reader.read([text[:length + room]], 1)
        assert shapes == [(1, max(1, room))] and reader.room(length + room) == 0
        reader.read([text[:length + room + 1]])
        assert shapes[1:] == [(1, 16)] and reader.room(length + room + 1) == 16


def test_empty_prompt_is_refused():
    """generate has nothing to begin with."""
    with pytest.raises(ValueError, match="empty"):
        next(generate(llama(), [], 5))
    with pytest.raises(ValueError, match="empty"):
        next(generate_batch(llama(), torch.tensor([]), 2, 5))


@pytest.mark.parametrize("prompt, normal", [
    ("", ""), ("Hello", "Hello"), ("1 + 1 = ", "1 + 1 ="), ("a  ", "a  "), (" ", " "), ("    ", "    "),
    ("if x:\n    ", "if x:\n    "), ("a\r\nb\rc", "a\nb\nc"), ("\ufb01ne", "fine"), ("a \n", "a \n"),
])
def test_prompt_ids(prompt, normal):
    """A prompt follows an end of document, is normalised as the training text, and loses one last space."""
    assert prompt_ids(VOCABULARY, prompt) == [EOS, *VOCABULARY.encode(normal).tolist()]

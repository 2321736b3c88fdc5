"""What others have made for transformers' models takes an export as it is: peft trains it, lm-eval scores it."""
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import checkpoint
import export
import tokenizer
from config import Config
from decoding.generate import generate
from model import Llama, ModelConfig
from tests.commands import ROOT

transformers = pytest.importorskip("transformers")

CONTEXT = 128
ENGLISH = ROOT.parent / "shared" / "tokenmonster" / "english-4096-strict-nocapcode-v1.vocab"  # has " of a" and its like
VOCABULARY = ENGLISH if ENGLISH.is_file() else "quickstart-2048"  # has ": >>>" at least


def save(folder, segmentation, name=VOCABULARY, **changes):
    """A run with one checkpoint of a small model -> (the model, its tokenizer).

    Its weights are so large that its likeliest tokens change from place to place.
    """
    vocabulary = tokenizer.load(name, segmentation)
    model = Llama(ModelConfig(vocab_size=vocabulary.vocab_size, hidden_size=48, intermediate_size=64,
                              num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT,
                              rms_norm_eps=1e-5, rope_theta=50_000.0, **changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    config = Config(name="tiny", model=model.config, tokenizer=str(name), tokenizer_segmentation=segmentation,
                    block_size=32, tokens_per_step=32)
    state = {"step": 3, "seconds": 60.0, "tokenizer_sha256": vocabulary.sha256,
             "config": json.loads(json.dumps(asdict(config), default=str))}
    checkpoint.save(folder, model, None, state, True, 1)
    return model, vocabulary


@pytest.fixture(scope="module")
def draw():
    """As rng, for what is made once for several tests."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed} of the models and tasks")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(scope="module")
def exported(draw, tmp_path_factory):
    """By segmentation: (folder of the export, the model, its tokenizer)."""
    made = {}
    for segmentation in ("exact", "portable"):
        folder = tmp_path_factory.mktemp(segmentation)
        model, vocabulary = save(folder / "run", segmentation)
        export.main(["--checkpoint", str(folder / "run"), "--out", str(folder / "hf")])
        made[segmentation] = folder / "hf", model, vocabulary
    return made


# -----------------------------------------------------------------------------
# peft

@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lora(tied, in_process, tmp_path, rng):
    """LoRA on every linear layer learns and leaves the weights alone. Merged into them it gives the same logits, and
    the merged model comes back as a checkpoint of ours."""
    peft = pytest.importorskip("peft")
    model, vocabulary = save(tmp_path / "run", "portable", "quickstart-2048", tie_word_embeddings=tied)
    assert in_process(export.main, "--checkpoint", tmp_path / "run", "--out", tmp_path / "hf")[0] == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=16)
    lora = peft.get_peft_model(base, settings)
    adapted = [name for name, _ in lora.named_modules() if name.endswith("_proj.lora_A.default")]
    assert len(adapted) == 7 * 2
    ids = torch.randint(2048, (4, 24))
    with torch.no_grad():
        assert torch.allclose(lora.eval()(ids).logits, model(ids)[0], atol=1e-4)  # an adapter begins as nothing

    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = lora.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1, losses
    kept = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p
            for name, p in lora.named_parameters() if "lora_" not in name}
    ours = dict(model.named_parameters())
    assert kept.keys() == ours.keys() and all(torch.equal(kept[name], p) for name, p in ours.items())

    lora.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = lora(ids).logits
        merged = lora.merge_and_unload()
        found = merged(ids).logits
        assert not torch.allclose(wanted, model(ids)[0], atol=1e-2)
        fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()(ids).logits
    assert (found - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    assert torch.allclose(again, wanted, atol=1e-5)

    merged.save_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "merged")
    code, out, err = in_process(export.main, "--from", tmp_path / "merged", "--out", tmp_path / "back")
    assert code == 0 and "logits differ" in out, (out, err)
    opened = checkpoint.open_trained(tmp_path / "back", "latest")
    back = opened.model
    assert back.config.tie_word_embeddings == tied and back.config.rope_theta == 50_000
    with torch.no_grad():
        assert (back(ids)[0] - found).abs().max() < 1e-5 * max(1.0, float(found.abs().max()))
    text = "def read(self):\n    return self.a  # caf\u00e9 \x01"
    assert opened.vocabulary.encode(text).tolist() == vocabulary.encode(text).tolist()


# -----------------------------------------------------------------------------
# lm-eval

# A process of its own: lm-eval and what it uses read HF_HUB_OFFLINE when they are imported. The code of the model card
# is run as it stands there, but for the folder and the tasks.
LM_EVAL = """
import json, re, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

folders, tasks, out = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
manager = TaskManager(include_path=tasks, include_defaults=False)

def evaluate(model, name):
    return lm_eval.simple_evaluate(model, tasks=[f"{name}_choice", f"{name}_text"], task_manager=manager,
                                   bootstrap_iters=0)

found = {"portable": evaluate(HFLM(pretrained=folders["portable"], device="cpu", batch_size=4), "portable")}
with open(folders["exact"] + "/README.md", encoding="utf-8") as file:
    [source] = [code for code in re.findall(r"```python\\n(.*?)```", file.read(), re.DOTALL) if "lm_eval" in code]
mine = 'tasks=["exact_choice", "exact_text"], task_manager=manager, bootstrap_iters=0'
for old, new in (('"FOLDER"', repr(folders["exact"])), ('tasks=["arc_easy"]', mine)):
    assert source.count(old) == 1, source
    source = source.replace(old, new)
scope = {"manager": manager}
exec(source, scope)
found["exact"] = scope["results"]
docs = [sample["doc"] for sample in found["exact"]["samples"]["exact_choice"]]
plain = [HFLM._encode_pair(scope["model"], doc["question"], " " + choice)
         for doc in docs if doc["question"] for choice in doc["choices"]]
kept = {name: {key: results[key] for key in ("results", "samples")} for name, results in found.items()}
kept["exact"]["without an answer"] = sum(answer == [] for _, answer in plain)
with open(out, "w") as file:
    json.dump(kept, file, default=str)
"""

CHOICE = """task: {name}_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/{name}_choice.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """task: {name}_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/{name}_text.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@torch.no_grad()
def log_likelihood(model, before, after):
    """Of the ids `after` when they follow `before`, in nats; and whether each is the likeliest."""
    logits = model(torch.tensor([before + after]))[0][0, len(before) - 1:-1].double().log_softmax(-1)
    return float(logits[range(len(after)), after].sum()), logits.argmax(-1).tolist() == after


def choices(model, vocabulary, doc):
    """[(log-likelihood, whether it is greedy)] of each choice, question and answer tokenized apart."""
    question = vocabulary.encode(doc["question"]).tolist() or [vocabulary.eos_id]
    return [log_likelihood(model, question, vocabulary.encode(f" {choice}").tolist()) for choice in doc["choices"]]


def picks(scores, doc):
    """What acc and acc_norm choose: the largest log-likelihood, and the largest per character; None at a near tie."""
    lists = [score for score, _ in scores], [score / len(choice) for (score, _), choice in zip(scores, doc["choices"])]
    if any(sorted(each)[-1] - sorted(each)[-2] < 1e-4 for each in lists):
        return None
    return [each.index(max(each)) for each in lists]


def choice_docs(model, vocabulary, draw):
    """Questions with answers of one word and of several, and with every kind of end; 1 in 2 right by chance."""
    pieces = tokenizer.load(VOCABULARY).pieces
    across = [piece.decode().rpartition(" ") for piece in pieces if re.search(rb"\S ", piece) and b"\x7f" not in piece]
    words = sorted(set(re.findall(r"[a-z]{2,9}", (ROOT / "README.md").read_text(encoding="utf-8"))))
    docs = []
    while len(docs) < 40:
        first, _, last = draw.choice(across)
        question = " ".join(draw.sample(words, draw.randint(1, 8))) + first
        if len(docs) % 4 == 3:  # any words, or none
            question = draw.choice(["", question + ":", question + ".\n\nA:"])
        answers = [last, "of a", " ".join(draw.sample(words, 2)), draw.choice(words), draw.choice(words) + "\n"]
        doc = {"question": question, "choices": draw.sample(answers, draw.randint(2, 5))}
        if (best := picks(choices(model, vocabulary, doc), doc)) is not None:
            docs.append(doc | {"gold": draw.choice([best[0], best[1], draw.randrange(len(doc["choices"]))])})
    return docs


def continuation(model, vocabulary, question):
    """What the model writes, up to an end of line; None where a choice was a near tie."""
    ids = vocabulary.encode(question).tolist()
    new = list(generate(model, ids, 12, eos_id=vocabulary.eos_id))
    with torch.no_grad():
        top = model(torch.tensor([ids + new]))[0][0, len(ids) - 1:].topk(2).values
    return None if (top[:, 0] - top[:, 1]).min() < 1e-4 else vocabulary.decode(new).split("\n")[0]


def text_docs(model, vocabulary, draw):
    """Questions with what the model writes, or nearly so, as the answer."""
    words = re.findall(r"\S+", (ROOT / "README.md").read_text(encoding="utf-8"))
    docs = []
    while len(docs) < 16:
        start = draw.randrange(len(words) - 12)
        question = " ".join(words[start:start + draw.randint(1, 12)])
        text = continuation(model, vocabulary, question) if question.isascii() else None
        if text and text == text.strip():
            docs.append({"question": question, "answer": text + draw.choice(["", "x"])})
    return docs


@pytest.fixture(scope="module")
def scored(exported, draw, tmp_path_factory):
    """What lm-eval found, and the documents that it was given: by segmentation."""
    pytest.importorskip("lm_eval")
    folder, docs = tmp_path_factory.mktemp("tasks"), {}
    for name, (_, model, vocabulary) in exported.items():
        docs[name] = choice_docs(model, vocabulary, draw), text_docs(model, vocabulary, draw)
        for kind, yaml, lines in (("choice", CHOICE, docs[name][0]), ("text", TEXT, docs[name][1])):
            (folder / f"{name}_{kind}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in lines))
            (folder / f"{name}_{kind}.yaml").write_text(yaml.format(name=name, folder=folder))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache"),
               "NUMBA_DISABLE_JIT": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    folders = {name: str(made[0]) for name, made in exported.items()}
    command = [sys.executable, "-c", LM_EVAL, json.dumps(folders), folder, folder / "found.json"]
    done = subprocess.run(command, cwd=folder, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    return {name: (docs[name], found[name]) for name in exported}


def answered(docs, found, task):
    """(document, what lm-eval has of it) of each."""
    samples = sorted(found["samples"][task], key=lambda sampled: sampled["doc_id"])
    assert [sampled["doc"] for sampled in samples] == docs
    return list(zip(docs, samples))


segmentations = pytest.mark.parametrize("segmentation", ["portable", "exact"])


@segmentations
def test_lm_eval_multiple_choice(segmentation, exported, scored):
    """With the portable tokenizer by lm-eval itself, with the exact one by the code of the model card: every choice has
    the log-likelihood that our model gives it, and acc and acc_norm are what follows from them."""
    _, model, vocabulary = exported[segmentation]
    (docs, _), found = scored[segmentation]
    right = []
    for doc, sampled in answered(docs, found, f"{segmentation}_choice"):
        wanted = choices(model, vocabulary, doc)
        for (score, greedy), [their_score, their_greedy] in zip(wanted, sampled["filtered_resps"], strict=True):
            assert float(their_score) == pytest.approx(score, abs=1e-3), (doc, sampled)
            assert str(their_greedy) == str(greedy)
        right.append([pick == doc["gold"] for pick in picks(wanted, doc)])
    scores = found["results"][f"{segmentation}_choice"]
    for metric, hits in zip(("acc", "acc_norm"), zip(*right)):
        assert scores[f"{metric},none"] == pytest.approx(sum(hits) / len(hits)) and 0 < sum(hits) < len(hits)


@segmentations
def test_lm_eval_generation(segmentation, exported, scored):
    """The greedy text is decoding.generate's up to the end of a line, and exact_match counts it."""
    _, model, vocabulary = exported[segmentation]
    (_, docs), found = scored[segmentation]
    hits = []
    for doc, sampled in answered(docs, found, f"{segmentation}_text"):
        text = continuation(model, vocabulary, doc["question"])
        assert sampled["filtered_resps"] == [text]
        hits.append(text == doc["answer"])
    scores = found["results"][f"{segmentation}_text"]
    assert scores["exact_match,none"] == pytest.approx(sum(hits) / len(hits))


def test_the_code_of_the_card_is_needed(scored):
    """Cut up as lm-eval does by itself, some answers would have no token of the exact tokenizer: it asserts that they
    have."""
    assert scored["exact"][1]["without an answer"] > 0

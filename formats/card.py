"""The README.md of an exported model. It is made from the run alone: every figure in it comes from the run.

A reader of a card wants to know, in this order: what it is, how to load it, what it writes, how it was made, how good
it is, what not to do with it, and its licence. The sections are those of the Stentor cards. They also answer what
readers of those cards had to ask: which tokenizer, which precision, and bits per byte beside perplexity.
"""

import textwrap
from pathlib import Path

import torch

from checkpoint import Trained, run_dir
from decoding.choice import Sampler
from decoding.generate import continuation, generate, prompt_ids
from model import Llama
from run import duration, read_metrics
from sizing import count_parameters, memory_table
from tokenizer import Tokenizer, TokenMonster

MARKS = """It also writes delete marks, which llama.cpp does not know: remove each character 0x7F, and the space
after it (in Python: `text.replace("\\x7f ", "")`)."""

PROMPTS = ("", "The history of", "def read(", "1 + 1 =")
ROWS = 12  # at most, in the loss history

# What a reader of a card calls them.
TYPES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "Q8_0", "int4": "Q4_0"}
FORMS = {  # the library, as the hub names it, and what to call the format
    "hf": ("transformers", "for transformers, with {} weights"), "gguf": ("gguf", "for llama.cpp, with {} weights"),
    "onnx": ("transformers.js", "as an ONNX graph in {}"),
    "int8": ("nanostentor", "with INT8 weights, and {} where INT8 will not do"),
    "int4": ("nanostentor", "with INT4 weights"), "bundle": ("nanostentor", "in one file, with weights of few bits")}
ROUNDED = ("int8", "int4", "bundle")

LOAD = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
inputs = tokenizer(tokenizer.bos_token + "The history of", return_tensors="pt")  # in training, documents begin with it
ids = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.8, top_p=0.9)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```""",
    "gguf": """    llama-completion --model FILE.gguf --prompt "The history of" --temp 0.8 --top-p 0.9

or in Python, with llama-cpp-python: `Llama("FILE.gguf")("The history of", max_tokens=80)`.""",
    "onnx": """`onnx/model.onnx` takes input_ids, attention_mask and the past keys and values (of length 0 at first). It
returns logits and the new past. In JavaScript, with the folder served under its name:

```js
import {{ pipeline }} from "@huggingface/transformers";
const generate = await pipeline("text-generation", "FOLDER", {{ dtype: "fp32" }});
console.log(await generate("The history of", {{ max_new_tokens: 80 }}));
```""",
    "int8": """    python sample.py --checkpoint FOLDER --prompt "The history of"

with nanoStentor. A weight is `name` (int8) times `name_scale` (FP32, one for each output channel).""",
    "int4": """    python sample.py --checkpoint FOLDER --prompt "The history of"

with nanoStentor. A weight is INT4 in groups of 32 with a scale (`name_scale`), as `decoding/narrow.py` says.""",
    "bundle": """    python sample.py --checkpoint NAME.safetensors --prompt "The history of"

with nanoStentor. The file holds the weights (`decoding/narrow.py` says how), the settings and the vocabulary.""",
}

EXACT_TOKENIZER = """The tokenizer is TokenMonster's. It runs code in this folder (`tokenization_tokenmonster.py`;
nothing is downloaded), which is why transformers asks for `trust_remote_code=True`. It gives the ids that the model was
trained on.

lm-eval splits a text into question and answer after tokenizing it, but this tokenizer may write the end of the one and
the start of the other as one token. To score the model, tokenize the two apart:

```python
import lm_eval
from lm_eval.models.huggingface import HFLM


class TokenMonsterLM(HFLM):
    def _encode_pair(self, context, continuation):
        words = context.rstrip()  # white space between the two belongs to the answer, as in lm-eval itself
        return self.tok_encode(words), self.tok_encode(context[len(words):] + continuation)


model = TokenMonsterLM(pretrained="FOLDER", trust_remote_code=True, device="cpu")  # or "cuda"
results = lm_eval.simple_evaluate(model, tasks=["arc_easy"])
```"""

READ_PORTABLY = """**The tokenizer is not quite the one that the model was trained with.** It has the same tokens, in a
form that needs no code. But the model learnt from text that TokenMonster's own search cut up in another way, so text in
these tokens is strange to it. It continues a prompt, but do not score texts or run benchmarks with this folder. For
those, export it with the exact tokenizer, or train with `tokenizer_segmentation="portable"`. Characters without a token
become "?"."""

COMMITS = """A commit is the state of a dataset on the Hugging Face hub that was read. To get the same text, name it:
`load_dataset("OWNER/NAME", revision="COMMIT")`."""

LIMITS = """This is a base model: it continues text. It has not been taught to follow instructions, to answer questions,
to be truthful or to be safe. It is small: most facts that it states are wrong, and it soon loses the thread. It repeats
errors, biases and private details from its training text. What it writes may be offensive, or be code that does harm
when run.

Good for: learning how language models work, experiments that need many small models, fine-tuning on a narrow task, a
draft model for speculative decoding, devices with little memory. Not for: advice, facts, decisions about people, or
any place where a reader may think that a person wrote its text."""


def table(header: tuple, rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def samples(model: Llama, vocabulary: Tokenizer) -> str:
    """What the model writes after each prompt in PROMPTS, with sample.py's settings and a fixed seed."""
    blocks = []
    for prompt in PROMPTS:
        sampler = Sampler(temperature=0.8, top_p=0.9, repetition_penalty=1.1,
                          generator=torch.Generator().manual_seed(0), vocab_size=vocabulary.vocab_size)
        before = prompt_ids(vocabulary, prompt)
        text = continuation(vocabulary, before, list(generate(model, before, 80, sampler, vocabulary.ends)))
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        blocks.append(f"Prompt: {f'`{prompt}`' if prompt else 'none (a new document)'}\n\n"
                      + textwrap.indent(prompt + text, "    ", lambda line: True))
    return "\n\n".join(blocks)


def architecture(model: Llama, vocabulary: Tokenizer) -> str:
    """Shape, parameters and memory."""
    c, total = model.config, model.num_parameters()
    shape = [("layers", c.num_hidden_layers), ("hidden size", c.hidden_size), ("MLP size", c.intermediate_size),
             ("attention heads", c.num_attention_heads), ("key/value heads", c.num_key_value_heads),
             ("head size", c.head_dim), ("context", f"{c.max_position_embeddings:,} tokens"),
             ("vocabulary", f"{vocabulary.name}, {vocabulary.vocab_size:,} tokens in {c.vocab_size:,} rows"),
             ("RoPE base", f"{c.rope_theta:,.0f}"),
             ("embedding and head", "tied" if c.tie_word_embeddings else "untied")]
    parameters = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in count_parameters(model).items()]
    memory = [(name, f"{a / 1e6:.1f} MB", f"{b / 1e6:.1f} MB") for name, (a, b) in memory_table(c, total).items()]
    return "\n\n".join([
        "Llama: RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU, no biases.",
        table(("", ""), shape), table(("parameters", "", ""), [*parameters, ("total", f"{total:,}", "")]),
        table(("precision", "weights", "KV cache of a full context"), memory)])


def training(state: dict) -> str:
    """Hyperparameters and data, from the run's config."""
    run = state["config"]
    names = ("tokens_per_step", "block_size", "max_steps", "learning_rate", "schedule", "warmup_fraction",
             "decay_fraction", "weight_decay", "betas", "eps", "max_grad_norm", "seed", "dtype", "int8_linears",
             "tokenizer_segmentation")
    settings = [(f"`{name}`", f"{run[name]:,}" if type(run[name]) is int else run[name])
                for name in names if name in run]
    tokens = state["step"] * run["tokens_per_step"]
    text = (f"{state['step']:,} optimizer steps of {run['tokens_per_step']:,} tokens, {tokens:,} tokens in all, in "
            f"{duration(state['seconds'])}, with AdamW.\n\n{table(('setting', 'value'), settings)}")
    commits, sources = state.get("commits", {}), []
    for name, source in run["sources"].items():
        data = " ".join(filter(None, (source["dataset"], source["subset"], *source["data_files"])))
        data += f" at commit {commits[name]}" if name in commits else ""
        sources.append((name, data, f"{source['ratio']:.0%}", f"{source['anneal_ratio']:.0%}"))
    if sources:
        text += (f"\n\nThe mixture of the training text, and that of the last {run['anneal_fraction']:.0%} of the run:"
                 f"\n\n{table(('source', 'data', 'share', 'share in the anneal'), sources)}")
    if commits:
        text += f"\n\n{COMMITS}"
    return text


def history(step_dir: Path, state: dict) -> str:
    """Held-out loss, perplexity and bits per byte over the run up to this checkpoint; "" if nothing was measured."""
    run = run_dir(step_dir)
    metrics = read_metrics(run / "metrics.jsonl", state["step"])
    evaluations = [entry for entry in metrics if {"val_loss", "val_perplexity", "val_bits_per_byte"} <= entry.keys()]
    if not evaluations:
        return ""
    kept = evaluations[::-1][::-(-len(evaluations) // ROWS)][::-1]  # evenly spaced, the last one included
    rows = [(f"{entry['step']:,}", f"{entry['val_loss']:.4f}", f"{entry['val_perplexity']:.2f}",
             f"{entry['val_bits_per_byte']:.4f}") for entry in kept]
    text = ("On held-out documents of the training sources, mixed as in training. Loss and perplexity are per token, "
            "so you cannot compare them between vocabularies. Bits per byte you can, on the same text.\n\n"
            + table(("step", "loss (nats per token)", "perplexity", "bits per byte"), rows))
    if (run / "curves.png").is_file():
        text += "\n\n![Loss and perplexity over the run](curves.png)"
    return text


def model_card(trained: Trained, exported: Tokenizer, format: str, dtype: str, license: str | None) -> str:
    """The Markdown of a card.

    trained                   the checkpoint; its model writes the samples now
    exported                  the tokenizer of the export, which may be another form of the one it was trained with
    format, dtype, license    as export.py's options
    """
    step_dir, model, vocabulary, state = trained.step_dir, trained.model, trained.vocabulary, trained.state
    name = state["config"].get("name", step_dir.parent.name)
    exact = isinstance(exported, TokenMonster)
    load = LOAD[format].format(trust=", trust_remote_code=True" if exact else "")
    if format == "hf" and exact:
        load += f"\n\n{EXACT_TOKENIZER}"
    elif exported is not vocabulary:
        load += f"\n\n{READ_PORTABLY}" + (f"\n\n{MARKS}" if format == "gguf" and vocabulary.marks else "")
    origin = (f"It was imported from {state['imported_from']}, where its training is described."
              if "imported_from" in state else
              f"It was trained with nanoStentor, beginning with the weights of {state['config']['init_from']}."
              if state["config"].get("init_from") else "It was trained from scratch with nanoStentor.")
    as_trained = exported is vocabulary and dtype == "fp32" and format not in ROUNDED
    subject = "It" if as_trained else "In FP32, with the tokenizer that it was trained with, it"
    reached = (f"{subject} reaches {state['bits_per_byte']:.4f} bits per byte on held-out text."
               if "bits_per_byte" in state else "")
    drawn = ("Drawn from the checkpoint when this card was written" + ("" if as_trained else ", in FP32 and with the "
             "tokenizer that it was trained with") + "; at temperature 0.8, top-p 0.9 and a repetition penalty of 1.1, "
             "the first seed and not the best.")
    sections = [("How to load it", load), ("What it writes", f"{drawn}\n\n{samples(model, vocabulary)}"),
                ("Architecture", architecture(model, vocabulary))]
    if "tokens_per_step" in state["config"]:
        sections += [("Training", training(state)), ("Evaluation", history(step_dir, state))]
    sections += [("Use and limits", LIMITS),
                 ("Licence", f"{license or 'Not stated'}. The training text has licences of its own.")]
    library, form = FORMS[format]
    front = ("---\n" + (f"license: {license}\n" if license else "")
             + f"library_name: {library}\npipeline_tag: text-generation\ntags:\n- llama\n- nanostentor\n---\n")
    if "rounded_to" in state or "rounded_to_int8" in state:  # as it was called before there was INT4
        origin += f" Its weights have been rounded to {state.get('rounded_to', 'int8').upper()} since."
    title = (f"# {name}\n\nA base language model of {model.num_parameters():,} parameters, "
             f"{form.format(TYPES[dtype])}. {origin} {reached}".rstrip())
    return "\n\n".join([front + "\n" + title, *(f"## {head}\n\n{text}" for head, text in sections if text)]) + "\n"

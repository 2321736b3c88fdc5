"""Out to other programs, and in from them.

    python export.py --out DIR [--checkpoint out/NAME] [--format hf]    a folder that any transformers loads
    python export.py --out DIR --format gguf                            a file for llama.cpp (export_gguf.py)
    python export.py --out DIR --format onnx                            a graph for ONNX Runtime (export_onnx.py)
    python export.py --out DIR --format int8                            INT8 weights, a checkpoint for sample.py
    python export.py --out out/NAME --from FOLDER_OR_HUB_NAME           somebody's Llama, imported (import_llama.py)

Our weights carry Hugging Face's names and its order of rotary pairs, so most of this is writing down, in the words of
each program, what config.json and the vocabulary already say. What is written is then read back, for transformers and
ONNX by the program itself where it is installed, and compared with the model; a folder that does not agree is not kept.
"""

import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import checkpoint
import portable
import quant_t4
from config import BadInput, brief, parse, script
from model import Llama, ModelConfig
from model_card import model_card
from tokenizer import TokenizerJson
from vocabulary import Tokenizer, TokenMonster

TOLERANCE = 1e-4  # of a logit, between this model and the exported one, both in FP32
HERE = Path(__file__).parent
# Words, code, numbers, line ends, letters beyond ASCII, and what few vocabularies can write: to compare tokenizers on.
SAMPLE = "Hello, world! It's 1 + 1 = 2.\n\ndef read(self):\n    return [x for x in self]\n(caf\u00e9) \u65e5\u672c"


@dataclass
class Options:
    """Export a trained model, or import a Llama."""

    out: Path
    """Directory to write; it must not exist, or be empty."""
    checkpoint: Path | None = None
    """A run (out/NAME) or one of its step directories; the newest run under out/ if None."""
    which: Literal["best", "latest"] = "best"
    """Which of a run's checkpoints."""
    format: Literal["hf", "gguf", "onnx", "int8"] = "hf"
    """For transformers and all that reads its files; llama.cpp; ONNX Runtime and transformers.js; or sample.py."""
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"
    """Of the weights; q8_0 is llama.cpp's INT8 (gguf only)."""
    tokenizer: Literal["exact", "portable"] | None = None
    """Exact: the ids that the model was trained on, from TokenMonster's search, by code of ours that transformers must
    be allowed to run. Portable: a plain tokenizer.json (portable.py). If None, what the model was trained with; gguf
    and onnx, whose programs cannot run our code, portable."""
    license: str | None = None
    """Licence that the model card names, as the hub abbreviates it (apache-2.0). The training data have a say in it."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """A folder, or OWNER/NAME on the hub, of a Llama to import: nothing is exported then."""
    vocabulary: str | None = None
    """With --from: the vocabulary of a model whose folder does not hold it, by name or path."""

    def __post_init__(self):
        """Raises ValueError, in one line, for a licence that is no abbreviation."""
        if self.license is not None and not re.fullmatch(r"[\w.-]+", self.license):
            raise ValueError(f"license is {self.license!r}; give an abbreviation such as apache-2.0")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end of the context; if that ends in an error, nothing is left of it.

    Raises BadInput where there is something at `out`.
    """
    if out.exists() and not out.is_dir() or out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is there already, and not empty; delete it or choose another --out")
    target = out.resolve()
    if target == Path.cwd() or any(parent.is_file() for parent in target.parents):
        raise BadInput(f"{out} cannot be made: it is the directory that you are in, or in a file")
    above = next(parent for parent in target.parents if parent.is_dir())  # on the same disk, with nothing made but this
    partial = above / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        if target.is_dir():
            target.rmdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: dict):
    """A JSON file as transformers writes it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# transformers


def llama_config(config: ModelConfig, eos_id: int, dtype: str) -> dict:
    """The config.json of a LlamaForCausalLM, such that transformers 4.46, 4.57 and 5 read the same model from it.

    rope_theta stands twice, as version 4 and version 5 spell it: each ignores the other's, and without its own takes
    10,000 and says nothing. The ids of begin and end are written because their defaults, 1 and 2, mean other tokens
    here; documents begin where another ends. Raises BadInput for a shape that transformers refuses.
    """
    c = config
    if c.hidden_size % c.num_attention_heads:
        raise BadInput(f"transformers wants a hidden_size that the heads divide, and {c.hidden_size} is no multiple of "
                       f"{c.num_attention_heads}")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
            "max_position_embeddings": c.max_position_embeddings, "rms_norm_eps": c.rms_norm_eps,
            "initializer_range": c.initializer_range, "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "mlp_bias": False, "tie_word_embeddings": c.tie_word_embeddings,
            "rope_theta": c.rope_theta, "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            "bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id,
            "torch_dtype": dtype, "dtype": dtype, "use_cache": True}


def segmented(tokens: Tokenizer, form: str | None) -> Tokenizer:
    """The tokenizer to export: the one that the model was trained with, or its portable form.

    Raises BadInput where it was not trained with the exact one that is asked for.
    """
    if form == "exact" and not isinstance(tokens, TokenMonster):
        raise BadInput(f"the model was trained with {tokens.name}, a tokenizer.json, and that is exact; leave out "
                       f"--tokenizer")
    if form == "portable" and isinstance(tokens, TokenMonster):
        return TokenizerJson(portable.tokenizer_json(tokens, lossless=False), tokens.name)
    return tokens


def remote_code() -> str:
    """tokenization_tokenmonster.py with vocabulary.py in the place of its import: one file that needs no other."""
    source = (HERE / "tokenization_tokenmonster.py").read_text(encoding="utf-8")
    before, line, after = source.partition("from vocabulary import COMPLETE_DELETE, TokenMonster, byte_characters\n")
    whole = (HERE / "vocabulary.py").read_text(encoding="utf-8")
    return f"{before}# {'-' * 77}\n# vocabulary.py\n\n{whole}\n\n# {'-' * 77}\n# transformers\n{after}"


def write_vocabulary(folder: Path, tokens: Tokenizer) -> str:
    """The vocabulary's file, and its name."""
    name = "tokenmonster.vocab" if isinstance(tokens, TokenMonster) else "tokenizer.json"
    (folder / name).write_bytes(tokens.data)
    return name


def write_tokenizer(folder: Path, tokens: Tokenizer, context: int):
    """The files from which AutoTokenizer makes this tokenizer; `context` is the model's, in tokens.

    Never both kinds in one folder: with trust_remote_code transformers would take the exact one without a word, and
    without it the other, whose ids differ.
    """
    eos = portable.END_OF_DOCUMENT if isinstance(tokens, TokenMonster) else tokens.eos_token
    write_vocabulary(folder, tokens)
    settings = {"bos_token": eos, "eos_token": eos, "pad_token": eos, "model_max_length": context,
                "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    if isinstance(tokens, TokenMonster):
        (folder / "tokenization_tokenmonster.py").write_text(remote_code(), encoding="utf-8")
        special = {"content": eos, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
                   "special": True}
        settings |= {"tokenizer_class": "TokenMonsterTokenizer", "eos_id": tokens.eos_id,
                     "auto_map": {"AutoTokenizer": ["tokenization_tokenmonster.TokenMonsterTokenizer", None]},
                     "added_tokens_decoder": {str(tokens.eos_id): special}}
    else:
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", settings)


def weights(model: Llama, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters under their names, in another precision; a tied head is left out, as transformers does."""
    return {name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()}


def write_settings(folder: Path, model: Llama, tokens: Tokenizer, dtype: str):
    """config.json, generation_config.json and the tokenizer."""
    config = llama_config(model.config, tokens.eos_id, dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {name: config[name] for name in (
        "bos_token_id", "eos_token_id", "pad_token_id")})
    write_tokenizer(folder, tokens, model.config.max_position_embeddings)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]):
    """model.safetensors. Without this line of metadata transformers 4.46 does not open it."""
    checkpoint.write(folder / "model.safetensors", to_bytes(tensors, {"format": "pt"}))


@torch.no_grad()
def check_logits(folder: Path, model: Llama) -> str | None:
    """Compare transformers' logits of a folder with those of `model`, both in FP32: what was found, in words.

    None where transformers is not installed. Raises BadInput where they differ by more than TOLERANCE.
    """
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    except Exception as error:  # of whatever library it goes wrong in
        raise BadInput(f"transformers {transformers.__version__} does not load {folder}: {type(error).__name__}: "
                       f"{brief(error)}") from error
    input_ids = torch.randint(model.config.vocab_size, (2, min(128, model.config.max_position_embeddings)),
                              generator=torch.Generator().manual_seed(0))
    difference = float((theirs(input_ids).logits - model(input_ids)[0]).abs().max())
    if not difference <= TOLERANCE:  # so written, NaN is refused too
        raise BadInput(f"transformers {transformers.__version__} makes other logits of {folder}: they differ by "
                       f"{difference:.2g}, more than {TOLERANCE:g}")
    return f"read with transformers {transformers.__version__}, whose logits differ by {difference:.1g} at most"


def check_hf(folder: Path, model: Llama, tokens: Tokenizer) -> str:
    """Read the folder with transformers, and compare with `model` in FP32 and with `tokens`; what was found, in words.

    Without transformers the names and shapes of the tensors are checked. Raises BadInput where anything differs.
    """
    exported = load_file(folder / "model.safetensors")
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if {name: tuple(tensor.shape) for name, tensor in exported.items()} != names:
        raise BadInput(f"{folder / 'model.safetensors'} was not written as it should be; is the disk sound?")
    rounded = Llama(model.config)
    rounded.load_state_dict({name: tensor.float() for name, tensor in exported.items()}, strict=False)
    found = check_logits(folder, rounded)
    if found is None:
        return "names and shapes checked; pip install transformers, and its logits are compared too"
    import transformers

    # What the folder holds is our own code, written a moment ago.
    loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids, wanted = loaded(SAMPLE, add_special_tokens=False)["input_ids"], tokens.encode(SAMPLE).tolist()
    if ids != wanted or loaded.decode(ids) != tokens.decode(wanted):
        raise BadInput(f"transformers {transformers.__version__} makes other tokens of a text than {tokens.name} does")
    return found


# ---------------------------------------------------------------------------------------------------------------
# INT8, for sample.py


def write_int8(folder: Path, model: Llama, state: dict, tokens: Tokenizer, dtype: str) -> str:
    """A checkpoint with the INT8 weights and scales of the T4 recipe; what it holds, in words.

    The linears are those that the model learnt to run in INT8; all of the blocks' where it did not. What is not in
    INT8 (embedding, head, norms, FP32 blocks) is in `dtype`.
    """
    trained = tuple(state["config"].get("int8_linears", ()))
    linears = trained or ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = copy.deepcopy(model)
    quant_t4.apply_t4_recipe(model, linears)
    tensors = weights(model, getattr(torch, dtype))
    for name, (integers, scale) in quant_t4.quantize_for_export(model).items():
        tensors |= {f"{name}.weight": integers.contiguous(), f"{name}.weight_scale": scale.contiguous()}
    write_tensors(folder, tensors)
    config = state["config"] | {"tokenizer": write_vocabulary(folder, tokens), "tokenizer_segmentation": "exact"}
    write_json(folder / "state.json", state | {"config": config, "rounded_to_int8": True})
    integers = [tensor for tensor in tensors.values() if tensor.dtype == torch.int8]
    return (f"{len(integers)} weights in INT8, {sum(t.numel() for t in integers) / model.num_parameters():.0%} of the "
            f"parameters" + ("" if trained else "; the model was not trained for it (--int8_linears)"))


# ---------------------------------------------------------------------------------------------------------------


def export(options: Options):
    """Write a checkpoint in the format that is asked for."""
    if options.dtype == "q8_0" and options.format != "gguf":
        raise BadInput("--dtype q8_0 is llama.cpp's: it needs --format gguf")
    if options.format == "onnx" and options.dtype != "float32":
        raise BadInput("--format onnx is in float32; onnxruntime's own tools make other types of it")
    if options.format in ("gguf", "onnx") and options.tokenizer == "exact":
        raise BadInput(f"--format {options.format} takes no --tokenizer exact: what reads it cannot run our code")
    if options.format == "int8" and options.tokenizer:
        raise BadInput("--format int8 is for sample.py, and keeps the tokenizer that the model was trained with")
    step_dir = checkpoint.find(options.checkpoint or checkpoint.newest_run(), options.which)
    model, state = checkpoint.load_model(step_dir)
    tokens = checkpoint.load_tokenizer(step_dir, state)
    form = options.tokenizer or ("portable" if options.format in ("gguf", "onnx") else None)
    with new_folder(options.out) as folder:
        exported = segmented(tokens, form)
        if options.format == "hf":
            write_settings(folder, model, exported, options.dtype)
            write_tensors(folder, weights(model, getattr(torch, options.dtype)))
            found = check_hf(folder, model, exported)
        elif options.format == "gguf":
            from export_gguf import write_gguf
            found = write_gguf(folder, model, state["config"].get("name", "model"), exported, options.dtype)
        elif options.format == "onnx":
            from export_onnx import write_onnx
            write_settings(folder, model, exported, options.dtype)
            found = write_onnx(folder / "onnx", model)
        else:
            found = write_int8(folder, model, state, tokens, options.dtype)
        card = model_card(step_dir, model, state, tokens, exported, options.format, options.dtype, options.license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        curves = checkpoint.run_dir(step_dir) / "curves.png"
        if curves.is_file():
            shutil.copyfile(curves, folder / "curves.png")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = [(path.relative_to(folder), path.stat().st_size) for path in files]
    print(f"{step_dir} -> {options.out}: {found}")
    if exported is not tokens:
        print("  note: the model was trained with the exact segmentation, and text in the portable one is strange to "
              "it: it continues a prompt, but do not score with this (README.md, Two tokenizers)")
    for path, size in sizes:
        print(f"  {str(path):34} {size / 1e6:10.3f} MB")


def main(argv: list[str]):
    options = parse(Options, argv)
    if options.from_ is None:
        return export(options)
    from import_llama import import_llama
    import_llama(options.from_, options.out, options.vocabulary)


if __name__ == "__main__":
    script(main)

"""The model for transformers, and for whatever else reads its files.

Our weights have Hugging Face's names and its order of rotary pairs. So most of the work is to write down, in
transformers' words, what the shape and the vocabulary already say. Then the files are read back, by transformers itself
if it is installed, and compared with the model.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import checkpoint
import tokenizer
from cli import BadInput, misfit
from formats import peers
from model import Llama, ModelConfig
from tokenizer import Tokenizer, TokenizerJson, TokenMonster, portable

# A text to compare tokenizers on: words, code, numbers, line ends, letters beyond ASCII, and some that few vocabularies
# can write.
SAMPLE = "Hello, world! It's 1 + 1 = 2.\n\ndef read(self):\n    return [x for x in self]\n(caf\u00e9) \u65e5\u672c"


def write_json(path: Path, content: dict):
    """Write a JSON file in transformers' layout."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_config(config: ModelConfig, eos_id: int, dtype: torch.dtype) -> dict:
    """The config.json of a LlamaForCausalLM. transformers 4.46, 4.57 and 5 all read the same model from it.

    rope_theta is there twice, in the spellings of version 4 and version 5. Each version ignores the other's spelling;
    without its own it silently takes 10,000. The ids of begin and end are there because their defaults, 1 and 2, mean
    other tokens here. Both are the end-of-document id: a document begins where another ends. Raises BadInput for a
    shape that transformers refuses.
    """
    c = config
    if c.hidden_size % c.num_attention_heads:
        raise BadInput(f"transformers wants a hidden_size that the heads divide, and {c.hidden_size} is not a multiple "
                       f"of {c.num_attention_heads}")
    type_name = str(dtype).removeprefix("torch.")
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
            "torch_dtype": type_name, "dtype": type_name, "use_cache": True}


def segmented(vocabulary: Tokenizer, form: str | None) -> Tokenizer:
    """The tokenizer to export: the one that the model was trained with, or its portable form.

    Raises BadInput if the exact one is asked for and the model was not trained with it.
    """
    if form == "exact" and not isinstance(vocabulary, TokenMonster):
        raise BadInput(f"the model was trained with {vocabulary.name}, a tokenizer.json, which is exact already; leave "
                       f"out --tokenizer")
    if form == "portable" and isinstance(vocabulary, TokenMonster):
        return TokenizerJson(portable.tokenizer_json(vocabulary, lossless=False), vocabulary.name)
    return vocabulary


def remote_code() -> str:
    """tokenizer/for_transformers.py, with tokenmonster.py in place of its import: one file that needs no other."""
    folder = Path(tokenizer.__file__).parent
    source = (folder / "for_transformers.py").read_text(encoding="utf-8")
    line = "from tokenizer.tokenmonster import COMPLETE_DELETE, TokenMonster, byte_characters\n"
    before, _, after = source.partition(line)
    whole = (folder / "tokenmonster.py").read_text(encoding="utf-8")
    return f"{before}# {'-' * 77}\n# tokenmonster.py\n\n{whole}\n\n# {'-' * 77}\n# transformers\n{after}"


def vocabulary_file(vocabulary: Tokenizer) -> str:
    """What the vocabulary's file is called in an export."""
    return "tokenmonster.vocab" if isinstance(vocabulary, TokenMonster) else "tokenizer.json"


def write_vocabulary(folder: Path, vocabulary: Tokenizer, whole: bool = False) -> str:
    """Write the vocabulary's file, as it was or `whole` (with a decoder that it lacked). Returns its name."""
    name = vocabulary_file(vocabulary)
    (folder / name).write_bytes(vocabulary.whole() if whole and name == "tokenizer.json" else vocabulary.data)
    return name


def is_id(value: Any) -> bool:
    """Whether a config.json may have it as the id of a token: one, several or none."""
    return value is None or type(value) is int or isinstance(value, list) and all(type(token) is int for token in value)


def special_ids(vocabulary: Tokenizer, state: dict) -> dict[str, int | list[int] | None]:
    """The ids of begin, end and padding for a config.json: those that an imported model came with, or else our one."""
    ours = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id, "pad_token_id": vocabulary.eos_id}
    theirs = state.get("special_tokens")
    if theirs is None or misfit(theirs, dict.fromkeys(ours, is_id)):
        return ours
    known = [token for ids in theirs.values() for token in (ids if isinstance(ids, list) else [ids])]
    return {key: theirs[key] for key in ours} if vocabulary.eos_id in known else ours


def write_tokenizer(folder: Path, vocabulary: Tokenizer, context: int, special: dict):
    """Write the files from which AutoTokenizer makes this tokenizer. `context` is the model's, in tokens; `special` are
    its `special_ids`.

    Never put both kinds in one folder: with trust_remote_code transformers would silently take the exact one, and
    without it the other, whose ids differ.
    """
    eos = portable.END_OF_DOCUMENT if isinstance(vocabulary, TokenMonster) else vocabulary.eos_token
    write_vocabulary(folder, vocabulary, whole=True)
    settings = {"bos_token": eos, "eos_token": eos, "pad_token": eos, "model_max_length": context,
                "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    if isinstance(vocabulary, TokenMonster):
        (folder / "tokenization_tokenmonster.py").write_text(remote_code(), encoding="utf-8")
        special = {"content": eos, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
                   "special": True}
        settings |= {"tokenizer_class": "TokenMonsterTokenizer", "eos_id": vocabulary.eos_id,
                     "auto_map": {"AutoTokenizer": ["tokenization_tokenmonster.TokenMonsterTokenizer", None]},
                     "added_tokens_decoder": {str(vocabulary.eos_id): special}}
    else:
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        for kind in ("bos", "eos", "pad"):
            ids = special[f"{kind}_token_id"]
            settings[f"{kind}_token"] = vocabulary.name_of(next(iter(ids), None) if isinstance(ids, list) else ids)
    write_json(folder / "tokenizer_config.json", settings)


def weights(model: Llama, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters by name, in another precision. A tied head is left out, as transformers does."""
    return {name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()}


def write_settings(folder: Path, model: Llama, vocabulary: Tokenizer, dtype: torch.dtype, state: dict | None = None):
    """Write config.json, generation_config.json and the tokenizer. `state` is the checkpoint's, if it has one."""
    special = special_ids(vocabulary, state or {})
    config = llama_config(model.config, vocabulary.eos_id, dtype) | special
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {name: config[name] for name in (
        "bos_token_id", "eos_token_id", "pad_token_id")})
    write_tokenizer(folder, vocabulary, model.config.max_position_embeddings, special)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]):
    """Write model.safetensors. transformers 4.46 does not open it without this metadata."""
    checkpoint.write(folder / "model.safetensors", to_bytes(tensors, {"format": "pt"}))


def check(folder: Path, model: Llama, vocabulary: Tokenizer) -> str:
    """Read the folder with transformers, and compare it with `model` in FP32 and with the vocabulary.

    Returns the result in words. Without transformers only the tensors' names and shapes are checked. Raises BadInput if
    anything differs.
    """
    exported = load_file(folder / "model.safetensors")
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if {name: tuple(tensor.shape) for name, tensor in exported.items()} != names:
        raise BadInput(f"{folder / 'model.safetensors'} was not written as it should be; is the disk sound?")
    rounded = Llama(model.config)
    rounded.load_state_dict({name: tensor.float() for name, tensor in exported.items()}, strict=False)
    found = peers.compare_logits(folder, rounded)
    if found is None:
        return "names and shapes checked; pip install transformers, and its logits are compared too"
    loaded = peers.load_tokenizer(str(folder), trust_remote_code=True)  # our own code, written a moment ago
    ids, wanted = loaded(SAMPLE, add_special_tokens=False)["input_ids"], vocabulary.encode(SAMPLE).tolist()
    version = peers.library().__version__
    if ids != wanted:
        raise BadInput(f"transformers {version} makes other tokens of a text than {vocabulary.name} does")
    # Ours leaves out special tokens, of which [UNK] may be one.
    text = loaded.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if text != vocabulary.decode(wanted):
        raise BadInput(f"transformers {version} makes another text of tokens than {vocabulary.name} does")
    return found


def write_hf(folder: Path, model: Llama, vocabulary: Tokenizer, dtype: torch.dtype, state: dict | None = None) -> str:
    """Write a folder that transformers loads, and check it. Returns the result in words."""
    write_settings(folder, model, vocabulary, dtype, state)
    write_tensors(folder, weights(model, dtype))
    return check(folder, model, vocabulary)

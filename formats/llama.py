"""Somebody's Llama as a checkpoint of ours: export.py --from FOLDER_OR_HUB_NAME --out out/NAME

Any folder of a plain LlamaForCausalLM will do. If it uses something that model.py does not have (scaled RoPE, biases,
another activation), an error names that. The first Stentor checkpoints work too. Their INT8 linears kept the FP32
weights as `weight_master` (Stentor2-12M-Preview card, Weight Initialization), so transformers finds no `weight` for
those modules and fills them with noise.

The result is a run at step 0, with a checkpoint to sample from, to export, or to start a training with (--init_from).
"""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

import checkpoint
import tokenizer
from cli import BadInput, brief, parse_json
from formats.peers import compare_logits
from model import Llama, ModelConfig
from tokenizer import Tokenizer, TokenizerJson
from tokenizer.delimiters import Beside
from tokenizer.hub import patiently

FILES = ["*.json", "*.safetensors", "*.vocab", "pytorch_model*.bin"]
UNUSED = ["adapter*", "consolidated*", "*/*"]


def find_folder(name: str) -> Path:
    """The folder itself, or a repository on the hub, downloaded once. Raises BadInput if there is neither."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise BadInput(f"there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download
        return Path(patiently(lambda: snapshot_download(name, allow_patterns=FILES, ignore_patterns=UNUSED), name))
    except Exception as error:  # no library, no network or no such repository
        raise BadInput(f"there is no folder {name}, and it cannot be downloaded from the hub "
                       f"({brief(error)})") from error


def read_config(folder: Path) -> tuple[ModelConfig, dict]:
    """The shape in a config.json, and the whole config. Raises BadInput if it is not a plain Llama's."""
    try:
        theirs = parse_json((folder / "config.json").read_bytes(), dict)
    except FileNotFoundError:
        raise BadInput(f"{folder} holds no config.json: it is not a model that transformers loads") from None
    except ValueError as error:
        raise BadInput(f"{folder / 'config.json'} is damaged: {error}") from error
    rope, scaling = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
    for field, value in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise BadInput(f"{folder} is not a plain Llama: its {field} is {value!r}")
    activation = theirs.get("hidden_act") or "silu"
    plain = {"model_type": ("llama", theirs.get("model_type")),
             "hidden_act": ("silu", {"swish": "silu"}.get(str(activation), activation)),
             "attention_bias": (False, theirs.get("attention_bias") or False),
             "mlp_bias": (False, theirs.get("mlp_bias") or False),
             "pretraining_tp": (1, theirs.get("pretraining_tp", 1)),
             "rope_parameters.rope_type": ("default", rope.get("rope_type", rope.get("type", "default"))),
             "rope_scaling": ("default", scaling.get("rope_type", scaling.get("type", "default"))),
             "quantization_config": (None, theirs.get("quantization_config"))}
    for field, (ours, value) in plain.items():
        if value != ours:
            raise BadInput(f"{folder} is not a plain Llama: its {field} is {value!r}, and model.py's {ours!r}")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in names if name not in theirs]:
        raise BadInput(f"{folder / 'config.json'} does not say what {missing[0]} is")
    if odd := [name for name in names if type(theirs[name]) is not int]:
        raise BadInput(f"{folder / 'config.json'} says that {odd[0]} is {theirs[odd[0]]!r}")
    try:
        return ModelConfig(
            **{name: theirs[name] for name in names},
            num_key_value_heads=theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
            head_dim=theirs.get("head_dim"), max_position_embeddings=theirs.get("max_position_embeddings", 2048),
            rms_norm_eps=theirs.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or theirs.get("rope_theta") or 10_000.0,
            tie_word_embeddings=bool(theirs.get("tie_word_embeddings", False)),
            initializer_range=theirs.get("initializer_range", 0.02), fp32_blocks=()), theirs
    except (TypeError, ValueError) as error:
        raise BadInput(f"{folder / 'config.json'} describes an impossible Llama: {error}") from error


NO_MODEL = ("adapter", "consolidated", "optimizer", "training_args", "scheduler", "rng_state")  # what lies beside one
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # under which a training script keeps its weights
PREFIXES = ("_orig_mod.", "module.")  # of torch.compile, and of models on several devices


def shards(folder: Path, index: Path) -> dict[Path, set[str]]:
    """The files that an index names, with the tensors to take from each. Raises BadInput if one is missing."""
    try:
        places = parse_json(index.read_bytes(), {"weight_map": {str: str}})["weight_map"]
    except (OSError, ValueError) as error:
        raise BadInput(f"{index} is damaged: {brief(error)}") from None
    files = {}
    for tensor, file in places.items():
        if Path(file).name != file:
            raise BadInput(f"{index} is damaged: it names {file[:80]!r}, which is not in its folder")
        files.setdefault(folder / file, set()).add(tensor)
    if missing := [path.name for path in files if not path.is_file()]:
        raise BadInput(f"{folder} lacks {missing[0]}, which {index.name} names; download it again")
    if not files:
        raise BadInput(f"{index} is damaged: it names no file")
    return files


def weight_files(folder: Path, kind: str, whole: str) -> dict[Path, set[str] | None]:
    """The files of a kind that hold the model, with the tensors to take from each, or None for all. {} if none do.

    As transformers, we take the whole model first, then what the index of its shards names. What lies beside them
    (an adapter, old shards, Meta's own consolidated files) is not the model.
    """
    if (folder / whole).is_file():
        return {folder / whole: None}
    if (folder / f"{whole}.index.json").is_file():
        return shards(folder, folder / f"{whole}.index.json")
    files = [path for path in sorted(folder.glob(f"*{kind}")) if not path.name.startswith((*NO_MODEL, "."))]
    stem = whole.removesuffix(kind)
    numbered = [path for path in files if re.fullmatch(rf"{stem}-\d+-of-\d+", path.stem)]
    if numbered:
        totals = sorted({int(path.stem.rsplit("-", 1)[1]) for path in numbered})
        if len(totals) > 1 or len(numbered) != totals[0]:
            counts = " and of ".join(map(str, totals))
            raise BadInput(f"{folder} holds {len(numbered)} files {stem}-*{kind} of {counts}, and no "
                           f"{whole}.index.json that says which belong together; download it again")
        return dict.fromkeys(numbered)
    return dict.fromkeys(files if kind == ".safetensors" else [path for path in files if path.stem.startswith(stem)])


def read_bin(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """The tensors of PyTorch's own kind of file, and the name under which a training script has put them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: no code in the file runs
    except Exception as error:
        raise BadInput(f"{path} is damaged, or holds more than tensors: {type(error).__name__}") from error
    wrapper = next((key for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    content = content[wrapper] if wrapper else content
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__}, and not the weights of a model by their names")
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise BadInput(f"{path} holds {str(name)[:80]!r}, a {type(tensor).__name__}, among the weights; save the "
                           f"model's state_dict alone")
    return content, wrapper


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a folder, from safetensors files or else PyTorch's own, and remarks. Raises BadInput if none."""
    files = weight_files(folder, ".safetensors", "model.safetensors")
    read, remarks = checkpoint.read_tensors, []
    if not files:
        files = weight_files(folder, ".bin", "pytorch_model.bin")

        def read(path: Path) -> dict[str, torch.Tensor]:
            content, wrapper = read_bin(path)
            remarks.extend([f"{path.name} keeps the weights under {wrapper!r}, where transformers does not look"]
                           if wrapper else [])
            return content
    if not files:
        adapter = next(iter(sorted(folder.glob("adapter*"))), None)
        if adapter:
            raise BadInput(f"{folder} holds only an adapter ({adapter.name}); merge it with its model first, and "
                           f"import the result")
        raise BadInput(f"{folder} holds no weights: neither .safetensors files nor pytorch_model.bin")
    tensors = {}
    for file, wanted in files.items():
        content = read(file)
        if absent := sorted((wanted or set()) - content.keys()):
            raise BadInput(f"{file} lacks {absent[0]}, which the index says is there; download it again")
        for name in content if wanted is None else wanted:
            if name in tensors and not torch.equal(tensors[name], content[name]):
                raise BadInput(f"{folder}: two files hold {name}, and differ; leave only those of one model")
            tensors[name] = content[name]
    return tensors, remarks


def without_prefixes(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors without what torch.compile and DistributedDataParallel put before their names, and remarks."""
    found = []
    while prefix := next((prefix for prefix in PREFIXES if weights and all(
            name.startswith(prefix) for name in weights)), None):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        found.append(f"the weights are called {prefix}..., under which transformers does not find them")
    inner = {".".join(part for part in name.split(".") if part != "_orig_mod"): tensor
             for name, tensor in weights.items()}  # a block compiled by itself
    if len(inner) == len(weights) and inner.keys() != weights.keys():
        weights, found = inner, [*found, "some weights are called _orig_mod, where transformers does not find them"]
    return weights, found


def plain_names(weights: dict[str, torch.Tensor], tied: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors under model.py's names, and remarks about what had to change.

    Raises BadInput if two tensors want the same name and differ.
    """
    remarks, plain = [], {}
    masters = [name for name in weights if name.endswith(".weight_master")]
    if masters:
        remarks.append(f"{len(masters)} weights are stored as weight_master, which transformers would not have found")
    for name, tensor in weights.items():
        if "rotary_emb." in name:  # a table that old versions of transformers saved
            continue
        target = name.removesuffix("_master")
        other = plain.get(target)
        if other is not None and (other.shape != tensor.shape
                                  or not torch.allclose(other.float(), tensor.float(), atol=1e-2, rtol=1e-2)):
            raise BadInput(f"{target} and {target}_master are both there, and differ by more than rounding")
        if target not in plain or name != target:  # the master is the one in full precision
            plain[target] = tensor
    head, embedding = plain.get("lm_head.weight"), plain.get("model.embed_tokens.weight")
    if tied and head is not None:
        if embedding is None:
            plain["model.embed_tokens.weight"] = head
        elif head.shape != embedding.shape or not torch.equal(head, embedding):
            remarks.append("the config ties the head, but a head of its own is stored: left out, as transformers does")
        del plain["lm_head.weight"]
    return plain, remarks


def layer_numbers(weights: dict[str, torch.Tensor]) -> set[str]:
    """The numbers of the layers that have weights."""
    return {name.split(".")[2] for name in weights if name.startswith("model.layers.") and name.count(".") > 3}


def differing_field(config: ModelConfig, weights: dict[str, torch.Tensor]) -> str:
    """Which fields of the config the weights contradict, in words; "" if none that we can name."""
    embedding, up = weights.get("model.embed_tokens.weight"), weights.get("model.layers.0.mlp.up_proj.weight")
    found = {"num_hidden_layers": len(layer_numbers(weights))}
    if embedding is not None and embedding.dim() == 2:
        found |= {"vocab_size": embedding.size(0), "hidden_size": embedding.size(1)}
    if up is not None and up.dim() == 2:
        found["intermediate_size"] = up.size(0)
    fields = [f"{field} is {getattr(config, field)} there, and {value} in the weights"
              for field, value in found.items() if getattr(config, field) != value]
    return f" ({'; '.join(fields)})" if fields else ""


def find_vocabulary(folder: Path, asked: str | None) -> Path:
    """The vocabulary's file: the one asked for, or tokenizer.json or a .vocab file in the folder.

    Raises BadInput if there is none.
    """
    if asked is not None:
        return tokenizer.find(asked)
    files = [path for path in (folder / "tokenizer.json", *sorted(folder.glob("*.vocab"))) if path.is_file()]
    if not files:
        raise BadInput(f"{folder} holds neither tokenizer.json nor a .vocab file; name the vocabulary: "
                       f"--vocabulary english-8000-strict-nocapcode-v1, or a path")
    return files[0]


def delimited(source: Path, asked: str | None, theirs: dict, eos_token: str | None) -> Tokenizer:
    """The tokenizer of an import, which knows what delimits the model's documents.

    source       the vocabulary's file; `asked` for it by this name, if anybody did
    theirs       the model's config.json
    eos_token    the token between documents, if somebody says so
    """
    beside = replace(Beside.of(source.parent), config=theirs)
    vocabulary = tokenizer.load(asked or source, "exact", eos_token, beside=beside)
    if eos_token is not None or not isinstance(vocabulary, TokenizerJson):
        return vocabulary
    bos_token = beside.bos(vocabulary.special, vocabulary.spec.get("post_processor"))
    if bos_token is None or bos_token == vocabulary.eos_token:
        return vocabulary
    return tokenizer.load(asked or source, "exact", None, bos_token, beside)


def remarks_on(vocabulary: Tokenizer, theirs: dict, eos_token: str | None) -> list[str]:
    """What to say about the tokens that delimit documents."""
    eos = theirs.get("eos_token_id")
    if isinstance(vocabulary, TokenizerJson) and vocabulary.bos_id != vocabulary.eos_id:
        return [f"documents begin with {vocabulary.bos_token} here, as config.json says, and end with "
                f"{vocabulary.eos_token}; if {vocabulary.bos_token} alone stands between them, import with --eos_token "
                f"\"{vocabulary.bos_token}\""]
    if vocabulary.eos_id in (eos if isinstance(eos, list) else [eos]):
        return []
    return [f"its eos_token_id is {brief(ValueError(eos))}; documents end with {vocabulary.eos_id} here, as "
            + (f"{eos_token} was asked for" if eos_token is not None else f"{vocabulary.name} says")]


def import_llama(name: str, out: Path, vocabulary_name: str | None, eos_token: str | None = None):
    """Make the run `out` from a folder or a repository of the hub. It has one checkpoint, at step 0.

    The vocabulary's file is copied beside it, so the run needs nothing else.
    """
    folder = find_folder(name)
    config, theirs = read_config(folder)
    weights, remarks = read_weights(folder)
    weights, renamed = without_prefixes(weights)
    weights, changed = plain_names(weights, config.tie_word_embeddings)
    remarks += renamed + changed
    layers = min(config.num_hidden_layers, len(layer_numbers(weights)) + 1)  # a thousand take seconds
    with torch.device("meta"):  # shapes without numbers: a damaged config.json cannot ask for more memory than there is
        shapes = checkpoint.shapes(dict(Llama(replace(config, num_hidden_layers=layers)).named_parameters()))
    where = f"{folder} is not the Llama of its config.json{differing_field(config, weights)}"
    checkpoint.compare(shapes, checkpoint.shapes(weights), where, "download it again")
    model = Llama(config)
    checkpoint.fill(model, weights, where, "download it again")
    for parameter, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise BadInput(f"{folder}: {parameter} holds numbers that are not finite")
    found = None if remarks else compare_logits(folder, model)  # after a remark, transformers would load another model
    source = find_vocabulary(folder, vocabulary_name)
    vocabulary = delimited(source, vocabulary_name, theirs, eos_token)
    ids = vocabulary.vocab_size
    vocabulary.within(config.vocab_size)
    if vocabulary.vocab_size > config.vocab_size:
        raise BadInput(f"{vocabulary.name} has {ids:,} ids, and the model has rows for {config.vocab_size:,}: it is "
                       f"another model's")
    if vocabulary.vocab_size < ids:
        remarks.append(f"{vocabulary.name} has special tokens beyond the {config.vocab_size:,} rows of the model: they "
                       f"are left out")
    own_begin = vocabulary.bos_id != vocabulary.eos_id  # which remarks_on explains better
    remarks += [*remarks_on(vocabulary, theirs, eos_token), *vocabulary.notes[own_begin:]]
    file = "tokenizer.json" if source.suffix == ".json" else f"{vocabulary.name}.vocab"
    special = {f"{kind}_token_id": theirs.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    state = {"step": 0, "seconds": 0.0, "imported_from": name, "tokenizer_sha256": vocabulary.sha256,
             **vocabulary.delimiters, "special_tokens": special,
             "config": {"name": out.name, "tokenizer": file, "model": asdict(config)}}
    with checkpoint.new_folder(out) as run:
        checkpoint.save(run, model, None, state, best=True, keep=1)
        shutil.copyfile(source, run / file)
        if vocabulary.delimiters:  # for a preparation of text with this vocabulary
            (run / "special_tokens_map.json").write_text(json.dumps({"eos_token": vocabulary.bos_token}) + "\n",
                                                         encoding="utf-8")
    for remark in remarks:
        print(f"note: {remark}")
    print(f"{name} -> {out}: {model.num_parameters():,} parameters, vocabulary {vocabulary.name}; "
          f"{found or 'names and shapes fit'}")
    print(f"  python sample.py --checkpoint {out} --prompt \"...\"      python train.py config/... --init_from {out}")

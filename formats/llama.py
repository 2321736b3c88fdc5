"""Somebody's Llama as a checkpoint of ours: export.py --from FOLDER_OR_HUB_NAME --out out/NAME

Any folder of a plain LlamaForCausalLM will do. If it uses something that model.py does not have (scaled RoPE, biases,
another activation), an error names that. The first Stentor checkpoints work too. Their INT8 linears kept the FP32
weights as `weight_master` (Stentor2-12M-Preview card, Weight Initialization), so transformers finds no `weight` for
those modules and fills them with noise.

The result is a run at step 0, with a checkpoint to sample from, to export, or to start a training with (--init_from).
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

import checkpoint
import tokenizer
from cli import BadInput, brief
from formats.peers import compare_logits
from model import Llama, ModelConfig

FILES = ["*.json", "*.safetensors", "*.vocab", "pytorch_model*.bin"]


def find_folder(name: str) -> Path:
    """The folder itself, or a repository on the hub, downloaded once. Raises BadInput if there is neither."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise BadInput(f"there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # no library, no network or no such repository
        raise BadInput(f"there is no folder {name}, and it cannot be downloaded from the hub "
                       f"({brief(error)})") from error


def read_config(folder: Path) -> tuple[ModelConfig, dict]:
    """The shape in a config.json, and the whole config. Raises BadInput if it is not a plain Llama's."""
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{folder} holds no config.json: it is not a model that transformers loads") from None
    except ValueError as error:
        raise BadInput(f"{folder / 'config.json'} is damaged: {error}") from error
    if not isinstance(theirs, dict):
        raise BadInput(f"{folder / 'config.json'} holds no model's config")
    rope, scaling = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
    for field, value in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise BadInput(f"{folder} is not a plain Llama: its {field} is {value!r}")
    plain = {"model_type": ("llama", theirs.get("model_type")),
             "hidden_act": ("silu", theirs.get("hidden_act", "silu")),
             "attention_bias": (False, theirs.get("attention_bias", False)),
             "mlp_bias": (False, theirs.get("mlp_bias", False)),
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


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, from safetensors files or else PyTorch's own. Raises BadInput if there are none."""
    whole, shards = folder / "model.safetensors", sorted(folder.glob("model-*-of-*.safetensors"))
    files = [whole] if whole.is_file() else shards or sorted(folder.glob("*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in checkpoint.read_tensors(file).items()}
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise BadInput(f"{folder} holds no weights: neither .safetensors files nor pytorch_model.bin")
    tensors = {}
    for file in files:
        try:
            tensors |= torch.load(file, map_location="cpu", weights_only=True)  # weights_only: no code in the file runs
        except Exception as error:
            raise BadInput(f"{file} is damaged, or holds more than tensors: {type(error).__name__}") from error
    return tensors


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


def import_llama(name: str, out: Path, vocabulary_name: str | None):
    """Make the run `out` from a folder or a repository of the hub. It has one checkpoint, at step 0.

    The vocabulary's file is copied beside it, so the run needs nothing else.
    """
    folder = find_folder(name)
    config, theirs = read_config(folder)
    weights, remarks = plain_names(read_weights(folder), config.tie_word_embeddings)
    model = Llama(config)
    checkpoint.fill(model, weights, f"{folder} is not the Llama of its config.json", "download it again")
    for parameter, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise BadInput(f"{folder}: {parameter} holds numbers that are not finite")
    found = None if remarks else compare_logits(folder, model)  # after a remark, transformers would load another model
    source = find_vocabulary(folder, vocabulary_name)
    vocabulary = tokenizer.load(vocabulary_name or source)
    if vocabulary.vocab_size > config.vocab_size:
        raise BadInput(f"{vocabulary.name} has {vocabulary.vocab_size:,} ids, and the model has rows for "
                       f"{config.vocab_size:,}: it is another model's")
    eos = theirs.get("eos_token_id")
    if vocabulary.eos_id not in (eos if isinstance(eos, list) else [eos]):
        remarks.append(f"its eos_token_id is {eos}; documents end with {vocabulary.eos_id} here, as {vocabulary.name} "
                       f"says")
    file = "tokenizer.json" if source.suffix == ".json" else f"{vocabulary.name}.vocab"
    state = {"step": 0, "seconds": 0.0, "imported_from": name, "tokenizer_sha256": vocabulary.sha256,
             "config": {"name": out.name, "tokenizer": file, "model": asdict(config)}}
    with checkpoint.new_folder(out) as run:
        checkpoint.save(run, model, None, state, best=True, keep=1)
        shutil.copyfile(source, run / file)
    for remark in remarks:
        print(f"note: {remark}")
    print(f"{name} -> {out}: {model.num_parameters():,} parameters, vocabulary {vocabulary.name}; "
          f"{found or 'names and shapes fit'}")
    print(f"  python sample.py --checkpoint {out} --prompt \"...\"      python train.py config/... --init_from {out}")

"""The model as a GGUF file, for llama.cpp and programs built on it: export.py --format gguf

Two things differ there. First, llama.cpp's RoPE turns neighbouring pairs of a head's numbers. Ours (like transformers')
turns pairs that stand half a head apart, so the rows of q_proj and k_proj are put in llama.cpp's order. Second,
llama.cpp does not have TokenMonster's tokenizer. But one of its tokenizers, "t5", is a Unigram, as portable.py makes
them. Of two equally good ways to cut a text it even takes the same one as the `tokenizers` library, so a text has the
same ids (NOTES.md describes the other one that I tried). It works on characters, so it cannot encode a character of
which the vocabulary has only the bytes: that becomes "?" (and so does "??", unless it is a piece). What the model
writes comes out whole.

A model that learnt with TokenMonster's own search also writes delete marks, which llama.cpp does not know: remove each
0x7F, and the space after it.
"""

from pathlib import Path

import numpy as np
import torch

from cli import BadInput
from model import Llama
from tokenizer import Tokenizer, TokenMonster, portable
from tokenizer.huggingface import parts

# llama.cpp's names for our types.
KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
NORMAL, CONTROL, BYTE = 1, 3, 6  # llama.cpp's kinds of tokens
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name: str) -> str:
    """llama.cpp's name for a parameter of ours."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)  # model.layers.N.self_attn.q_proj
    return f"blk.{layer}.{NAMES[module]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q_proj or k_proj (heads * D, C), reordered: rows j and j + D/2 of a head become neighbours."""
    # (heads * D, C) -> (heads, 2, D/2, C) -> (heads, D/2, 2, C) -> (heads * D, C)
    return weight.view(heads, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def is_text(piece: bytes) -> bool:
    """Whether a piece is valid UTF-8 by itself, and can be a C string."""
    try:
        return b"\0" not in piece and bool(piece.decode())
    except UnicodeDecodeError:
        return False


def why_not(made: dict) -> str | None:
    """Why llama.cpp's "t5" would give other ids than a tokenizer.json; None if it gives the same.

    It does if the file is one that portable.py writes. It cannot split a text beforehand or put a space before it as
    the library does, and it adds scores in single precision, so they must be such that no sum is rounded.
    """
    model = made["model"]
    if model.get("type") != "Unigram":
        return f"a {model.get('type', 'model of an unknown type')}"
    before = [*parts(made.get("pre_tokenizer"))]
    types = [part["type"] for part in before]
    if types not in (["ByteLevel"], ["Sequence", "Split", "ByteLevel"]):
        return f"a Unigram with the pre_tokenizer {' + '.join(types) or 'null'}"
    for option, default in (("add_prefix_space", True), ("use_regex", True)):
        if before[-1].get(option, default):
            return f"a Unigram whose ByteLevel has {option}"
    for part in parts(made.get("normalizer")):
        if part["type"] not in ("Sequence", "NFD", "Replace"):
            return f"a Unigram with the normalizer {part['type']}"
    if any(4096 * score % 1 for _, score in model["vocab"]):
        return "a Unigram with scores that single precision rounds"
    return "a Unigram with byte_fallback" if model.get("byte_fallback") else None


def unigram(vocabulary: Tokenizer) -> tuple[list[bytes], list[float], dict[int, bytes]]:
    """The bytes and the score of each id in the portable segmentation, and the names of special tokens but the end's.

    Raises BadInput for a tokenizer.json of which llama.cpp would make other ids.
    """
    if isinstance(vocabulary, TokenMonster):
        return *portable.pieces(vocabulary, lossless=False), {}
    made = vocabulary.spec
    if reason := why_not(made):
        raise BadInput(f"the tokenizer of {vocabulary.name} is {reason}, of which llama.cpp would make other tokens; "
                       f"use --format hf, and llama.cpp's convert_hf_to_gguf.py on that")
    value = {character: byte for byte, character in enumerate(portable.CHARACTERS)}
    names, scores = zip(*made["model"]["vocab"])
    special = {token: name.encode() for token, name in vocabulary.special.items()
               if token != vocabulary.eos_id and token < len(names)}
    pieces = []
    for token, name in enumerate(names):
        if token != vocabulary.eos_id and token not in special and not value.keys() >= set(name):
            raise BadInput(f"the tokenizer of {vocabulary.name} has the token {name!r}, which does not stand for "
                           f"bytes, as llama.cpp needs it; use --format hf")
        pieces.append(b"" if token == vocabulary.eos_id or token in special else bytes(value[c] for c in name))
    return pieces, list(scores), special


def token_table(vocabulary: Tokenizer, rows: int) -> tuple[list[bytes], list[float], list[int], int]:
    """Text, score and kind of each of the model's rows, and the id of the unknown token."""
    pieces, scores, special = unigram(vocabulary)
    texts, kinds = [], []
    for token, piece in enumerate(pieces):
        if token == vocabulary.eos_id:
            text, kind = portable.END_OF_DOCUMENT.encode(), CONTROL
        elif token in special:
            text, kind = special[token], CONTROL
        elif is_text(piece):
            text, kind = piece.replace(b" ", "\u2581".encode()), NORMAL  # llama.cpp's sign for a space
        elif len(piece) == 1:
            text, kind = b"<0x%02X>" % piece[0], BYTE  # never found in a text, but decoded to that byte
        else:
            text, kind = b"<unused%d>" % token, CONTROL  # holds a part of a character
        texts.append(text), kinds.append(kind)
    for token in range(len(texts), rows):  # rows that belong to no token
        texts.append(b"<unused%d>" % token), scores.append(portable.DEAD), kinds.append(CONTROL)
    return texts, scores, kinds, texts.index(b"?") if b"?" in texts else vocabulary.eos_id


def write_gguf(folder: Path, model: Llama, name: str, vocabulary: Tokenizer, dtype: str) -> str:
    """Write NAME-DTYPE.gguf and read it back. Returns the result in words.

    Matrices are in `dtype`, a key of KINDS, and norms in FP32. With Q4_0, embedding and head are in Q8_0. A matrix
    whose rows do not divide into blocks of 32 is in F16 instead. Raises BadInput if the package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise BadInput("GGUF needs a package: pip install gguf") from error
    c = model.config
    kind = KINDS[dtype]
    texts, scores, kinds, unknown = token_table(vocabulary, c.vocab_size)
    path = folder / f"{name}-{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("t5")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(vocabulary.bos_id)
    for add in (writer.add_eos_token_id, writer.add_pad_token_id):
        add(vocabulary.eos_id)
    writer.add_unk_token_id(unknown)
    writer.add_add_bos_token(True)  # as in training, a text follows the end of another
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)

    written = {}
    for name, p in model.named_parameters():
        weight = p.detach().float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, weight.size(0) // c.head_dim)
        as_ = kind if weight.dim() == 2 else "F32"
        if as_ == "Q4_0" and "layers" not in name:
            as_ = "Q8_0"
        if as_ in ("Q8_0", "Q4_0") and weight.size(1) % 32:
            as_ = "F16"
        quantized = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[as_])
        writer.add_tensor(gguf_name(name), quantized, raw_dtype=gguf.GGMLQuantizationType[as_])
        written[gguf_name(name)] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(path).tensors}
    error = 0.0
    largest = {"F32": 0.0, "F16": 2**-10, "BF16": 2**-8, "Q8_0": 1 / 127, "Q4_0": 1 / 7}[kind]  # times the largest
    for name, weight in written.items():
        difference = float(np.abs(read[name] - weight.numpy()).max())
        if not difference <= largest * float(weight.abs().max()):  # written like this, NaN fails too
            raise BadInput(f"{name} differs by {difference:.2g} in {kind}, which is too much; use --dtype fp32")
        error = max(error, difference)
    return f"{len(read)} tensors, {len(texts):,} tokens; read back, no weight differs by more than {error:.1g}"

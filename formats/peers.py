"""Models of transformers, the peers that we compare ours with. This is the one place that loads them.

Whatever goes wrong while loading, in whatever library, becomes one line. A `Peer` has the face of our model, so
decoding/ can write with it and eval.py can measure it. A `PeerTokenizer` has the face of our tokenizer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch

from cli import BadInput, brief
from model import Llama
from tokenizer import Tokenizer
from tokenizer.huggingface import TextStream

TOLERANCE = 1e-4  # largest difference of a logit between our model and the same one in transformers, both in FP32
Result = TypeVar("Result")


def library() -> Any:
    """transformers, with its messages off. Raises BadInput if it is not installed."""
    try:
        import transformers  # imported here because it is optional and takes seconds
    except ImportError:
        raise BadInput("models of transformers need it: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def loading(name: str, load: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """load(*arguments, **options). Whatever goes wrong becomes one line about the model `name`."""
    try:
        return load(*arguments, **options)
    except Exception as error:  # from whatever library
        if "trust_remote_code" in str(error):
            raise BadInput(f"{name} comes with code of its own; --trust_remote_code lets it run") from error
        raise BadInput(f"transformers cannot load {name}: {brief(error)}") from error


def where(name: str, trust_remote_code: bool) -> dict[str, bool]:
    """Options for every from_pretrained. If the model is a folder, the hub is not asked for anything."""
    return {"trust_remote_code": trust_remote_code, "local_files_only": Path(name).is_dir()}


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a folder, or of OWNER/NAME on the hub. Raises BadInput if it cannot be loaded."""
    return loading(name, library().AutoConfig.from_pretrained, name, **where(name, trust_remote_code))


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, or of OWNER/NAME on the hub. Raises BadInput if it cannot be loaded."""
    return loading(name, library().AutoTokenizer.from_pretrained, name, **where(name, trust_remote_code))


def our_attention(load: Callable[..., Result]) -> Callable[..., Result]:
    """The same loader of a model, with PyTorch's own attention, or the plain one if the model knows no other.

    If we named none, config.json would: it may name a repository, from which transformers loads a kernel and runs it.
    """
    def load_it(*arguments: Any, **options: Any) -> Result:
        try:
            return load(*arguments, attn_implementation="sdpa", **options)
        except ValueError as error:
            if not any(word in str(error) for word in ("scaled_dot_product_attention", "sdpa")):
                raise
        return load(*arguments, attn_implementation="eager", **options)

    return load_it


def load_model(name: str, trust_remote_code: bool = False) -> Any:
    """The causal model of a folder, or of OWNER/NAME on the hub, in FP32. Raises BadInput if it cannot be loaded."""
    config, options = load_config(name, trust_remote_code), where(name, trust_remote_code)
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:  # padding without a row
        config.pad_token_id = None
    load = our_attention(library().AutoModelForCausalLM.from_pretrained)
    return loading(name, load, name, config=config, **options).float().eval()


def count_parameters(config: Any, name: str, trust_remote_code: bool = False) -> int:
    """The number of parameters of the model that a transformers config describes. The model itself is not built."""
    with torch.device("meta"):  # shapes without numbers
        shape = loading(name, our_attention(library().AutoModelForCausalLM.from_config), config,
                        trust_remote_code=trust_remote_code)
    return shape.num_parameters()


def context_of(config: Any, longest: int) -> int:
    """Tokens that we show a model at once: its context, but at most `longest`, since more may not fit into memory."""
    return min(getattr(config, "max_position_embeddings", 1024), longest)


class PeerTokenizer(Tokenizer):
    """The tokenizer of a transformers model, as one of ours. Its eos stands between documents."""

    def __init__(self, name: str, theirs: Any):
        """Raises BadInput if it has no token to put between documents."""
        self.name, self._theirs, self.vocab_size = name, theirs, len(theirs)
        self.eos_id = theirs.eos_token_id if theirs.eos_token_id is not None else theirs.bos_token_id
        if self.eos_id is None:
            raise BadInput(f"{name} has no token to put between documents")
        self.bos_id = self.eos_id

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        ids = self._theirs(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return np.array(ids, np.int64), 0

    def decode(self, ids: list[int] | np.ndarray) -> str:
        return self._theirs.decode(self._checked(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        return TextStream(self, before)


class Past:
    """A cache of transformers' own, with the face of our KVCache."""

    def __init__(self):
        self.past = None
        self.length = 0  # tokens that it holds; lower it to forget the newest ones

    def repeat(self, count: int):
        """Copy what is kept `count` times, for sequences that begin alike and go on differently."""
        self.past.batch_repeat_interleave(count)


class Peer:
    """A causal model of transformers, with the face that decoding/ knows."""

    def __init__(self, model: Any, context: int):
        self.model, self.lm_head = model, model.get_output_embeddings()
        self.config = SimpleNamespace(max_position_embeddings=context, vocab_size=model.config.vocab_size)

    def new_cache(self, length: int) -> Past:
        """An empty cache. It grows as needed, whatever `length` is."""
        return Past()

    def __call__(self, input_ids, cache: Past | None = None, logits_to_keep: int = 0):
        """As Llama.forward: input_ids (B, T), which follow those in the cache -> (logits (B, T, V), None).

        It computes all logits, however many we keep, because the option has had two names in transformers.
        """
        if cache is None:
            return self.model(input_ids=input_ids, use_cache=False).logits[:, -logits_to_keep:], None
        if cache.past is not None and cache.past.get_seq_length() > cache.length:
            cache.past.crop(cache.length - cache.past.get_seq_length())  # negative: drops that many of the newest
        output = self.model(input_ids=input_ids, past_key_values=cache.past, use_cache=True)
        cache.past, cache.length = output.past_key_values, cache.length + input_ids.size(1)
        return output.logits[:, -logits_to_keep:], None


@torch.no_grad()
def check_causal(name: str, model: Any, eos_id: int):
    """Raises BadInput if a model's predictions depend on the tokens that follow.

    transformers loads even an encoder as a causal model, and an encoder has seen the answers.
    """
    probe = torch.tensor([[eos_id] * 8, [eos_id] * 7 + [0 if eos_id else 1]], device=model.device)
    one, other = model(input_ids=probe).logits[:, :-1]
    if not torch.allclose(one, other, atol=1e-3, rtol=1e-3):
        raise BadInput(f"{name} is not a causal model: its predictions depend on the tokens that follow")


def random_llama(settings: dict) -> Any:
    """transformers' Llama for the settings of a config.json (`hf.llama_config`), with random weights."""
    return library().LlamaForCausalLM(library().LlamaConfig(**settings))


@torch.no_grad()
def compare_logits(folder: Path, model: Llama) -> str | None:
    """Compare transformers' logits of a folder with those of `model`, both in FP32. Returns the result in words.

    Returns None if transformers is not installed. Raises BadInput if they differ by more than TOLERANCE.
    """
    try:
        version = library().__version__
    except BadInput:
        return None
    theirs = load_model(str(folder))
    input_ids = torch.randint(model.config.vocab_size, (2, min(128, model.config.max_position_embeddings)),
                              generator=torch.Generator().manual_seed(0))
    difference = float((theirs(input_ids).logits - model(input_ids)[0]).abs().max())
    if not difference <= TOLERANCE:  # written like this, NaN fails too
        raise BadInput(f"transformers {version} makes other logits of {folder}: they differ by {difference:.2g}, more "
                       f"than {TOLERANCE:g}")
    return f"read with transformers {version}, whose logits differ by {difference:.1g} at most"

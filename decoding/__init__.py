"""From logits to text: the loop, the choice of a token, and ways to make both fast."""

from typing import TYPE_CHECKING

from decoding import loops
from decoding.generate import generate
from decoding.narrow import narrow
from model import Llama

if TYPE_CHECKING:
    from decoding.engine import Engine


def ready(model: Llama, dtype: str = "fp32", threads: int | None = None) -> tuple["Llama | Engine", str]:
    """The model as it writes fastest, with weights in one of narrow.DTYPES and on so many threads at most.

    On a CPU that is an Engine, with its loops compiled, which takes seconds the first time. If it cannot run here, it
    is the model itself, made narrow; the second result says why, in a few words, and is "" otherwise. The model can no
    longer be trained.
    """
    narrow(model, dtype)
    if model.lm_head.weight.device.type != "cpu":
        return model, ""
    why = "there are no loops for FP16" if dtype == "fp16" else loops.missing()
    if why:
        return model, f"writing with PyTorch's operations, which is slower: {why}"
    from decoding.engine import Engine  # here, as numba is optional
    engine = Engine(model, threads)
    list(generate(engine, [0], 1))
    return engine, ""

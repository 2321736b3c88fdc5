"""Export a model to other programs, or import one from them.

    python export.py --out DIR [--checkpoint out/NAME] [--format hf]    a folder for transformers
    python export.py --out DIR --format gguf                            a file for llama.cpp (formats/gguf.py)
    python export.py --out DIR --format onnx                            a graph for ONNX Runtime (formats/onnx.py)
    python export.py --out DIR --format int8 | int4                     a checkpoint for sample.py (formats/packed.py)
    python export.py --out DIR --format bundle                          the same in one file, vocabulary and all
    python export.py --out out/NAME --from FOLDER_OR_HUB_NAME           somebody's Llama, imported (formats/llama.py)

Our weights have Hugging Face's names and its order of rotary pairs. So most of the work is to write down, in each
program's words, what config.json and the vocabulary already say. Then the files are read back and compared with the
model; if they differ, the folder is deleted. For transformers and ONNX the program itself reads them, if installed.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import checkpoint
from backend import PRECISIONS
from cli import BadInput, parse, script
from formats.card import model_card
from formats.gguf import write_gguf
from formats.hf import segmented, write_hf, write_settings
from formats.llama import import_llama
from formats.onnx import write_onnx
from formats.packed import write_bundle, write_packed


@dataclass
class Options:
    """Export a trained model, or import a Llama."""

    out: Path
    """Directory to write. It must be empty or not exist."""
    checkpoint: Path | None = None
    """A run (out/NAME) or one of its step directories; the newest run under out/ if None."""
    which: Literal["best", "latest"] = "best"
    """Which of a run's checkpoints."""
    format: Literal["hf", "gguf", "onnx", "int8", "int4", "bundle"] = "hf"
    """hf is for transformers and whatever reads its files, gguf for llama.cpp, onnx for ONNX Runtime and
    transformers.js; int8, int4 and bundle, which is one file in INT4, for sample.py."""
    dtype: Literal["fp32", "bf16", "fp16", "int8", "int4", "q8_0", "q4_0"] = "fp32"
    """Precision of the weights. int8 and int4 are for a bundle, and for gguf, which calls them q8_0 and q4_0."""
    tokenizer: Literal["exact", "portable"] | None = None
    """exact gives the ids that the model was trained on: TokenMonster's search, in our own code, which transformers
    must be allowed to run. portable is a plain tokenizer.json (tokenizer/portable.py). If None, whichever the model was
    trained with; but portable for gguf and onnx, whose programs cannot run our code."""
    license: str | None = None
    """Licence to put on the model card, as the hub abbreviates it (apache-2.0). The training data have a say in it."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """A Llama to import instead of exporting: a folder, or OWNER/NAME on the hub."""
    vocabulary: str | None = None
    """With --from: the vocabulary, by name or path, if the model's folder does not hold it."""
    eos_token: str | None = None
    """With --from: the token, or its id, that stands between the model's documents; if None, what its config.json says.
    (A run of ours knows it; before a training you name it with prepare.py --eos_token.)"""

    def __post_init__(self):
        """Raises ValueError, in one line, if the licence is not an abbreviation."""
        self.dtype = {"q8_0": "int8", "q4_0": "int4"}.get(self.dtype, self.dtype)  # llama.cpp's names for them
        if self.license is not None and not re.fullmatch(r"[\w.-]+", self.license):
            raise ValueError(f"license is {self.license!r}; give an abbreviation such as apache-2.0")


def check_options(options: Options):
    """Raises BadInput for options that do not go with the format."""
    if options.eos_token is not None or options.vocabulary is not None:
        raise BadInput("--eos_token and --vocabulary are for an import: add --from")
    rounding = options.dtype in ("int8", "int4")
    if rounding and options.format not in ("gguf", "bundle"):
        raise BadInput(f"--dtype {options.dtype} needs --format gguf (which calls it q8_0 or q4_0) or bundle")
    if options.format == "int4" and options.dtype != "fp32" or options.format == "bundle" and not rounding and (
            options.dtype != "fp32"):
        raise BadInput(f"--format {options.format} rounds all weights: leave out --dtype {options.dtype}")
    if options.format == "onnx" and options.dtype != "fp32":
        raise BadInput("--format onnx is in fp32; onnxruntime's own tools can convert it to other types")
    if options.format in ("gguf", "onnx") and options.tokenizer == "exact":
        raise BadInput(f"--format {options.format} takes no --tokenizer exact: what reads it cannot run our code")
    if options.format in ("int8", "int4", "bundle") and options.tokenizer:
        raise BadInput(f"--format {options.format} is for sample.py, and keeps the model's own tokenizer")


def export(options: Options):
    """Write a checkpoint in the format that the options ask for."""
    check_options(options)
    trained = checkpoint.open_trained(options.checkpoint, options.which)
    model, state, dtype = trained.model, trained.state, PRECISIONS.get(options.dtype)
    form = options.tokenizer or ("portable" if options.format in ("gguf", "onnx") else None)
    with checkpoint.new_folder(options.out) as folder:
        exported = segmented(trained.vocabulary, form)
        if options.format == "hf":
            found = write_hf(folder, model, exported, dtype, state)
        elif options.format == "gguf":
            found = write_gguf(folder, model, state["config"].get("name", "model"), exported, options.dtype)
        elif options.format == "onnx":
            write_settings(folder, model, exported, dtype, state)
            found = write_onnx(folder / "onnx", model)
        elif options.format == "bundle":
            found = write_bundle(folder, model, state, trained.vocabulary, "int4" if dtype else options.dtype)
        else:
            found = write_packed(folder, model, state, trained.vocabulary, options.format, dtype)
        card = model_card(trained, exported, options.format, options.dtype, options.license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        curves = checkpoint.run_dir(trained.step_dir) / "curves.png"
        if curves.is_file():
            shutil.copyfile(curves, folder / "curves.png")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = [(path.relative_to(folder), path.stat().st_size) for path in files]
    print(f"{trained.step_dir} -> {options.out}: {found}")
    if exported is not trained.vocabulary:
        print("  note: the model was trained with the exact segmentation, and text in the portable one is strange to "
              "it: it continues a prompt, but do not score with this (docs/exports.md, Two tokenizers)")
    for path, size in sizes:
        print(f"  {str(path):34} {size / 1e6:10.3f} MB")


def main(argv: list[str]):
    options = parse(Options, argv)
    if options.from_ is None:
        export(options)
    else:
        import_llama(options.from_, options.out, options.vocabulary, options.eos_token)


if __name__ == "__main__":
    script(main)

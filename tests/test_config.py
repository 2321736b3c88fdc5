"""A run is a preset and the last word of the command line; what cannot be a run is refused in one line."""
import ast
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

import config
import model
from cli import BadInput
from config import Config, Source, load
from config.quickstart import config as quickstart
from model import ModelConfig
from tests.commands import ROOT

PRESET = """
from config import Config, Source
from model import ModelConfig
config = Config(
    name="mine", data_dir="data/mine", block_size=64, tokens_per_step=256, max_steps=300,
    sources={"web": Source("a", 0.25, 0.5), "more-code": Source("b", 0.75, 0.5, preserve_linebreaks=True)},
    model=ModelConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=3,
                      max_position_embeddings=128),
)
"""


@pytest.fixture
def preset(tmp_path):
    """Writes a preset and gives its path."""
    def write(text=PRESET):
        (tmp_path / "mine.py").write_text(text)
        return str(tmp_path / "mine.py")
    return write


def refused(argv, *words):
    with pytest.raises(BadInput) as refusal:
        load(argv)
    message = str(refusal.value)
    assert not re.search("\n|│|─|\x1b", message) and all(word in message for word in words), message


# -----------------------------------------------------------------------------
# what a command line means

def test_quickstart_is_the_default():
    """No preset means the quickstart's."""
    assert load([]) == load([str(config.QUICKSTART)]) == quickstart
    assert load([]).name == "quickstart" and load([]).data_dir == Path("data/quickstart")


def test_preset(preset):
    """A preset gives its values, and Config's defaults where it gives none."""
    run = load([preset()])
    assert (run.name, run.data_dir, run.out_dir) == ("mine", Path("data/mine"), Path("out/mine"))
    assert run.sources["more-code"] == Source("b", 0.75, 0.5, True)
    assert run.model == ModelConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=3,
                                    max_position_embeddings=128, head_dim=8)
    named = {"name", "data_dir", "block_size", "tokens_per_step", "max_steps", "sources", "model"}
    assert all(getattr(run, f.name) == f.default for f in fields(Config) if f.name not in named)


@pytest.mark.parametrize("words, path, value", [
    ("--learning_rate=0.5", "learning_rate", 0.5), ("--learning_rate 2e-3", "learning_rate", 0.002),
    ("--learning-rate 0.25", "learning_rate", 0.25), ("--max_minutes 2.5", "max_minutes", 2.5),
    ("--max_minutes None", "max_minutes", None), ("--eval_blocks 3", "eval_blocks", 3),
    ("--data_dir some/where", "data_dir", Path("some/where")), ("--schedule wsd", "schedule", "wsd"),
    ("--betas 0.8 0.99", "betas", (0.8, 0.99)), ("--compile True", "compile", True),
    ("--resume", "resume", True),
    ("--resume False", "resume", False), ("--resume=True", "resume", True),
    ("--model.intermediate_size=7", "model.intermediate_size", 7),
    ("--model.fp32_blocks", "model.fp32_blocks", ()),
    ("--model.fp32_blocks 1 -1", "model.fp32_blocks", (1, -1)),
    ("--model.tie_word_embeddings True", "model.tie_word_embeddings", True),
    ("--model.head_dim 4", "model.head_dim", 4),
    ("--sources.web.dataset other", "sources.web.dataset", "other"),
    ("--sources.more-code.preserve_linebreaks False", "sources.more-code.preserve_linebreaks", False),
])
def test_one_value_from_the_command_line(preset, words, path, value):
    """An option sets its field, however deep, and leaves every other as the preset has it."""
    wanted = asdict(load([preset()]))
    *outer, name = path.split(".")
    inner = wanted
    for key in outer:
        inner = inner[key]
    inner[name] = value
    assert asdict(load([preset(), *words.split()])) == wanted


def test_several_values_from_the_command_line(preset):
    """Options combine, in any order; a yes-or-no option needs no value even before another option."""
    run = load([preset(), "--overwrite", "--sources.web.ratio", "0.5", "--compile", "--name", "other",
                "--sources.more-code.ratio", "0.5", "--resume", "False"])
    assert [source.ratio for source in run.sources.values()] == [0.5, 0.5]
    assert (run.overwrite, run.compile, run.resume, run.name) == (True, True, False, "other")


@pytest.mark.parametrize("words", ["--model.hidden_size 96", "--model.num_attention_heads 3"])
def test_head_dim_follows_the_width(preset, words):
    """A preset that leaves head_dim out gets hidden_size / heads of the final values, not of its own."""
    assert load([preset(), *words.split()]).model.head_dim == 16


@pytest.mark.parametrize("own, words", [("head_dim=4", ""), ("head_dim=4", "--model.hidden_size 96"),
                                        ("head_dim=8, hidden_size=50", "")])
def test_head_dim_of_a_preset_stays(preset, own, words):
    """A head_dim that the preset sets is kept, also where the width does not divide into the heads."""
    text = PRESET.replace("hidden_size=48", own if "hidden" in own else f"hidden_size=48, {own}")
    assert f"head_dim={load([preset(text), *words.split()]).model.head_dim}" in own


@pytest.mark.parametrize("max_steps, fraction, warmup_steps", [
    (100, 0.05, 5), (1000, 0.0, 1), (3, 0.1, 1), (10, 1, 10)])
def test_what_follows_from_the_values(max_steps, fraction, warmup_steps):
    """The properties: warmup in steps, at least one; sequences in a step; the run's directory."""
    run = replace(quickstart, name="x", max_steps=max_steps, warmup_fraction=fraction, block_size=32,
                  tokens_per_step=96)
    assert (run.warmup_steps, run.sequences_per_step, run.out_dir) == (warmup_steps, 3, Path("out", "x"))


@pytest.mark.parametrize("long, short", [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16"),
                                         ("bf16", "bf16"), ("auto", "auto")])
def test_long_spellings_of_a_dtype(preset, long, short):
    """Config files of before say bfloat16 for bf16, and mean the same; the command line has one spelling."""
    path = preset(PRESET.replace('name="mine"', f'name="mine", dtype="{long}"'))
    assert load([path]).dtype == short
    assert load([path, "--dtype", "fp32"]).dtype == "fp32"
    if long != short:
        refused([path, "--dtype", long], "--dtype", short)


# -----------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize("words, named", [
    ("--block_sizes 64", ["--block_sizes", "--block_size "]),
    ("--modle.hidden_size 8", ["--model.hidden_size"]),
    ("--model.hiden_size 8", ["--model.hidden_size"]), ("--sources.wbe.ratio 1", ["--sources.web.ratio"]),
    ("--block_size large", ["--block_size", "large"]), ("--block_size 1.5", ["--block_size", "1.5"]),
    ("--block_size", ["--block_size"]), ("--betas 0.9", ["--betas"]), ("--compile maybe", ["maybe"]),
    ("--schedule linear", ["linear", "cosine", "wsd"]), ("stray", ["stray"]),
    ("--block_size 0", ["block_size is 0"]), ("--tokens_per_step 0", ["tokens_per_step is 0"]),
    ("--micro_batch_size 0", ["micro_batch_size is 0"]), ("--max_steps -5", ["max_steps is -5"]),
    ("--log_interval 0", ["log_interval is 0"]), ("--eval_interval 0", ["eval_interval is 0"]),
    ("--keep_checkpoints 0", ["keep_checkpoints is 0"]), ("--eval_blocks 0", ["eval_blocks is 0"]),
    ("--eval_blocks -3", ["eval_blocks is -3"]), ("--tokens_per_step 100", ["100", "multiple of", "64"]),
    ("--block_size 256", ["256", "model.max_position_embeddings 128"]),
    ("--sources.web.ratio 0.5", ["ratio", "sum to 1"]),
    ("--sources.web.anneal_ratio 0.1", ["anneal_ratio", "sum to 1"]),
    ("--sources.web.ratio -0.5 --sources.more-code.ratio 1.5", ["negative"]),
    ("--anneal_fraction 1.5", ["anneal_fraction is 1.5"]),
    ("--anneal_fraction -0.1", ["anneal_fraction is -0.1"]),
    ("--model.num_key_value_heads 4", ["num_key_value_heads 4"]),
    ("--model.vocab_size 0", ["model.vocab_size is 0"]),
    ("--model.fp32_blocks 4", ["fp32_blocks", "4"]), ("--name ..", ["name"]),
    ("--name ../elsewhere", ["name"]),
    ("--name=", ["name"]), ("--learning_rate nan", ["learning_rate"]),
    ("--learning_rate -1", ["learning_rate"]),
    ("--warmup_fraction 3", ["warmup_fraction is 3"]), ("--decay_fraction -1", ["decay_fraction is -1"]),
    ("--max_grad_norm 0", ["max_grad_norm is 0"]), ("--max_minutes 0", ["max_minutes is 0"]),
    ("--train_minutes nan --schedule wsd", ["train_minutes is nan"]), ("--train_minutes 1", ["wsd"]),
    ("--weight_decay -1", ["weight_decay"]), ("--betas 0.9 1.5", ["betas"]), ("--eps -1", ["eps"]),
    ("--weight_decay inf", ["weight_decay is inf"]), ("--train_minutes inf --schedule wsd", ["train_minutes is inf"]),
    ("--learning_rate inf", ["learning_rate is inf"]), ("--betas nan 0.9", ["betas"]),
    ("--seed -1", ["seed is -1"]), ("--seed 4294967296", ["seed is 4294967296", "4294967295"]),
    ("--sources.web.ratio nan", ["ratio", "sum to 1"]), ("--sources.more-code.ratio nan", ["ratio", "sum to 1"]),
    ("--sources.web.anneal_ratio nan", ["anneal_ratio", "sum to 1"]), ("--sources.web.ratio inf", ["sum to 1"]),
    ("--max_steps 100000000000000", ["max_steps 100000000000000"]),
    ("--tokens_per_step 6400000000000", ["max_steps 300"]), ("--micro_batch_size 1000000000", ["micro_batch_size"]),
    ("--model.hidden_size 1000000000", ["model.hidden_size is 1000000000"]),
    ("--model.num_hidden_layers 1000000000", ["model.num_hidden_layers is 1000000000"]),
    ("--model.intermediate_size 1000000000", ["model.intermediate_size is 1000000000"]),
    ("--model.vocab_size 1000000000", ["model.vocab_size is 1000000000"]),
    ("--model.max_position_embeddings 1000000000", ["model.max_position_embeddings is 1000000000"]),
    ("--model.num_attention_heads 1000000000", ["model.num_attention_heads is 1000000000"]),
    ("--model.head_dim 1000000", ["model.head_dim is 1000000"]), ("--model.rope_theta nan", ["rope_theta is nan"]),
    ("--model.initializer_range nan", ["initializer_range is nan"]), ("--model.rms_norm_eps -1", ["rms_norm_eps"]),
])
def test_refused_options(preset, words, named):
    """A field that is not there (the nearest is named), a value of another type or out of range."""
    refused([preset(), *words.split()], *named)


def test_the_shape_of_another_model_comes_later(preset):
    """With --init_from the context of the config's own model does not matter: the checkpoint's does."""
    refused([preset(), "--block_size", "256"], "model.max_position_embeddings 128")
    assert load([preset(), "--block_size", "256", "--init_from", "out/theirs"]).block_size == 256


def test_missing_preset():
    """Where a preset is missing, those that there are are named."""
    refused(["config/none.py"], "config/none.py", "config/quickstart.py")
    refused(["config"], "config/quickstart.py")


@pytest.mark.parametrize("text, word", [
    ("config = (", "SyntaxError"), ("import nothing_of_the_kind", "ModuleNotFoundError"),
    ("x = 1", "KeyError"),
    ("config = 3", "does not bind"), ("1 / 0", "ZeroDivisionError"), ("\0", "mine.py"),
    ("from config import Config\nconfig = Config(block_size=0)", "block_size is 0"),
    ("from config import Config\nconfig = Config(blocksize=8)", "blocksize"),
    (PRESET.replace("0.25", "0.3"), "sum to 1"),
])
def test_broken_preset(preset, text, word):
    """A preset that does not run, or binds no Config, is refused with the reason."""
    refused([preset(text)], "mine.py", word)


# -----------------------------------------------------------------------------
# help

def documented(module, name):
    """{field: docstring} of a dataclass, read off its source: the string that follows the field, or ""."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    return {node.target.id: following.value.value if isinstance(following, ast.Expr) else ""
            for node, following in zip(body, body[1:]) if isinstance(node, ast.AnnAssign)}


def test_help():
    """--help shows every field of a run, of its model and of its sources, each with its docstring."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"],
                          capture_output=True, encoding="utf-8",
                          env=os.environ | {"COLUMNS": "100", "PYTHONUTF8": "1"})
    assert done.returncode == 0 and done.stderr == ""
    shown = re.sub(r"[\s│]", "", done.stdout)
    groups = [("--", documented(config, "Config")), ("--model.", documented(model, "ModelConfig")),
              *((f"--sources.{name}.", documented(config, "Source")) for name in quickstart.sources)]
    for (prefix, docstrings), cls in zip(groups, [Config, ModelConfig] + [Source] * 9):
        assert list(docstrings) == [f.name for f in fields(cls)] and all(docstrings.values()), docstrings
        for name, docstring in docstrings.items():
            if name in ("model", "sources"):  # these head their own groups
                continue
            assert f"{prefix}{name}" in re.findall(r"--[\w.]+", done.stdout), name
            assert re.sub(r"\s", "", docstring) in shown, name


def test_what_follows_from_another_value_follows_the_command_line():
    """A preset's shares in the anneal, where they are those of the rest; and sources' names are names of files."""
    config = load([str(ROOT / "config/stentor_12m.py"), "--sources.web.ratio=0.9", "--sources.textbooks.ratio=0.1"])
    assert [source.anneal_ratio for source in config.sources.values()] == [0.9, 0.1]
    for name in ("a_val", "../a", "a b", ""):
        with pytest.raises(ValueError, match="a source is called"):
            Config(sources={name: Source("a/b")})
    with pytest.raises(ValueError, match="data_files"):
        Source("parquet")

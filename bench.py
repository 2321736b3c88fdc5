"""
How fast this code is, next to its peers.

    python bench.py tokenizer                 # a table
    python bench.py tokenizer --markdown      # the same for a README
    python bench.py prepare                   # from Parquet to bins
    python bench.py t4                        # the INT8 linears; what a GPU of --capability 7.5 will choose
    python bench.py qat                       # what quantization-aware training buys, by training it

A speed alone says as much about the machine as about the code. So a peer runs in the same
process, the runs of all contestants alternate (a machine that slows down slows them all), the figure
is the median, and what counts is the ratio.

A section is a function that takes the parsed command line and returns rows for `show`.
"""
import argparse
import ast
import importlib.util
import json
import multiprocessing
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

import backend
import checkpoint
import prepare
import quant_t4
import tokenizer
import train
from config import Source, load
from data import Batches, read_meta
from model import Llama, takes_grouped_heads
from vocabulary import COMPILED, VocabularyError

CONFIGS = Path(__file__).with_name("config")
DOCUMENT = 5000  # characters


def alternate(runs, rounds):
    """Time functions in turns, after one run of each to warm up.

    runs    {name: function without arguments}
    -> {name: median seconds}
    """
    seconds = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(header, rows, markdown):
    """Print a table. header, rows: tuples of str, of one length."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    start, between, end = ("| ", " | ", " |") if markdown else ("", "  ", "")
    lines = [header, tuple("-" * width for width in widths), *rows]
    for line in lines:
        print((start + between.join(cell.ljust(width) for cell, width in zip(line, widths)) + end).rstrip())


# -----------------------------------------------------------------------------
# tokenizer

def documents(count):
    """English prose and Python code from this Python's own library -> {kind: `count` texts of 5 KB}"""
    code, prose = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if {"site-packages", "test", "tests", "encodings", "pydoc_data"} & set(path.parts):
            continue  # other people's code, and tables
        if min(sum(map(len, code)), sum(map(len, prose))) > count * DOCUMENT:
            break
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # lib2to3 keeps some broken files
            continue
        code.append(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                prose.append((ast.get_docstring(node) or "") + "\n\n")

    def cut(texts):
        text = "".join(texts)
        return [text[start:start + DOCUMENT] for start in range(0, len(text), DOCUMENT)][:count]

    return {"prose": cut(prose), "code": cut(code)}


def tokenizer_without_numba():
    """A second copy of the module, and of vocabulary.py, imported where numba cannot be: plain Python's loops."""
    present = {name: sys.modules.get(name) for name in ("numba", "vocabulary")}
    sys.modules["numba"] = None  # makes `import numba` raise ImportError
    sys.modules.pop("vocabulary", None)
    try:
        spec = importlib.util.spec_from_file_location("tokenizer_without_numba", tokenizer.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, module_before in present.items():
            sys.modules.pop(name)
            if module_before is not None:
                sys.modules[name] = module_before
    return module


def tokenmonster_package(path):
    """The reference, or None and a line that says why not."""
    try:
        tokenizer.reference_encode(path, ["probe"], timeout=60)  # in a process that can be ended if it hangs
    except RuntimeError as error:
        print(f"no comparison with the reference: {error}", file=sys.stderr)
        return None
    import tokenmonster
    return tokenmonster.load(str(Path(path).resolve()))


def byte_pair_encoding(texts, vocab_size):
    """A BPE of the `tokenizers` library, of our size and trained on the very texts, or None."""
    try:
        import tokenizers
    except ImportError:
        print("no comparison with the tokenizers library, which is not installed", file=sys.stderr)
        return None
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return bpe


def bench_tokenizer(arguments):
    """MB of text per second on documents of 5 KB, and the ratio to each peer that runs here."""
    path, ours = tokenizer.find(arguments.vocab), tokenizer.load(arguments.vocab)
    plain = tokenizer_without_numba().load(arguments.vocab)
    kinds = documents(arguments.documents)
    reference = tokenmonster_package(path)
    bpe = byte_pair_encoding([text for texts in kinds.values() for text in texts], ours.vocab_size)

    def size(texts):
        return sum(len(text.encode()) for text in texts) / 1e6

    rows = []
    for kind, texts in kinds.items():
        few = texts[:max(1, len(texts) // 20)]  # plain Python is slow
        ids = ours.encode_batch(texts)
        compiled = "compiled" if COMPILED else "plain Python, as numba is not here"
        cores = f"encode_batch, {os.cpu_count()} cores"
        runs = {  # name: (function, MB of text that it goes through)
            f"encode, {compiled}": (lambda: [ours.encode(text) for text in texts], size(texts)),
            "encode, plain Python": (lambda: [plain.encode(text) for text in few], size(few)),
            cores: (lambda: ours.encode_batch(texts), size(texts)),
            "decode": (lambda: [ours.decode(row) for row in ids], size(texts)),
        }
        peers = {}
        if reference is not None:
            peers["tokenmonster package"] = (lambda: [reference.tokenize(text) for text in texts],
                                             lambda: [reference.decode(row) for row in ids])
        if bpe is not None:
            bpe_ids = [bpe.encode(text).ids for text in texts]
            peers["tokenizers, BPE"] = (lambda: [bpe.encode(text) for text in texts],
                                        lambda: [bpe.decode(row) for row in bpe_ids])
        for peer, (encode, decode) in peers.items():
            runs[f"{peer}: encode"] = (encode, size(texts))
            runs[f"{peer}: decode"] = (decode, size(texts))

        seconds = alternate({name: run for name, (run, _) in runs.items()}, arguments.rounds)
        speed = {name: megabytes / seconds[name] for name, (_, megabytes) in runs.items()}
        for name in runs:
            peer_speeds = [speed[f"{peer}: {'decode' if 'decode' in name else 'encode'}"] for peer in peers]
            ratios = [f"{speed[name] / other:.2f}" for other in peer_speeds]
            rows.append((kind, name, f"{speed[name]:.2f}", *ratios))
    print(f"{ours.name}, {arguments.documents} documents of {DOCUMENT} characters, one thread unless it says "
          f"otherwise, medians of {arguments.rounds}\n")
    return ("text", "what", "MB/s", *(f"x {peer}" for peer in peers)), rows


# -----------------------------------------------------------------------------
# prepare

def make_shards(folder, megabytes, texts):
    """Parquet files of about 25 MB of text each, the texts over and over, each time cut elsewhere -> their paths."""
    import pyarrow
    import pyarrow.parquet

    paths, size, turn = [], 0, 0
    text = "".join(texts)
    while size < megabytes * 1e6:
        starts = range(7 * turn % DOCUMENT, len(text) - DOCUMENT, DOCUMENT)
        documents = [text[start:start + DOCUMENT] for start in starts][:25_000_000 // DOCUMENT]
        paths.append(Path(folder) / f"{len(paths):04}.parquet")
        table = pyarrow.table({"text": documents})
        pyarrow.parquet.write_table(table, paths[-1], row_group_size=1000, compression="zstd")
        size, turn = size + DOCUMENT * len(documents), turn + 1
    return paths


def on_every_core(work):
    """Run work() in a process for each core, all at once -> seconds until the last has ended."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(prepare.WORKERS)]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return time.perf_counter() - start


def resident(group):
    """Resident bytes of all processes of a process group, from /proc."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def run_prepare(folder, shards, preserve_linebreaks, vocab):
    """prepare.py on shards, as its user runs it -> (seconds in all, peak resident bytes, meta.json)"""
    preset = Path(folder) / "bench.py"
    source = f"Source('parquet', data_files={tuple(map(str, shards))}, preserve_linebreaks={preserve_linebreaks})"
    preset.write_text(f"from config import Config, Source\nconfig = Config(tokenizer={vocab!r}, max_steps=10**6, "
                      f"sources={{'text': {source}}})\n")
    data = Path(folder) / "data"
    shutil.rmtree(data, ignore_errors=True)
    command = [sys.executable, str(Path(__file__).with_name("prepare.py")), str(preset), "--data_dir", str(data)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit("bench.py: prepare.py has failed")
    return seconds, peak, json.loads((data / "meta.json").read_text())


def breakdown(shards, preserve_linebreaks, vocabulary):
    """CPU seconds of each stage of prepare.py on a shard, one after the other in this process -> {stage: seconds}"""
    seconds, eos = {}, vocabulary.eos_id.to_bytes(2, "little")

    def stage(name, work):
        start = time.process_time()
        result = work()
        seconds[name] = time.process_time() - start
        return result

    source = Source("parquet", data_files=tuple(map(str, shards)))
    list(prepare.read(prepare.open_dataset(source, None, []), "text", [None, 0]))  # imports are not counted
    chunks = stage("read Parquet", lambda: [texts for texts, _, _ in prepare.read(
        prepare.open_dataset(source, None, []), "text", [None, 0])])
    chunks = stage("send to a worker", lambda: pickle.loads(pickle.dumps(chunks)))
    clean = stage("clean", lambda: [prepare.clean_text(text, preserve_linebreaks)
                                    for texts in chunks for text in texts])
    encoded = stage("tokenize", lambda: [vocabulary.encode_counted(text) for text in clean])
    stage("count bytes", lambda: [vocabulary.count_bytes(ids) for ids, _ in encoded])
    documents = stage("join", lambda: [ids.tobytes() + eos for ids, _ in encoded if vocabulary.eos_id not in ids])
    documents = stage("send back", lambda: pickle.loads(pickle.dumps(documents)))
    with tempfile.TemporaryFile() as file:
        stage("write", lambda: [file.write(document) for document in documents])
    return seconds, sum(len(text.encode()) for text in clean) / 1e6


def bench_prepare(arguments):
    """MB of clean text per second and core, from Parquet to bins, next to the tokenizer alone; and the memory."""
    vocabulary, cores, rows = tokenizer.load(arguments.vocab), prepare.WORKERS, []
    kinds = documents(arguments.documents * 10)
    with tempfile.TemporaryDirectory() as folder:
        for kind, texts in kinds.items():
            keep = kind == "code"
            clean = [prepare.clean_text(text, keep) for text in texts]
            size = sum(len(text.encode()) for text in clean) / 1e6
            shards = make_shards(folder, arguments.megabytes, texts)
            vocabulary.encode(clean[0])  # compiled before the processes are forked
            alone, whole, in_all = [], [], []
            for _ in range(arguments.rounds):
                seconds = on_every_core(lambda: [vocabulary.encode_counted(text) for text in clean])
                alone.append(size / seconds)  # each core has tokenized all of it
                seconds, peak, meta = run_prepare(folder, shards, keep, arguments.vocab)
                counts = meta["sources"]["text"]
                megabytes = (counts["train"]["bytes"] + counts["val"]["bytes"]) / 1e6
                whole.append(megabytes / meta["seconds"] / cores)
                in_all.append(megabytes / seconds / cores)
            reference = statistics.median(alone)
            for what, speeds in (("tokenizer alone", alone), ("Parquet to bins", whole),
                                 ("the same, start of the program included", in_all)):
                speed = statistics.median(speeds)
                rows.append((kind, what, f"{speed:.2f}", f"{speed / reference:.2f}"))
            stages, megabytes = breakdown(shards[:1], keep, vocabulary)
            for name, seconds in stages.items():
                share = seconds / sum(stages.values())
                rows.append((kind, f"  {name}", f"{megabytes / seconds:.0f}", f"{share:.1%} of CPU"))
            for path in shards:
                path.unlink()
        peaks = [run_prepare(folder, make_shards(folder, megabytes, kinds["prose"]), False, arguments.vocab)[1] / 1e6
                 for megabytes in (100, 1000)]
    print(f"{vocabulary.name}, {arguments.megabytes} MB of Parquet, {cores} cores, medians of {arguments.rounds}; peak "
          f"resident memory {peaks[0]:.0f} MB for 100 MB of text, {peaks[1]:.0f} MB for 1 GB\n")
    return ("text", "what", "MB/s a core", "x tokenizer"), rows


# -----------------------------------------------------------------------------
# t4

def choices(capability):
    """What a GPU of this compute capability will run with -> rows of (what, choice)

    The first three rows are what the code decides; the others, what is to be expected when it tries.
    """
    half = backend.half_precision(capability)

    def attention(dtype):
        return ("flash, grouped key and value heads" if takes_grouped_heads(capability, dtype) else
                "memory-efficient, keys and values expanded to all heads")

    return [("matrix products", {torch.float16: "float16, with a GradScaler", torch.bfloat16: "bfloat16"}[half]),
            ("attention of the inner blocks", attention(half)),
            ("attention of the FP32 blocks", attention(torch.float32)),
            ("INT8 products", "of integers (torch._int_mm) or fake, whichever is faster when the run begins"
                              if capability >= (7, 5) else "fake: no integer tensor cores"),
            ("--compile", "Triton" if capability >= (7, 0) else "falls back: Triton needs 7.0")]


def bench_t4(arguments):
    """Milliseconds of the linears of an inner block of Stentor2, forward and backward, on this machine's device."""
    rows = []
    for dtype in ("float32", "float16" if torch.cuda.is_available() else "bfloat16"):
        device = backend.pick(dtype=dtype, tpu=False)
        for name in ("stentor2_12m", "stentor2_30m"):
            config = load([str(CONFIGS / f"{name}.py")])
            models = {product: Llama(config.model).to(device.device) for product in ("plain", "fake", "integers")}
            for product in ("fake", "integers"):
                quant_t4.apply_t4_recipe(models[product], config.int8_linears)
            quant_t4.use_integers(models["integers"], True)
            seconds = alternate({product: quant_t4.block_passes(model, arguments.tokens, device.autocast)
                                 for product, model in models.items()}, arguments.rounds)
            for product, time_ in seconds.items():
                rows.append((name, dtype, product, f"{1000 * time_:.2f}", f"{time_ / seconds['plain']:.2f}"))
    capability = tuple(map(int, arguments.capability.split(".")))
    print(f"A GPU of compute capability {arguments.capability} will run with\n")
    show(("what", "choice"), choices(capability), arguments.markdown)
    print(f"\n{device.name}, {torch.get_num_threads()} threads, {arguments.tokens:,} tokens, eager, medians of "
          f"{arguments.rounds}\n")
    return ("block of", "products", "linears", "ms, forward and backward", "x plain"), rows


# -----------------------------------------------------------------------------
# qat

@torch.no_grad()
def bits_per_byte(run, int8_linears):
    """Held-out bits per byte of a run's last checkpoint, these of its linears in INT8, all else in FP32."""
    model, state = checkpoint.load_model(checkpoint.find(run))
    quant_t4.apply_t4_recipe(model, int8_linears)
    config = load(["--data_dir", state["config"]["data_dir"]])
    held_out = {name: Batches(config, "val", name) for name in config.sources}
    losses = train.evaluate(model.eval(), held_out, backend.pick("cpu", "float32"))
    return train.mixed(losses, config.sources, read_meta(config))["bits_per_byte"]


def bench_qat(arguments):
    """Train the quickstart's model with and without INT8 linears, in FP32, on the same tokens, and run both both ways.

    Runs that are there already are not trained again: out/qat_fp32_1, out/qat_int8_1, ...
    """
    linears, rows = load([str(CONFIGS / "stentor2_12m.py")]).int8_linears, []
    for seed in range(1, arguments.seeds + 1):
        figures = []
        for kind, options in (("fp32", ()), ("int8", ("--int8_linears", *linears, "--int8_product=fake"))):
            command = [sys.executable, str(Path(__file__).with_name("train.py")), "--dtype=float32", "--resume",
                       f"--max_steps={arguments.steps}", "--train_minutes=None", "--max_minutes=None",
                       f"--seed={seed}", f"--name=qat_{kind}_{seed}", *options]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                sys.exit("bench.py: train.py has failed")
            figures += [bits_per_byte(Path("out") / f"qat_{kind}_{seed}", int8) for int8 in ((), linears)]
        rows.append(figures)
    rows.append([statistics.mean(column) for column in zip(*rows)])
    print(f"Held-out bits per byte after {arguments.steps:,} steps of the quickstart's model\n")
    names = [*(f"seed {seed}" for seed in range(1, arguments.seeds + 1)), "mean"]
    return (("", "FP32 baseline", "it in INT8", "QAT in FP32", "QAT in INT8", "QAT in INT8 / baseline",
             "QAT in INT8 / baseline in INT8"),
            [(name, *(f"{figure:.4f}" for figure in (fp32, ptq, qat_fp32, qat, qat / fp32, qat / ptq)))
             for name, (fp32, ptq, qat_fp32, qat) in zip(names, rows)])


SECTIONS = {"tokenizer": bench_tokenizer, "prepare": bench_prepare, "t4": bench_t4, "qat": bench_qat}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--vocab", default="quickstart-2048", help="name or path (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=200, help="of each kind (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=300, help="of text to prepare (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="through the linears (default: %(default)s)")
    parser.add_argument("--capability", default="7.5", help="of the GPU to tell of (default: %(default)s, a T4's)")
    parser.add_argument("--seeds", type=int, default=3, help="to train with (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="to train for (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    arguments = parser.parse_args()
    try:
        header, rows = SECTIONS[arguments.section](arguments)
    except VocabularyError as error:
        sys.exit(f"bench.py: {error}")
    show(header, rows, arguments.markdown)


if __name__ == "__main__":
    main()

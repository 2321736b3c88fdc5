"""
How fast this code is, next to its peers.

    python bench.py tokenizer                 # a table
    python bench.py tokenizer --markdown      # the same for a README
    python bench.py prepare                   # from Parquet to bins
    python bench.py t4                        # the INT8 linears; what a GPU of --capability 7.5 will choose
    python bench.py qat                       # what quantization-aware training buys, by training it
    python bench.py train                     # a training step, next to the plain transformers loop
    python bench.py prefill                   # reading a prompt, next to transformers and (make compat) llama.cpp
    python bench.py decode                    # writing tokens, next to the same
    python bench.py start                     # from a command to its first step and its first token; the batches

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
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

import backend
import checkpoint
import decode
import export
import prepare
import quant_t4
import sample
import tokenizer
import train
from config import BadInput, Source, load, script
from data import Batches, read_meta
from model import Llama, takes_grouped_heads
from vocabulary import COMPILED

CONFIGS = Path(__file__).with_name("config")
DOCUMENT = 5000  # characters


def named(name):
    """The config of this name in config/, whatever the folder."""
    return load([str(CONFIGS / f"{name}.py")])


def alternate(runs, rounds, settle=False):
    """Time functions in turns, after one run of each to warm up.

    runs    {name: function without arguments}
    settle  run each once more before it is timed, so that it finds caches and heap as it left them, not its neighbour
    -> {name: median seconds}
    """
    seconds = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            if settle:
                run()
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
            config = named(name)
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
    linears, rows = named("stentor2_12m").int8_linears, []
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


# -----------------------------------------------------------------------------
# train

def machine():
    """The machine in words: its cores and what its vector unit can do."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    has = " ".join(flag for flag in known if flag in flags)
    return f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, {has or 'CPU'}"


def wait():
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_rate(dtype, device):
    """FLOP/s of one matrix product of the size that training has, the best of 20."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def theirs(config):
    """transformers' Llama of the same shape, random weights. Raises BadInput where transformers is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise BadInput("what this is measured against is transformers: pip install -r requirements-export.txt "
                       "(make test does)") from None
    return LlamaForCausalLM(LlamaConfig(**export.llama_config(config, 0, "float32")))


def training_step(model, loss, device, dtype):
    """A function that trains for one step of loss(), as both loops do it: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()

    return step


def bench_train(arguments):
    """Training tokens/s of a config's shape: this model and transformers', eager and compiled."""
    config, rows = named(arguments.config).model, []
    device = backend.pick(tpu=False)
    uniform = replace(config, fp32_blocks=())  # as transformers computes: autocast in every block
    for B, T in arguments.shapes:
        ids, targets = (torch.randint(config.vocab_size, (B, T), device=device.device) for _ in range(2))
        steps, first, dtypes = {}, {}, {"FP32": torch.float32, "BF16": torch.bfloat16}
        for precision, dtype in dtypes.items():
            model, peer = Llama(config).to(device.device), theirs(config).to(device.device)
            compiled, alike = (torch.compile(Llama(shape).to(device.device)) for shape in (config, uniform))
            losses = {f"transformers, {precision}": (peer, lambda m=peer: m(input_ids=ids, labels=targets).loss),
                      f"eager, {precision}": (model, lambda m=model: m(ids, targets)[1]),
                      f"compiled, {precision}": (compiled, lambda m=compiled: m(ids, targets)[1])}
            if precision == "BF16":
                losses["compiled, no FP32 blocks, BF16"] = (alike, lambda m=alike: m(ids, targets)[1])
            for name, (trained, loss) in losses.items():
                steps[name] = training_step(trained, loss, device.device, dtype)
                start = time.perf_counter()
                steps[name]()
                first[name] = time.perf_counter() - start
        seconds = alternate(steps, arguments.rounds)
        flops = B * T * Llama(config).flops_per_token(T)
        rates = {name: gemm_rate(dtype, device.device) for name, dtype in dtypes.items()}
        for name, time_ in seconds.items():
            precision = name.split()[-1]
            rows.append((f"{B} x {T:,}", name, f"{B * T / time_:,.0f}",
                         f"{seconds[f'transformers, {precision}'] / time_:.2f}",
                         f"{seconds['transformers, FP32'] / time_:.2f}", f"{flops / time_ / rates[precision]:.0%}",
                         f"{first[name]:.0f} s"))
    print(f"{arguments.config}'s shape, {machine()}, torch {torch.__version__}, medians of {arguments.rounds}; BF16 is "
          f"autocast, of ours with the FP32 blocks and norms\n")
    return ("batch", "what", "tokens/s", "x transformers, same precision", "x transformers, FP32",
            "of the GEMM rate", "first step"), rows


# -----------------------------------------------------------------------------
# prefill and decode

KINDS = {"fp32": "float32", "bf16": "bfloat16", "int8": "q8_0"}  # llama.cpp's name for the same type


def narrowed(plain, dtype, device, **more):
    """A copy of a model with weights of this type."""
    return decode.narrow(deepcopy(plain).to(device), dtype, **more)


def next_to_peers(seconds, name, texts=1):
    """The precision in a run's name; its speed next to transformers in FP32, which writes one text, and to llama.cpp in
    the same type, which may not be there. All three as words."""
    precision = name.split(", ")[1].split()[0]
    speeds = [f"{texts * seconds[peer] / seconds[name]:.2f}" if peer in seconds else ""
              for peer in ("transformers, FP32", f"llama.cpp, {precision}")]
    return precision, *speeds


def reading_time(megabytes):
    """Seconds to read so many MB of memory once: their sum, the median of 30."""
    numbers = torch.ones(int(megabytes * 1e6 / 4))
    return alternate({"": numbers.sum}, 30)[""]


def llama_cpp(folder, model, kind):
    """A function that has llama.cpp take `count` tokens one after the other, after a prompt; None where it is not
    installed. Choosing tokens is left out."""
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        return None
    import llama_cpp
    from export_gguf import write_gguf
    write_gguf(folder, model, "bench", tokenizer.load("quickstart-2048", "portable"), kind)
    path = max(folder.glob("*.gguf"), key=lambda path: path.stat().st_mtime)
    engine = llama_cpp.Llama(str(path), n_ctx=model.config.max_position_embeddings, verbose=False,
                             n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads())

    def run(prompt, count):
        engine.reset()
        engine.eval(prompt)
        for token in range(count):
            engine.eval([token])

    return run


@torch.no_grad()
def bench_prefill(arguments):
    """Tokens/s of reading a prompt of half the context, up to the logits that follow it."""
    config = named(arguments.config).model
    device = backend.pick(dtype="float32", tpu=False).device
    length, plain = config.max_position_embeddings // 2, Llama(config).eval()
    prompt = torch.randint(config.vocab_size, (length,)).tolist()
    ids, peer = torch.tensor([prompt], device=device), theirs(config).to(device).eval()

    def reading(model):
        return lambda: sample.Reader(model).read([prompt])

    runs = {"transformers, FP32": lambda: peer.lm_head(peer.model(ids, use_cache=True)[0][:, -1:])}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, kind in KINDS.items():
            runs[f"ours, {dtype.upper()}"] = reading(narrowed(plain, dtype, device))
            if dtype == "int8" and device.type == "cpu":
                runs["ours, INT8 inputs too"] = reading(narrowed(plain, dtype, device, round_inputs=True))
            engine = llama_cpp(Path(folder), plain, kind)
            if engine:
                runs[f"llama.cpp, {dtype.upper()}"] = lambda engine=engine: engine(prompt, 0)
        seconds = alternate(runs, arguments.rounds, settle=True)
    flops = length * plain.flops_per_token(length) / 3  # the forward pass is a third of a training step
    rates = {"FP32": gemm_rate(torch.float32, device), "BF16": gemm_rate(torch.bfloat16, device)}
    rows = []
    for name, time_ in seconds.items():
        precision, *speeds = next_to_peers(seconds, name)
        rows.append((name, f"{length / time_:,.0f}", *speeds,
                     f"{flops / time_ / rates[precision]:.0%}" if precision in rates else ""))
    print(f"{arguments.config}'s shape, random weights, {machine()}, torch {torch.__version__}; {length:,} tokens, "
          f"medians of {arguments.rounds}\n")
    return ("what", "tokens/s", "x transformers, FP32", "x llama.cpp, same type", "of the GEMM rate"), rows


def bench_decode(arguments):
    """Tokens/s of greedy texts of 256 tokens after 32, one and several at once."""
    config = named(arguments.config).model
    prompt, at_once = torch.randint(config.vocab_size, (32,)).tolist(), f"{arguments.samples} at once"
    count = min(256, config.max_position_embeddings - len(prompt))
    torch.manual_seed(0)
    plain = Llama(config).eval()
    plain.lm_head.weight.data *= 12  # logits as far apart as a trained model's, which filters take less time for

    def text(model, samples=1, **settings):
        return lambda: list(sample.generate_batch(model, prompt, samples, count, **settings))

    device = backend.pick(dtype="float32", tpu=False).device
    peer = theirs(config).to(device).eval()
    ids = torch.tensor([prompt], device=device)
    runs = {"transformers, FP32": lambda: peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                                        min_new_tokens=count, max_new_tokens=count, pad_token_id=0)}
    first = {}  # seconds of compiling
    with tempfile.TemporaryDirectory() as folder:
        for dtype, kind in KINDS.items():
            name = dtype.upper()
            model = narrowed(plain, dtype, device)
            runs[f"eager, {name}"] = text(model)
            runs[f"eager, {name}, {at_once}"] = text(model, arguments.samples)
            for samples, label in ((1, f"compiled, {name}"), (arguments.samples, f"compiled, {name}, {at_once}")):
                start = time.perf_counter()
                compiled, reason = decode.compile(model, samples)
                if reason:
                    sys.exit(f"bench.py: torch.compile failed: {reason}")
                first[label] = time.perf_counter() - start
                runs[label] = text(compiled, samples)
                if samples == 1:
                    runs[f"{label}, with filters"] = text(compiled, temperature=0.8, top_p=0.9, repetition_penalty=1.1)
            if dtype == "int8" and device.type == "cpu":
                dynamic = narrowed(plain, dtype, device, round_inputs=True)
                runs["eager, INT8 inputs too"] = text(dynamic)
                runs[f"eager, INT8 inputs too, {at_once}"] = text(dynamic, arguments.samples)
            engine = llama_cpp(Path(folder), plain, kind)
            if engine:
                runs[f"llama.cpp, {name}"] = lambda engine=engine: engine(prompt, count)
        seconds = alternate(runs, arguments.rounds, settle=True)
    weights = sum(m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Linear)) / 1e6
    limits = {dtype.upper(): reading_time(weights * decode.DTYPES[dtype].itemsize) for dtype in KINDS}
    rows = []
    for name, time_ in seconds.items():
        samples = arguments.samples if name.endswith(at_once) else 1
        single = seconds[name.removesuffix(f", {at_once}")] / time_ * samples
        precision, *speeds = next_to_peers(seconds, name, samples)
        rows.append((name, f"{samples * count / time_:,.0f}", *speeds,
                     f"{single:.1f}" if samples > 1 else "",
                     f"{limits[precision] * count / time_:.0%}" if samples == 1 else "",
                     f"{first[name]:.0f} s" if name in first else ""))
    print(f"{arguments.config}'s shape, random weights, {machine()}, torch {torch.__version__}; {count} greedy tokens "
          f"after {len(prompt)}, reading these included, medians of {arguments.rounds}\n")
    return ("what", "tokens/s", "x transformers, FP32", "x llama.cpp, same type", "x one at a time",
            "of the reading speed", "compiled in"), rows


# -----------------------------------------------------------------------------
# start

def until(command, sign, folder):
    """Seconds from starting a command in a folder until it prints a line with this sign; then it is asked to stop."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    for line in process.stdout:
        if sign in line:
            break
    else:
        sys.exit(f"bench.py: {' '.join(command)} ended without {sign!r}")
    seconds = time.perf_counter() - start
    process.terminate()
    process.communicate()
    return seconds


def bench_start(arguments):
    """Seconds from a command to what its user waits for, next to what importing torch takes; and the data's share."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        config = load([])
        read_meta(config)
        training = [str(here / "train.py"), f"--data_dir={config.data_dir.resolve()}", "--overwrite",
                    "--log_interval=1"]
        commands = {"import torch": (["-c", "import torch; print('done')"], "done"),
                    "train.py, first step": (training, "step      1/"),
                    "sample.py, first token": ([str(here / "sample.py"), "--max_new_tokens=1"], " tokens, ")}
        runs = {name: lambda command=command: until(*command, folder) for name, command in commands.items()}
        seconds = alternate(runs, arguments.rounds)
        rows = [(name, f"{time_:.2f} s", f"{time_ / seconds['import torch']:.1f} x importing torch")
                for name, time_ in seconds.items()]
    batches = Batches(config, "train")
    numbers = iter(range(10**6))
    tokens = config.tokens_per_step / alternate({"": lambda: batches[next(numbers) % 1000]}, 100)[""]
    rows.append(("batches of the quickstart", f"{tokens:,.0f} tokens/s", "one thread; a training step takes the rest"))
    print(f"{machine()}, medians of {arguments.rounds}\n")
    return ("what", "time or speed", "next to"), rows


def pair(text):
    """B x T of a command line, "8x256", as two numbers."""
    B, T = text.split("x")
    return int(B), int(T)


SECTIONS = {"tokenizer": bench_tokenizer, "prepare": bench_prepare, "t4": bench_t4, "qat": bench_qat,
            "train": bench_train, "prefill": bench_prefill, "decode": bench_decode, "start": bench_start}


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--vocab", default="quickstart-2048", help="name or path (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=200, help="of each kind (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=300, help="of text to prepare (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="through the linears (default: %(default)s)")
    parser.add_argument("--capability", default="7.5", help="of the GPU to tell of (default: %(default)s, a T4's)")
    parser.add_argument("--seeds", type=int, default=3, help="to train with (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="to train for (default: %(default)s)")
    parser.add_argument("--config", default="stentor3_20m", help="whose shape to train and run (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="texts to write at once (default: %(default)s)")
    parser.add_argument("--shapes", type=pair, nargs="+", default=[(8, 256), (2, 1024)],
                        help="of the batches to train on (default: 8x256 2x1024)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    arguments = parser.parse_args(argv)
    header, rows = SECTIONS[arguments.section](arguments)
    show(header, rows, arguments.markdown)


if __name__ == "__main__":
    script(main)

"""Train: python train.py [config/NAME.py] [--field=value ...]

One loop, read from the top to the bottom of `main`. A run stops by itself, at --max_minutes, on Ctrl-C or on SIGTERM,
always with a checkpoint, and `--resume` goes on from it as if it had not stopped: on one CPU, bit for bit.
"""

import importlib
import io
import json
import math
import shutil
import signal
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

import backend
import checkpoint
import quant_t4
import tokenizer
from config import BadInput, Config, Source, brief, load, script
from data import Batches, read_meta
from model import Llama, ModelConfig
from vocabulary import Tokenizer


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of optimizer step 1, 2, ... max_steps.

    A linear warmup to the peak; then either half a cosine, to 0 at max_steps (Stentor3 card, Learning Rate Schedule;
    Loshchilov & Hutter 2017), or the peak until the decay, and a line to 0 just after max_steps ("wsd", Hu et al.
    2024, MiniCPM). Steps count from 1, so the first has a rate; and the last, whose cosine would be 0, has that of half
    a step earlier: no step is computed for nothing.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "cosine":
        length = config.max_steps - config.warmup_steps
        progress = min(step - config.warmup_steps, length - 0.5) / length
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = max(1, round(config.decay_fraction * config.max_steps))
    return config.learning_rate * min(1.0, (config.max_steps + 1 - step) / (decay_steps + 1))


@torch.no_grad()
def evaluate(model, held_out: dict[str, Batches], device: backend.Backend) -> dict[str, float]:
    """Mean loss of each source's held-out blocks, in nats per token, summed in float64 over tokens.

    Of several processes each takes every world_size-th batch.
    """
    losses = {}
    for name, batches in held_out.items():
        total, count = 0.0, 0
        for step in range(device.rank, len(batches), device.world_size):
            input_ids, targets = batches[step]
            tokens = int((targets != -100).sum())
            with device.autocast():
                _, loss = model(device.put(input_ids), device.put(targets))
            total += loss.item() * tokens
            count += tokens
        total, count = device.total(total, count)
        losses[name] = total / count
    return losses


def mixed(losses: dict[str, float], sources: dict[str, Source], meta: dict) -> dict[str, float]:
    """Losses by source as the figures of one held-out text in which the sources are mixed by their ratios.

    loss is in nats per token; bits_per_byte divides its bits by the bytes of the decoded text (from meta.json), and
    so, unlike loss and perplexity, can be compared between vocabularies.
    """
    loss, bytes_per_token = 0.0, 0.0
    for name, source in sources.items():
        counts = meta["sources"][name]["val"]
        loss += source.ratio * losses[name]
        bytes_per_token += source.ratio * counts["bytes"] / counts["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) / bytes_per_token}


def fit(config: Config, longest: int, step: int, seconds: float) -> Config:
    """The config with max_steps set so that the run will take about train_minutes, at `longest` steps at the most.

    `seconds` is what the first `step` steps took, evaluations included. Until its decay begins a wsd run is the same
    however long it will be, so the clock may still decide; so is the order of its data, until the anneal.
    """
    left = 60 * config.train_minutes - seconds
    return replace(config, max_steps=min(longest, step + max(1, int(left / (seconds / step)))))


def draw_curves(metrics: list[dict], path: Path):
    """Training loss, held-out loss and perplexity over steps, as on the Stentor cards."""
    from matplotlib.figure import Figure  # half a second to import, so only here

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, perplexities = figure.subplots(1, 2)
    train = [m for m in metrics if "train_loss" in m]
    val = [m for m in metrics if "val_loss" in m]
    losses.plot([m["step"] for m in train], [m["train_loss"] for m in train], label="training", color="C0", alpha=0.5)
    losses.plot([m["step"] for m in val], [m["val_loss"] for m in val], label="held out", color="C1", marker=".")
    losses.set(title="Loss", xlabel="step", ylabel="nats per token")
    losses.legend()
    perplexities.plot([m["step"] for m in val], [m["val_perplexity"] for m in val], color="C1", marker=".")
    perplexities.set(title="Held-out perplexity", xlabel="step", yscale="log")
    for axes in (losses, perplexities):
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    checkpoint.replace(path, image.getvalue())


def as_json(config: Config) -> dict:
    """The config as the JSON that is saved: paths as strings, tuples as lists."""
    return json.loads(json.dumps(asdict(config), default=str))


def read_metrics(path: Path, last_step: int) -> list[dict]:
    """The lines of metrics.jsonl up to a step. A line that a killed run left unfinished is past that step."""
    metrics = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return [m for m in metrics if m["step"] <= last_step]


def earlier_checkpoint(config: Config) -> Path | None:
    """The checkpoint to resume from, or None to start at step 0. Raises BadInput where a run would be lost."""
    if not (config.out_dir / "latest").exists():
        return None
    if config.resume:
        step_dir = checkpoint.find(config.out_dir)
        if "imported_from" in checkpoint.read_state(step_dir):
            raise BadInput(f"{config.out_dir} was imported, and has nothing to resume; begin another run with it: "
                           f"--init_from {config.out_dir} --name another")
        return step_dir
    if config.overwrite:
        return None
    raise BadInput(f"{config.out_dir} holds a run already: add --resume to go on with it, --name another to keep it, "
                   f"or --overwrite to delete it")


def shaped_like(config: Config, step_dir: Path, vocabulary: Tokenizer) -> Config:
    """The config with the shape of the model of a checkpoint to begin with (--init_from).

    What is no shape (FP32 blocks, how weights would have been drawn) stays the config's. Raises BadInput where that was
    trained with another vocabulary, or its context is shorter than a block.
    """
    state = checkpoint.read_state(step_dir)
    if state.get("tokenizer_sha256") != vocabulary.sha256:
        raise BadInput(f"{step_dir} was trained with another vocabulary than {vocabulary.name}: prepare the data with "
                       f"its own (--tokenizer, and another --data_dir), and train with that")
    try:
        theirs = asdict(ModelConfig(**state["config"]["model"]))
        ours = ("initializer_range", "scale_residual_init", "fp32_norms", "fp32_blocks")
        return replace(config, model=replace(config.model, **{k: v for k, v in theirs.items() if k not in ours}))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"cannot begin with {step_dir}: {error}") from error


def open_run(config: Config, last_step: int) -> list[dict]:
    """Make the run's directory ready to go on after a step; return what metrics.jsonl holds up to there."""
    config.out_dir.mkdir(parents=True, exist_ok=True)
    stale = list(config.out_dir.glob(".*.tmp"))  # left by a run that was killed while it saved
    if last_step == 0:
        stale += [config.out_dir / name for name in ("latest", "best", "benchmarks")]
        stale += config.out_dir.glob("step_*")
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    metrics_path = config.out_dir / "metrics.jsonl"
    metrics = read_metrics(metrics_path, last_step)
    checkpoint.replace(metrics_path, "".join(json.dumps(m) + "\n" for m in metrics).encode())
    checkpoint.replace(config.out_dir / "config.json", json.dumps(as_json(config), indent=2).encode())
    return metrics


def open_tracker(config: Config):
    """A run of wandb or of trackio, which share the calls that we need, or None. Raises BadInput where it cannot be."""
    if config.tracker == "none":
        return None
    try:
        library = importlib.import_module(config.tracker)
        return library.init(project="nanostentor", name=config.name, config=as_json(config), resume="allow")
    except ImportError as error:
        raise BadInput(f"--tracker {config.tracker} needs {error.name}: pip install {config.tracker}") from error
    except Exception as error:  # no account, no network: its own words
        raise BadInput(f"--tracker {config.tracker}: {brief(error)}") from error


def choose_product(config: Config, model: Llama, tokens: int, device: backend.Backend,
                   earlier: str | None) -> tuple[str, str]:
    """How this run's INT8 linears multiply, "integers" or "fake", and why so.

    A run that was resumed goes on as it began (`earlier`) if it can: the two agree to rounding, not to the bit. Raises
    BadInput where integers are asked for and the device has no product of them.
    """
    asked, why = ((config.int8_product, "as --int8_product says") if config.int8_product != "auto" else
                  (earlier, "as the run began"))
    if asked == "fake":
        return asked, why
    seconds = {"fake": 0.0, "integers": math.inf}
    if device.multiplies_integers:
        seconds = {product: device.agreed(time)
                   for product, time in quant_t4.time_products(model, tokens, device.autocast).items()}
    if seconds["integers"] == math.inf:
        if config.int8_product == "integers":
            raise BadInput("--int8_product integers: this device does not multiply integers of this shape; use fake")
        return "fake", "the device does not multiply integers of this shape"
    if asked:
        return asked, why
    measured = ", ".join(f"{product} {1000 * time:.2f} ms a block" for product, time in seconds.items())
    return min(seconds, key=seconds.get), measured


def announce(config: Config, model: Llama, recipe: str, batches: Batches, device: backend.Backend, compiled: bool,
             resumed: dict | None):
    """Print what is about to run, and as what factors, so that a wrong run is seen before its first step."""
    c = config.model
    devices = device.world_size * device.chips
    sequences = len(batches.mine) // device.chips  # of a device
    micro_batches = math.ceil(sequences / config.micro_batch_size)
    sources = []
    for number, (name, source) in enumerate(config.sources.items()):
        epochs = (batches.order == number).sum() / max(1, batches.bins[number].blocks)
        sources.append(f"{name} {source.ratio:.0%} (anneal {source.anneal_ratio:.0%}, {epochs:.2f} epochs)")
    print(f"model    {model.num_parameters():,} parameters: {c.num_hidden_layers} layers of {c.hidden_size}, "
          f"{c.num_attention_heads} heads, {c.num_key_value_heads} key/value heads, vocabulary {c.vocab_size:,}")
    print(f"recipe   {recipe}")
    print(f"step     {config.tokens_per_step:,} tokens = {devices} device{'s' * (devices > 1)} x {sequences} sequences "
          f"x {config.block_size} tokens, in {micro_batches} micro-batch{'es' * (micro_batches > 1)}")
    print(f"run      {'up to ' if config.train_minutes else ''}{config.max_steps:,} steps, "
          f"{config.max_steps * config.tokens_per_step:,} tokens; "
          f"{config.schedule} to {config.learning_rate:g} after {config.warmup_steps:,} steps of warmup")
    print(f"data     {config.data_dir}: {', '.join(sources)}")
    print(f"device   {device.name}, {str(device.dtype).removeprefix('torch.')} products, "
          f"{'compiled' if compiled else 'eager'}; to {config.out_dir}")
    if device.idle_gpus:
        print(f"         {device.idle_gpus} more here is idle; to use all: "
              f"torchrun --standalone --nproc_per_node={device.idle_gpus + 1} train.py ...")
    if resumed:
        before, now = resumed["config"], as_json(config)
        ours = [name for name in now if name not in ("resume", "overwrite", "max_minutes")]
        changed = [f"{name} {before.get(name)} -> {now[name]}" for name in ours if before.get(name) != now[name]]
        print(f"resumed  at step {resumed['step']:,}" + (f", with changes: {'; '.join(changed)}" if changed else ""))
    print(end="", flush=True)


@backend.one_of_several
def main(argv: list[str]):
    started = time.monotonic()
    config = load(argv)
    meta = read_meta(config)
    vocabulary = tokenizer.load(config.tokenizer, config.tokenizer_segmentation)
    if vocabulary.sha256 != meta["recipe"]["tokenizer"]["sha256"]:
        raise BadInput(f"{config.data_dir} was prepared with another vocabulary than {vocabulary.name}; "
                       f"give --tokenizer and --tokenizer_segmentation as there")
    device = backend.pick(config.backend, config.dtype)
    resumed = earlier_checkpoint(config)
    beginning = checkpoint.find(config.init_from, "best") if config.init_from and not resumed else None
    if config.init_from:
        config = shaped_like(config, resumed or beginning, vocabulary)
    if beginning and config.out_dir.resolve() in beginning.resolve().parents:
        raise BadInput(f"{beginning} would be deleted by the run that begins with it; choose another --name")

    # The model and the optimizer
    torch.manual_seed(config.seed)
    model = Llama(config.model).to(device.device)
    try:
        counts = quant_t4.apply_t4_recipe(model, config.int8_linears)
    except ValueError as error:
        raise BadInput(f"int8_linears: {error}") from error
    model.run_with(device.attention(config.attention), device.recompute(config.recompute))
    groups = model.parameter_groups(config.weight_decay)
    optimizer = device.adamw(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    scaler = device.scaler()

    # Where to start
    state = {"step": 0, "seconds": 0.0, "best_loss": math.inf, "int8_product": None}
    longest = config.max_steps
    if beginning:
        checkpoint.load(beginning, model)
    if resumed:
        state |= checkpoint.load(resumed, model, optimizer)
        if state.get("scaler") and scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        if config.train_minutes:
            config = replace(config, max_steps=state["config"]["max_steps"])
    best_loss, earlier_seconds = state["best_loss"], state["seconds"]

    # The data: what a step reads depends on the step alone. A resumed run keeps to the tokens that were there when it
    # began, unless it has been made longer: more of them would shuffle into another order.
    tokens = {name: meta["sources"][name]["train"]["tokens"] for name in config.sources}
    if resumed and state["config"]["max_steps"] == config.max_steps:
        tokens = state.get("train_tokens", tokens)
    training_batches = partial(Batches, split="train", rank=device.rank, world_size=device.world_size,
                               chips=device.chips, first=tokens)
    batches = training_batches(config)
    held_out = {name: Batches(config, "val", name, chips=device.chips) for name in config.sources}
    at_once = config.micro_batch_size * device.chips  # sequences in a forward pass of this process

    recipe = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if counts["INT8 linears"]:
        product, why = choose_product(config, model, min(at_once, len(batches.mine)) * config.block_size, device,
                                      state["int8_product"])
        quant_t4.use_integers(model, product == "integers")
        state["int8_product"] = product
        recipe += f"; INT8 product: {product} ({why})"

    step_model = model
    if config.compile:  # tried on batches of the loop's own shapes
        step_model = device.compile(model, [tensor[:at_once] for tensor in batches[0]],
                                    next(iter(held_out.values()))[0])
    compiled = step_model is not model or device.compiles_steps
    parallel_model = device.parallel(step_model, optimizer)

    # From here on all processes are together, and rank 0 alone writes.
    announce(config, model, recipe, batches, device, compiled, resumed=state if resumed else None)
    tracker = open_tracker(config) if device.rank == 0 else None
    metrics = open_run(config, state["step"]) if device.rank == 0 else []

    def log(entry: dict):
        nonlocal tracker
        if device.rank == 0:
            metrics.append(entry)
            with (config.out_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        try:
            if tracker:
                tracker.log(entry, step=entry["step"])
        except Exception as error:  # its server, its network: no reason to end a run
            print(f"--tracker {config.tracker} has failed, and is left out from here on: {error}", flush=True)
            tracker = None

    # Ctrl-C and SIGTERM ask for a stop, and the loop answers between two steps. A second Ctrl-C does not wait; but one
    # process of several does not leave the others in the middle of a step.
    asked = []

    def ask(number, frame):
        asked.append(number)
        if device.world_size == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)

    flops_per_token = model.flops_per_token(config.block_size)
    step, logged_step, logged_time = state["step"], state["step"], time.monotonic()
    stopping = None
    device.end_step()
    while step < config.max_steps and not stopping:
        # One optimizer step
        rate = learning_rate(step + 1, config)
        for group in optimizer.param_groups:
            group["lr"] = device.number(rate)
        input_ids, targets = batches[step]
        step_loss = 0.0
        for start in range(0, len(input_ids), at_once):
            micro_batch = slice(start, start + at_once)
            inputs, labels = device.put(input_ids[micro_batch]), device.put(targets[micro_batch])
            with device.accumulating(parallel_model, last=micro_batch.stop >= len(input_ids)):
                with device.autocast():
                    loss = parallel_model(inputs, labels)[1]
                loss = loss * (len(inputs) / len(input_ids))  # the mean over the step, not over the micro-batch
                scaler.scale(loss).backward()
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        device.end_step()
        step += 1

        # Is it time to stop, to tell, to evaluate?
        if asked:
            stopping = signal.Signals(asked[0]).name
        elif config.max_minutes and time.monotonic() - started > 60 * config.max_minutes:
            stopping = f"--max_minutes {config.max_minutes:g}"
        if device.agreed(bool(stopping)):
            stopping = stopping or "another process"
        last = step == config.max_steps
        evaluating = step % config.eval_interval == 0 or last
        if step % config.log_interval == 0 or evaluating or stopping:
            train_loss, norm = device.mean(step_loss), float(grad_norm)  # waits for the device
            if not math.isfinite(train_loss) or not math.isfinite(norm) and not scaler.is_enabled():
                print(f"error: the loss or its gradient is not finite at step {step} (loss {train_loss}, gradient norm "
                      f"{norm}); the checkpoints before it are kept. Try a smaller --learning_rate.", flush=True)
                return 1
            now = time.monotonic()
            tokens_per_second = (step - logged_step) * config.tokens_per_step / (now - logged_time)
            logged_step, logged_time = step, now
            entry = {"step": step, "tokens": step * config.tokens_per_step, "train_loss": train_loss,
                     "grad_norm": norm if math.isfinite(norm) else None, "learning_rate": rate,
                     "tokens_per_second": round(tokens_per_second)}
            line = (f"step {step:6,}/{config.max_steps:,}  loss {train_loss:.4f}  grad {norm:.2f}  "
                    f"lr {rate:.2e}  {tokens_per_second:,.0f} tok/s")
            if scaler.is_enabled():  # a step whose gradients were too large for FP16 is none to the optimizer
                skipped = step - int(next(iter(optimizer.state.values()))["step"])
                entry |= {"skipped_steps": skipped, "loss_scale": scaler.get_scale()}
                line += f"  skipped {skipped}"
            if device.peak_flops:
                entry["mfu"] = tokens_per_second * flops_per_token / device.peak_flops
                line += f"  mfu {entry['mfu']:.1%}"
            print(line, flush=True)
            log(entry)
        if not (evaluating or stopping):
            continue
        if evaluating:
            losses = evaluate(step_model, held_out, device)
            val = mixed(losses, config.sources, meta)
            state |= {"val_loss": val["loss"], "bits_per_byte": val["bits_per_byte"]}
            log({"step": step, **{f"val_{key}": value for key, value in val.items()},
                 **{f"val_loss_{name}": loss for name, loss in losses.items()}})
            print(f"held out at step {step:,}: loss {val['loss']:.4f}, perplexity {val['perplexity']:.2f}, "
                  f"{val['bits_per_byte']:.4f} bits per byte  ("
                  + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()) + ")", flush=True)
        seconds = device.agreed(earlier_seconds + time.monotonic() - started)
        if config.train_minutes and step < (1 - config.decay_fraction) * config.max_steps:
            config = fit(config, longest, step, seconds)
            batches = training_batches(config)
            print(f"at this pace {config.max_steps:,} steps fit into {config.train_minutes:g} minutes", flush=True)
        best = evaluating and val["loss"] < best_loss
        best_loss = val["loss"] if best else best_loss
        state |= {"step": step, "seconds": seconds, "best_loss": best_loss, "config": as_json(config),
                  "tokenizer_sha256": vocabulary.sha256, "scaler": scaler.state_dict(),
                  "train_tokens": tokens}
        if device.rank == 0:
            checkpoint.save(config.out_dir, model, optimizer, state, best, config.keep_checkpoints)
        logged_time = time.monotonic()  # the speed is that of training alone

    if device.rank == 0:
        draw_curves(metrics, config.out_dir / "curves.png")
    if tracker:
        tracker.finish()
    minutes = (time.monotonic() - started) / 60
    if stopping and step < config.max_steps:
        print(f"stopped by {stopping} at step {step:,} of {config.max_steps:,} after {minutes:.1f} minutes, and saved; "
              f"go on with the same command and --resume")
    else:
        print(f"trained {step:,} steps in {minutes:.1f} minutes: best held-out loss {best_loss:.4f}; "
              f"{config.out_dir}/curves.png shows the curves")
    return 0


if __name__ == "__main__":
    script(main)

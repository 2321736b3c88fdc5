"""Train: python train.py [config/NAME.py] [--field=value ...]

It is one loop; read `train` from top to bottom. A run stops when it is done, at --max_minutes, on Ctrl-C or SIGTERM,
and when its terminal goes away. It always saves a checkpoint, and `--resume` goes on from there as if it had never
stopped: on one CPU, bit for bit.
"""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch

import backend
import checkpoint
import quant_t4
from cli import STOP_SIGNALS, BadInput, StopRequest, brief, script
from config import Config, load
from data import Batches, read_meta
from model import Llama
from run import (
    Journal,
    alone,
    as_json,
    changes,
    check_memory,
    held_out_losses,
    mixed,
    starting_point,
    tokenizer_of,
)


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of optimizer step 1, 2, ... max_steps.

    It rises in a line to the peak (warmup). Then it either follows half a cosine to 0 at max_steps (Stentor3 card,
    Learning Rate Schedule; Loshchilov & Hutter 2017), or stays at the peak until the decay, which is a line to 0 just
    after max_steps ("wsd", Hu et al. 2024, MiniCPM). Steps count from 1, so the first one has a rate. The last step of
    a cosine would have a rate of 0 and be wasted, so it takes the rate of half a step earlier.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "cosine":
        length = config.max_steps - config.warmup_steps
        progress = min(step - config.warmup_steps, length - 0.5) / length
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = max(1, round(config.decay_fraction * config.max_steps))
    return config.learning_rate * min(1.0, (config.max_steps + 1 - step) / (decay_steps + 1))


class Plan:
    """How many steps the run has, and what follows from that: each step's learning rate and data.

    With --train_minutes the clock decides. It can, because a wsd run is the same whatever its length until the decay
    begins, and so is the order of its data until the anneal.
    """

    def __init__(self, config: Config, meta: dict, state: dict, device: backend.Backend):
        """`state` is that of the resumed checkpoint, if there is one: {"config": ..., "train_tokens": ...}."""
        before, self.longest = state.get("config"), config.max_steps
        steps = before["max_steps"] if before and config.train_minutes else config.max_steps
        # A resumed run keeps to the tokens that were there when it began, unless it is longer now. prepare.py may have
        # added tokens since then, and with more of them the shuffle gives another order.
        self.tokens = {name: meta["sources"][name]["train"]["tokens"] for name in config.sources}
        if before and before["max_steps"] == steps:
            self.tokens = state.get("train_tokens", self.tokens)
        found = {name: meta["sources"][name].get("commit") for name in config.sources}  # None for what is no dataset
        self.commits = {name: commit for name, commit in found.items() if commit}
        self.device = device
        self.follow(replace(config, max_steps=steps))

    @property
    def max_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.config.max_steps

    def follow(self, config: Config):
        """Use this config, and the data of a run of its length, from here on."""
        self.config = config
        self.batches = Batches(config, "train", rank=self.device.rank, world_size=self.device.world_size,
                               chips=self.device.chips, first=self.tokens)

    def fit(self, step: int, seconds: float):
        """With --train_minutes, make the run about that long, unless its decay has begun.

        `seconds` is how long the first `step` steps took, evaluations included.
        """
        minutes = self.config.train_minutes
        if not minutes or step >= (1 - self.config.decay_fraction) * self.max_steps:
            return
        left = 60 * minutes - seconds
        steps = min(self.longest, step + max(1, int(left / (seconds / step))))
        self.follow(replace(self.config, max_steps=steps))
        print(f"at this pace {steps:,} steps fit into {minutes:g} minutes", flush=True)


def restore(model: Llama, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, resumed: Path | None,
            beginning: Path | None) -> dict:
    """Load the checkpoint that the run goes on from, if any. Returns the state that the next checkpoint will hold."""
    state = {"step": 0, "seconds": 0.0, "best_loss": math.inf, "int8_product": None}
    if beginning:
        checkpoint.load(beginning, model)
    if resumed:
        state |= checkpoint.load(resumed, model, optimizer)
        if state.get("scaler") and scaler.is_enabled():
            try:
                scaler.load_state_dict(state["scaler"])
            except (KeyError, TypeError, RuntimeError) as error:
                raise BadInput(f"{resumed / 'state.json'} is damaged: its scaler: {brief(error)}") from error
    return state


def announce(plan: Plan, model: Llama, recipe: str, compiled: bool, resumed: dict | None):
    """Print what is about to run, so that you see a wrong run before its first step."""
    config, device, c = plan.config, plan.device, plan.config.model
    devices = device.world_size * device.chips
    sequences = len(plan.batches.mine) // device.chips  # for each device
    micro_batches = math.ceil(sequences / config.micro_batch_size)
    sources = []
    for number, (name, source) in enumerate(config.sources.items()):
        epochs = (plan.batches.order == number).sum() / max(1, plan.batches.bins[number].blocks)
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
        print(f"         idle GPUs here: {device.idle_gpus}; to use all: "
              f"torchrun --standalone --nproc_per_node={device.idle_gpus + 1} train.py ...")
    if resumed:
        changed = changes(resumed["config"], config)
        print(f"resumed  at step {resumed['step']:,}" + (f", with changes: {'; '.join(changed)}" if changed else ""))
    print(end="", flush=True)


def why_stop(stop: StopRequest, config: Config, started: float, device: backend.Backend) -> str | None:
    """Why the run should stop, in words, or None. All processes of a run stop at the same step."""
    reason = None
    if stop.received:
        reason = stop.received[0].name
    elif config.max_minutes and time.monotonic() - started > 60 * config.max_minutes:
        reason = f"--max_minutes {config.max_minutes:g}"
    return (reason or "another process") if device.agreed(bool(reason)) else None


class Progress:
    """The lines about training itself: loss, gradient, rate and speed."""

    def __init__(self, plan: Plan, model: Llama, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                 step: int):
        self.plan, self.optimizer, self.scaler = plan, optimizer, scaler
        self.flops_per_token = model.flops_per_token(plan.config.block_size)
        self.step, self.time = step, time.monotonic()

    def entry(self, step: int, loss: float, norm: float, rate: float) -> dict:
        """The line of a step in metrics.jsonl."""
        config, now = self.plan.config, time.monotonic()
        speed = (step - self.step) * config.tokens_per_step / (now - self.time)
        self.step, self.time = step, now
        entry = {"step": step, "tokens": step * config.tokens_per_step, "train_loss": loss,
                 "grad_norm": norm if math.isfinite(norm) else None, "learning_rate": rate,
                 "tokens_per_second": round(speed)}
        if self.scaler.is_enabled():  # steps the optimizer skipped, since their gradients were too large for FP16
            taken = int(next(iter(self.optimizer.state.values()))["step"])
            entry |= {"skipped_steps": step - taken, "loss_scale": self.scaler.get_scale()}
        if peak := self.plan.device.peak_flops:
            entry["mfu"] = speed * self.flops_per_token / peak
        return entry

    def line(self, entry: dict, norm: float) -> str:
        """The same line for the terminal."""
        return (f"step {entry['step']:6,}/{self.plan.max_steps:,}  loss {entry['train_loss']:.4f}  grad {norm:.2f}  "
                f"lr {entry['learning_rate']:.2e}  {entry['tokens_per_second']:,} tok/s"
                + (f"  skipped {entry['skipped_steps']}" if "skipped_steps" in entry else "")
                + (f"  mfu {entry['mfu']:.1%}" if "mfu" in entry else ""))

    def held_out_line(self, step: int, val: dict[str, float], losses: dict[str, float]) -> str:
        """The line of an evaluation for the terminal: the mixture (`run.mixed`), and the loss of each source."""
        return (f"held out at step {step:,}: loss {val['loss']:.4f}, perplexity {val['perplexity']:.2f}, "
                f"{val['bits_per_byte']:.4f} bits per byte  ("
                + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()) + ")")

    def skip_pause(self):
        """Leave out the time since the last entry: the speed is that of training alone."""
        self.time = time.monotonic()


def train(asked: Config) -> int:
    # Set up. What are we asked to run, on which device, and which checkpoint do we go on from?
    started = time.monotonic()
    meta = read_meta(asked)
    vocabulary = tokenizer_of(asked, meta)
    device = backend.pick(asked.backend, asked.dtype)
    config, resumed, beginning = starting_point(asked, vocabulary)

    # Build the model and its optimizer, then load the checkpoint over them.
    check_memory(config, device)
    torch.manual_seed(config.seed)
    model = Llama(config.model).to(device.device)  # FP32 weights, drawn from the seed
    counts = quant_t4.apply_t4_recipe(model, config.int8_linears)  # no INT8 linears unless the config names some
    model.run_with(device.attention(config.attention), device.recompute(config.recompute))
    groups = model.parameter_groups(config.weight_decay)  # only the weights of Linears decay
    optimizer = device.adamw(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    scaler = device.scaler()  # FP16 needs its loss scaled; for other types this does nothing
    state = restore(model, optimizer, scaler, resumed, beginning)

    plan = Plan(config, meta, state, device)  # a step's data depends on the step alone: no stream position to restore
    held_out = {name: Batches(config, "val", name, chips=device.chips) for name in config.sources}
    at_once = config.micro_batch_size * device.chips  # sequences in a forward pass of this process

    # Which INT8 product is faster here, and does the model compile? I try both on what the loop will run.
    recipe = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if counts["INT8 linears"]:
        tokens = min(at_once, len(plan.batches.mine)) * config.block_size
        state["int8_product"], why = quant_t4.choose_product(config.int8_product, state["int8_product"], model, tokens,
                                                             device)
        recipe += f"; INT8 product: {state['int8_product']} ({why})"
    step_model = model
    if config.compile:
        step_model = device.compile(model, [t[:at_once] for t in plan.batches[0]], next(iter(held_out.values()))[0])
    compiled = step_model is not model or device.compiles_steps
    parallel_model = device.parallel(step_model, optimizer)

    stop = StopRequest(*STOP_SIGNALS, insistent=device.world_size == 1)
    announce(plan, model, recipe, compiled, resumed=state if resumed else None)
    journal = Journal(plan.config, state["step"]) if device.rank == 0 else None  # of all processes only rank 0 writes
    progress = Progress(plan, model, optimizer, scaler, state["step"])
    step, earlier_seconds, stopping = state["step"], state["seconds"], None
    device.end_step()

    while step < plan.max_steps and not stopping:
        # Take one optimizer step: add up the gradients of all micro-batches, clip them, and move the weights.
        rate = learning_rate(step + 1, plan.config)
        for group in optimizer.param_groups:
            group["lr"] = device.number(rate)
        input_ids, targets = plan.batches[step]
        step_loss = 0.0
        for start in range(0, len(input_ids), at_once):
            micro_batch = slice(start, start + at_once)  # the sequences of one forward and backward pass
            inputs, labels = device.put(input_ids[micro_batch]), device.put(targets[micro_batch])
            with device.accumulating(parallel_model, last=micro_batch.stop >= len(input_ids)):
                with device.autocast():
                    loss = parallel_model(inputs, labels)[1]
                loss = loss * (len(inputs) / len(input_ids))  # we want the mean over the step, not the micro-batch
                scaler.scale(loss).backward()  # adds to the gradients that are there
            step_loss += loss.detach()
        scaler.unscale_(optimizer)  # clipping needs the true gradients
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        scaler.step(optimizer)  # in FP16 it skips the step if a gradient overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        device.end_step()
        step += 1

        # Log every log_interval steps. Not more often: reading the loss makes us wait for the device.
        stopping = why_stop(stop, config, started, device)
        evaluating = step % config.eval_interval == 0 or step == plan.max_steps
        if step % config.log_interval == 0 or evaluating or stopping:
            train_loss, norm = device.mean(step_loss), float(grad_norm)
            if not math.isfinite(train_loss) or not math.isfinite(norm) and not scaler.is_enabled():
                print(f"error: the loss or its gradient is not finite at step {step} (loss {train_loss}, gradient norm "
                      f"{norm}); the checkpoints before it are kept. Try a smaller --learning_rate.", flush=True)
                return 1
            entry = progress.entry(step, train_loss, norm, rate)
            print(progress.line(entry, norm), flush=True)
            if journal:
                journal.log(entry)

        # Evaluate every eval_interval steps and at the end, then save. If we are asked to stop, save too.
        if evaluating:
            losses = held_out_losses(step_model, held_out, device)
            val = mixed(losses, config.sources, meta)
            state |= {"val_loss": val["loss"], "bits_per_byte": val["bits_per_byte"]}
            if journal:
                journal.log({"step": step, **{f"val_{key}": value for key, value in val.items()},
                             **{f"val_loss_{name}": loss for name, loss in losses.items()}})
            print(progress.held_out_line(step, val, losses), flush=True)
        if evaluating or stopping:
            seconds = device.agreed(earlier_seconds + time.monotonic() - started)
            plan.fit(step, seconds)
            best = evaluating and val["loss"] < state["best_loss"]
            state |= {"step": step, "seconds": seconds, "best_loss": val["loss"] if best else state["best_loss"],
                      "config": as_json(plan.config), "tokenizer_sha256": vocabulary.sha256, **vocabulary.delimiters,
                      "scaler": scaler.state_dict(), "train_tokens": plan.tokens, "commits": plan.commits}
            if device.rank == 0:
                checkpoint.save(config.out_dir, model, optimizer, state, best, config.keep_checkpoints)
            progress.skip_pause()

    # Finish. Draw the curves, and say what to do next.
    if journal:
        journal.close()
    minutes = (time.monotonic() - started) / 60
    if stopping and step < plan.max_steps:
        print(f"stopped by {stopping} at step {step:,} of {plan.max_steps:,} after {minutes:.1f} minutes, and saved; "
              f"go on with the same command and --resume")
    else:
        print(f"trained {step:,} steps in {minutes:.1f} minutes: best held-out loss {state['best_loss']:.4f}; "
              f"{config.out_dir}/curves.png shows the curves")
    return 0


@backend.one_of_several
def main(argv: list[str]) -> int:
    config = load(argv)
    with alone(config):
        return train(config)


if __name__ == "__main__":
    script(main)

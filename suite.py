"""The ten benchmarks of the Stentor cards, through lm-eval as it is: python eval.py --benchmarks

They run in blocks, as in the cards' script. Each block's result goes to a file when the block ends. A block that fails
does not stop the others, and running the command again runs only those that are missing. The tasks come from the hub.

    out/NAME/benchmarks/step_00001000/<block>.json            lm-eval's answer
    out/NAME/benchmarks/step_00001000/table.md, table.json    the cards' table: scores, their errors, Avg-over-random
                                                              (tasks.md, tasks.json for --tasks of your own)
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import backend
import checkpoint
from checkpoint import Trained
from cli import BadInput, brief
from formats.hf import weights, write_settings, write_tensors
from tokenizer import TokenMonster

# block: (its tasks, how many examples come before each question) (Stentor3 card, evaluation script)
SUITE = {
    "openbookqa_truthfulqa": (("openbookqa", "truthfulqa_mc2"), 0),
    "winogrande_commonsenseqa": (("winogrande", "commonsense_qa"), 0),
    "hellaswag": (("hellaswag",), 0),
    "arc": (("arc_easy", "arc_challenge"), 0),
    "mmlu": (("mmlu",), 0),
    "gsm8k_0shot": (("gsm8k",), 0),
    "gsm8k_5shot": (("gsm8k",), 5),
}

# For each task, the score that the card compares, and what guessing gets (its row "Random / Baseline"). TruthfulQA has
# no such floor, so the card takes the lowest score among its peers, DistilGPT2's. GSM8K's is 0: no guess is a number.
COLUMNS = {
    ("openbookqa", 0): ("acc_norm,none", 0.25), ("truthfulqa_mc2", 0): ("acc,none", 0.4447),
    ("winogrande", 0): ("acc,none", 0.5), ("commonsense_qa", 0): ("acc,none", 0.2),
    ("hellaswag", 0): ("acc_norm,none", 0.25), ("arc_easy", 0): ("acc_norm,none", 0.25),
    ("arc_challenge", 0): ("acc_norm,none", 0.25), ("mmlu", 0): ("acc,none", 0.25),
    ("gsm8k", 0): ("exact_match,flexible-extract", 0.0), ("gsm8k", 5): ("exact_match,flexible-extract", 0.0),
}


def average_over_random(scores: dict[tuple[str, int], float]) -> float | None:
    """The card's Avg-over-random: the mean of score - baseline over its ten columns. None if one is missing."""
    if not COLUMNS.keys() <= scores.keys():
        return None
    return sum(scores[column] - baseline for column, (_, baseline) in COLUMNS.items()) / len(COLUMNS)


def language_model(folder: Path, exact: bool, dtype: str, batch_size: int, device: torch.device) -> Any:
    """An exported folder as a model for lm-eval.

    TokenMonster may write the end of a question and the start of its answer as one token. Then lm-eval would see an
    answer without tokens, so I tokenize the two apart.
    """
    from lm_eval.models.huggingface import HFLM

    class TokenMonsterLM(HFLM):
        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            words = context.rstrip()  # white space between the two belongs to the answer, as in lm-eval itself
            return self.tok_encode(words), self.tok_encode(context[len(words):] + continuation)

    return (TokenMonsterLM if exact else HFLM)(pretrained=str(folder), trust_remote_code=exact, dtype=dtype,
                                               batch_size=batch_size, device=str(device))


def suite(options: Any, manager: Any) -> dict[str, tuple[tuple[str, ...], int]]:
    """The blocks to run. Raises BadInput for a name that lm-eval has neither as a task nor as a group."""
    blocks = {task: ((task,), 0) for task in options.tasks} or SUITE
    known = {*manager.all_subtasks, *manager.all_groups}
    for tasks, _ in blocks.values():
        for task in tasks:
            if task not in known:
                raise BadInput(f"lm-eval has no task or group {task}; lm_eval ls tasks lists those that it has, and "
                               f"--include_path takes a folder of your own")
    return blocks


def score_rows(result: dict, task: str, shots: int) -> list[dict]:
    """All of lm-eval's scores for a task, with standard errors. The card's score also has what guessing gets."""
    rows = []
    for metric, value in result.items():
        name, _, filter_ = metric.partition(",")
        if not filter_ or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = result.get(f"{name}_stderr,{filter_}")
        column, baseline = COLUMNS.get((task, shots), (None, None))
        rows.append({"task": task, "shots": shots, "metric": metric, "score": value,
                     "stderr": error if isinstance(error, float) else None,
                     "baseline": baseline if metric == column else None})
    return rows


def write_table(folder: Path, blocks: dict, name: str):
    """Write NAME.json and NAME.md from the finished blocks, and print the table."""
    rows = []
    for block, (tasks, shots) in blocks.items():
        path = folder / f"{block}.json"
        if not path.is_file():
            continue
        results = json.loads(path.read_text())
        for task in tasks:
            rows += score_rows(results[task], task, shots)
    scores = {(row["task"], row["shots"]): row["score"] for row in rows if row["baseline"] is not None}
    average = average_over_random(scores)
    lines = ["| benchmark | examples | metric | score | standard error | guessing |",
             "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        baseline = "" if row["baseline"] is None else f"{row['baseline']:.4f}"
        lines.append(f"| {row['task']} | {row['shots']} | {row['metric']} | {row['score']:.4f} | {error} "
                     f"| {baseline} |")
    if average is not None:
        lines.append(f"| **Avg over random** | | | **{average:.4f}** | | |")
    checkpoint.replace(folder / f"{name}.json",
                       (json.dumps({"scores": rows, "average_over_random": average}, indent=2) + "\n").encode())
    checkpoint.replace(folder / f"{name}.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def run(trained: Trained, options: Any, device: backend.Backend) -> int:
    """Run the blocks that have no result yet, and write the table. Returns 1 if a block failed, else 0.

    `options` are eval.py's. Raises BadInput if lm-eval is missing or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadInput(f"--benchmarks needs {error.name}: pip install 'lm_eval[hf]'") from error
    if options.include_path and not options.include_path.is_dir():
        raise BadInput(f"--include_path {options.include_path} is no folder")
    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    blocks = suite(options, manager)
    dtype = str(device.dtype).removeprefix("torch.")
    kinds = {dtype: device.dtype != torch.float32, f"first_{options.limit}": options.limit}
    folder = checkpoint.run_dir(trained.step_dir) / "benchmarks" / trained.step_dir.name
    folder = folder.joinpath(*(name for name, differs in kinds.items() if differs))
    folder.mkdir(parents=True, exist_ok=True)
    exported, failed, subject = folder / "model", [], None
    try:
        for block, (tasks, shots) in blocks.items():
            path = folder / f"{block}.json"
            if path.is_file():
                print(f"{block}: done before", flush=True)
                continue
            print(f"{block}: {', '.join(tasks)}" + (f", {shots} examples" if shots else ""), flush=True)
            if subject is None:
                exported.mkdir(exist_ok=True)
                write_settings(exported, trained.model, trained.vocabulary, torch.float32)
                write_tensors(exported, weights(trained.model, torch.float32))
                subject = language_model(exported, isinstance(trained.vocabulary, TokenMonster), dtype,
                                         options.batch_size, device.device)
            try:
                answer = lm_eval.simple_evaluate(
                    subject, tasks=list(tasks), num_fewshot=shots, task_manager=manager, limit=options.limit,
                    random_seed=42, numpy_random_seed=42, torch_random_seed=42, fewshot_random_seed=42)
            except Exception as error:  # whatever went wrong, the other blocks are still worth having
                failed.append(block)
                print(f"{block} failed: {type(error).__name__}: {brief(error)}", flush=True)
                continue
            if not all(score_rows(answer["results"].get(task, {}), task, shots) for task in tasks):
                failed.append(block)
                print(f"{block} failed: lm-eval gives it no score of its own; name the tasks that it is made of")
                continue
            checkpoint.replace(path, (json.dumps(answer["results"], indent=2, sort_keys=True) + "\n").encode())
    finally:
        shutil.rmtree(exported, ignore_errors=True)
    write_table(folder, blocks, "tasks" if options.tasks else "table")
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again")
    return 1 if failed else 0

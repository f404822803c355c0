# SPDX-License-Identifier: Apache-2.0
"""maxkit's evaluation beside lm-eval's, on the same questions and the same weights, offline. Prints a table.

    PYTHONPATH=. .venv-oracle/bin/python benchmarks/lm_eval_comparison.py --limit 200

Needs `.venv-oracle` (PyTorch, transformers, lm-eval; `make oracle` makes it). The weights are exported to a Hugging
Face folder, the questions and texts to files with task descriptions beside them; lm-eval reads those. Exit code 1 where
an accuracy differs, a log-likelihood by more than 1e-3, or a perplexity by more than one in ten thousand.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import yaml

import maxkit
from maxkit import eval as evaluation
from maxkit.data.questions import questions
from maxkit.data.report import RowReport
from maxkit.data.sources import documents

CHOICES = ("openbookqa", "piqa", "commonsenseqa")
METRICS = ("acc", "acc_norm", "acc_bytes")
TEXT_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
TEXTS, NUM_TEXTS, SEQ_LEN = "texts", 4, 128


def main() -> int:
    """Measure with both, print, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tasks", nargs="+", default=[*CHOICES, TEXTS], choices=[*CHOICES, TEXTS])
    arguments = parser.parse_args()
    choices = [name for name in arguments.tasks if name != TEXTS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = maxkit.load(arguments.model, dtype="float32")
        maxkit.save(loaded, folder / "model", format="hf")
        write_tasks(folder, arguments.limit)
        ours, theirs = {}, {}
        if choices:
            ours |= evaluation.evaluate(loaded, choices, limit=arguments.limit)
            theirs |= run_lm_eval(folder, choices)
        if TEXTS in arguments.tasks:
            task = f"perplexity:{folder / 'texts.jsonl'}"
            ours |= {TEXTS: evaluation.evaluate(loaded, [task], seq_len=SEQ_LEN)[task]}
            theirs |= run_lm_eval(folder, [TEXTS], max_length=SEQ_LEN)
    return report(ours, theirs)


def write_tasks(folder: Path, limit: int) -> None:
    """The first questions of each set, and some texts, as rows with the description that lm-eval wants."""
    for name in CHOICES:
        rows = []
        for question in list(questions(name, RowReport()))[:limit]:
            prompt = evaluation.TASKS[name].prompt.format(question=question.question)
            rows.append({"prompt": prompt, "options": list(question.options), "answer": question.answer})
        metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS]
        made_of = {"doc_to_text": "prompt", "doc_to_target": "answer", "doc_to_choice": "{{options}}"}
        write_task(folder, name, rows, {"output_type": "multiple_choice", "metric_list": metrics, **made_of})
    # lm-eval counts one word more for white space at either end of a text.
    rows = [{"text": text.strip()} for text in list(documents("pydoc", RowReport()))[:NUM_TEXTS]]
    made_of = {"doc_to_text": "", "doc_to_target": "{{text}}"}
    metrics = [{"metric": m} for m in TEXT_METRICS]
    write_task(folder, TEXTS, rows, {"output_type": "loglikelihood_rolling", "metric_list": metrics, **made_of})


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], description: dict[str, Any]) -> None:
    """NAME.jsonl and NAME.yaml."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    task = {"task": f"maxkit_{name}", **source, **description, "metadata": {"version": 1}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def run_lm_eval(folder: Path, names: list[str], **model_args: Any) -> dict[str, Any]:
    """{name: {"metrics": ..., "samples": ...}} as lm-eval measures them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "model"), "dtype": "float32", **model_args},
        tasks=[f"maxkit_{name}" for name in names],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
    )
    results, samples = found["results"], found["samples"]
    return {n: {"metrics": results[f"maxkit_{n}"], "samples": samples[f"maxkit_{n}"]} for n in names}


def report(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """Print the table; 1 where the two differ."""
    different = []
    print("| task | items | metric | maxkit | lm-eval | largest difference of a log-likelihood (nats) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, result in ours.items():
        largest = None
        if name != TEXTS:
            samples = sorted(theirs[name]["samples"], key=lambda sample: sample["doc_id"])
            pairs = zip(result.items, samples, strict=True)
            largest = max(
                abs(a - float(b[0]))
                for item, sample in pairs
                for a, b in zip(item.logps, sample["filtered_resps"], strict=True)
            )
            different += [f"{name}: log-likelihood"] if largest > 1e-3 else []
        for metric in TEXT_METRICS if name == TEXTS else METRICS:
            mine, other = result.metrics[metric], float(theirs[name]["metrics"][f"{metric},none"])
            shown = "" if largest is None or metric != METRICS[0] else f"{largest:.1e}"
            print(f"| {name} | {len(result.items)} | {metric} | {mine:.4f} | {other:.4f} | {shown} |")
            if abs(mine - other) > (1e-4 * other if name == TEXTS else 1e-9):
                different.append(f"{name}: {metric}")
    print(f"different: {', '.join(different)}" if different else "all equal", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

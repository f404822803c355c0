# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of options by transformers, each option alone in a sequence, for tests/golden/test_eval_smollm2.py.

    PYTHONPATH=. .venv-oracle/bin/python tests/golden/make_eval.py

Writes tests/fixtures/eval_smollm2.json. The weights are those that maxkit exports to a Hugging Face folder; tokens come
from transformers' own tokenizer out of that folder.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import maxkit
from maxkit.data.questions import questions
from maxkit.data.report import RowReport
from maxkit.eval import TASKS

FIXTURE = Path(__file__).parents[1] / "fixtures" / "eval_smollm2.json"
SETS, COUNT = ("openbookqa", "piqa", "commonsenseqa"), 3


def asked(count: int = COUNT) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """{set: [(prompt, options)]} of the first questions of each."""
    found = {}
    for name in SETS:
        rows = list(questions(name, RowReport()))[:count]
        found[name] = [(TASKS[name].prompt.format(question=row.question), row.options) for row in rows]
    return found


def by_transformers(folder: Path, count: int = COUNT) -> dict[str, list[list[float]]]:
    """{set: [[log-likelihood of each option] of each question]} in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def logp(prompt: str, option: str) -> float:
        start, ids = len(encode(prompt)), encode(f"{prompt} {option}")
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        return sum(float(scores[place - 1, ids[place]]) for place in range(start, len(ids)))

    return {name: [[logp(p, o) for o in options] for p, options in rows] for name, rows in asked(count).items()}


def main() -> None:
    """Write the fixture."""
    with tempfile.TemporaryDirectory() as name:
        maxkit.save(maxkit.load("smollm2-135m-instruct", dtype="float32"), Path(name, "model"), format="hf")
        found: dict[str, Any] = by_transformers(Path(name, "model"))
    rounded = {name: [[round(value, 5) for value in row] for row in rows] for name, rows in found.items()}
    FIXTURE.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Tasks measured inside a training run, and the same weights measured by the eval recipe afterwards."""

import json

import pytest
from tiny_runs import config_of, write_corpus

from maxkit import run
from maxkit.config import resolve
from maxkit.errors import UserError


def evaluation(**settings):
    return run.start_evaluation(resolve("eval", environ={}, given={k: (v, "keyword") for k, v in settings.items()}))


def test_a_run_measures_tasks_before_and_after_and_eval_finds_the_same(tmp_path) -> None:
    dataset = write_corpus(tmp_path / "text.txt", 80)
    task = f"perplexity:{dataset}"
    trained = run.start(config_of(tmp_path / "run", dataset, steps=2))
    trained.load_data()
    trained.load_model()
    before = trained.evaluate_tasks([task], seq_len=16)[task]
    trained.train()
    after = trained.evaluate_tasks([task], seq_len=16)[task]
    assert after.value < before.value
    record = trained.finish()
    assert record["metrics"][f"{task}/perplexity_at_0"] == before.value
    assert record["metrics"][f"{task}/perplexity_at_2"] == after.value

    again = evaluation(model=str(tmp_path / "run"), tasks=task, seq_len=16, limit=0, run_dir=str(tmp_path / "eval"))
    again.load_model()
    assert again.evaluate()[task].value == pytest.approx(after.value, rel=1e-6)
    assert again.figure("no accuracies") is None and "perplexity" in again.table().text
    assert "nats per token" in again.show(1).text and not again.uses_defaults()
    record = again.finish()
    assert record["recipe"] == "eval" and record["metrics"][f"{task}/items"] == len(after.items)
    assert [entry["path"] for entry in record["artifacts"]] == ["items.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "eval" / "items.jsonl").read_text().splitlines()]
    assert sum(line["nll"] for line in lines) == pytest.approx(sum(item.nll for item in after.items), rel=1e-5)
    # The layout is the checkpoint's; another one is refused, with both values.
    with pytest.raises(UserError, match="scan_layers=False was given .keyword..*scan_layers=True"):
        evaluation(model=str(tmp_path / "run"), tasks=task, scan_layers=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": "pica"}, "task 'pica': did you mean 'piqa'"),
        ({"tasks": "choise:x"}, "no measure 'choise'; did you mean 'choice'"),
        ({"tasks": "piqa,piqa"}, "'piqa' is named twice"),
        ({"tasks": ""}, "no task was given"),
        ({"model": ""}, "must name what is evaluated"),
        ({"mesh": "fsd:2"}, "'fsdp'"),
        ({"steps": 3}, "unknown parameter 'steps'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_read(settings, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        evaluation(**settings)
    assert "\n" not in str(caught.value)

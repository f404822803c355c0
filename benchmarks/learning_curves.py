# SPDX-License-Identifier: Apache-2.0
"""What recipes learn with several seeds: held-out metrics over updates, as a table, JSON and a figure.

    python benchmarks/learning_curves.py distill --seeds 0 1 2
    python benchmarks/learning_curves.py distill --seeds 0 1 2 -p steps=30 -p eval_period=15

A seed draws the split of the data, their order and every random number. Each is a run of its own in an empty folder.
What was measured is kept in benchmarks/results/learning-RECIPE.json by settings and seed, so that seeds may be measured
one at a time; the figure is drawn of all seeds with the settings of this call (docs/figures/learning-RECIPE.png).
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maxkit import run as runs
from maxkit.config import resolve
from maxkit.nb import figures
from maxkit.nb.record import write_json
from maxkit.rl.answers import FIRST_EVALUATION_REQUEST, Answerer, Answers

Curves = dict[str, dict[str, dict[str, float]]]  # of a seed, after an update, a metric
CONTROL = " (control)"
ROOT = Path(__file__).resolve().parents[1]
# Of each recipe what is drawn, {name of the metric on held-out examples: how the axis is called}, the first one in the
# figure; and what has to be done between reading the data and the weights.
METRICS: dict[str, dict[str, str]] = {
    "distill": {"kl": "KL from the teacher (nats per token)", "loss/nll": "negative log-likelihood (nats per token)"},
    "grpo": {"reward": "mean reward"},
    "dpo": {
        "rewards/margins": "margin over the reference, times beta",
        "rewards/accuracies": "pairs moved towards the chosen answer",
        "logps/accuracies": "pairs whose chosen answer is likelier",
    },
}
BEFORE_WEIGHTS: dict[str, Callable[[runs.Run], Any]] = {"grpo": runs.imitate}


class ShuffledRewards(Answerer):
    """A control: in training every reward goes to some answer, seldom to its own, so nothing can be learned."""

    def __call__(self, params: Any, prompts: Any, *, first_request: int, temperature: float | None = None) -> Answers:
        """As `Answerer` says; the answers of an evaluation keep their rewards."""
        answers = super().__call__(params, prompts, first_request=first_request, temperature=temperature)
        if first_request >= FIRST_EVALUATION_REQUEST:
            return answers
        rewards = np.random.default_rng(first_request).permutation([one.reward for one in answers.answered])
        given = [one._replace(reward=float(r)) for one, r in zip(answers.answered, rewards, strict=True)]
        return dataclasses.replace(answers, answered=given)


def shuffle_rewards(run: runs.Run) -> None:
    """The control of a run with rewards."""
    true = run.data.answerer
    run.data = dataclasses.replace(run.data, answerer=ShuffledRewards(true.cfg, true.rollout, true.tokenizer))


CONTROLS: dict[str, Callable[[runs.Run], None]] = {"grpo": shuffle_rewards}
CONTROL_PARAMETERS = {"dpo": {"swap_labels": "true"}}  # trained on the wrong, measured on the right


def main() -> int:
    """Measure the seeds that are asked for; print and draw what is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=sorted(METRICS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the recipe")
    parser.add_argument("--control", action="store_true", help="a run that must not learn")
    arguments = parser.parse_args()
    controlled = CONTROLS.keys() | CONTROL_PARAMETERS.keys()
    if arguments.control and arguments.recipe not in controlled:
        parser.error(f"--control: there is one for {', '.join(sorted(controlled))}")
    measured = " ".join(sorted(arguments.p)) or "default"
    settings = measured + CONTROL * arguments.control
    path = ROOT / "benchmarks" / "results" / f"learning-{arguments.recipe}.json"
    for seed in arguments.seeds:
        given = dict(item.split("=", 1) for item in arguments.p)
        given |= CONTROL_PARAMETERS.get(arguments.recipe, {}) if arguments.control else {}
        curve = measure(arguments.recipe, seed, given, arguments.control)
        # Read again: another process may have added a seed.
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known.setdefault(settings, {})[str(seed)] = curve
        path.parent.mkdir(exist_ok=True)
        write_json(path, known)
    print(table(arguments.recipe, known[settings]))
    if measured in known:
        print(draw(arguments.recipe, known[measured], known.get(measured + CONTROL, {})).alt)
    return 0


def measure(recipe: str, seed: int, given: dict[str, str], control: bool) -> dict[str, dict[str, float]]:
    """{update: metrics on the held-out examples} of one run."""
    with tempfile.TemporaryDirectory() as folder:
        values = {**given, "seed": seed, "run_dir": folder}
        cfg = resolve(recipe, environ={}, given={name: (value, "keyword") for name, value in values.items()})
        run = runs.start(cfg)
        run.load_data()
        BEFORE_WEIGHTS.get(recipe, lambda run: None)(run)
        if control:
            CONTROLS.get(recipe, lambda run: None)(run)
        run.load_model()
        points = {0: run.evaluate().metrics}
        run.train()
        lines = map(json.loads, (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        for line in lines:
            found = {name.removeprefix("held_out/"): x for name, x in line.items() if name.startswith("held_out/")}
            if found:
                points[int(line["step"])] = found
        points[run.steps_done] = run.evaluate().metrics
        run.store.close()
    return {str(step): {name: metrics[name] for name in METRICS[recipe]} for step, metrics in sorted(points.items())}


def table(recipe: str, curves: Curves) -> str:
    """Before and after by seed, in Markdown."""
    names = METRICS[recipe]
    lines = [f"| seed | {' | '.join(names.values())} |", f"| --- {'| --- ' * len(names)}|"]
    for seed, points in sorted(curves.items(), key=lambda item: int(item[0])):
        first, last = points["0"], points[max(points, key=int)]
        lines.append(f"| {seed} | {' | '.join(f'{first[n]:.2f} to {last[n]:.2f}' for n in names)} |")
    return "\n".join(lines)


def draw(recipe: str, curves: Curves, controls: Curves) -> figures.Figure:
    """The recipe's first metric over updates, a line a seed, those of the control too."""
    name, axis = next(iter(METRICS[recipe].items()))
    lines = {f"{label} {seed}": sorted((int(step), point[name]) for step, point in points.items())
             for label, found in (("seed", curves), ("control", controls))
             for seed, points in sorted(found.items(), key=lambda item: int(item[0]))}  # fmt: skip
    label, first = next(iter(lines.items()))
    return figures.loss_figure(
        [{"step": step, name: value} for step, value in first],
        y=name,
        label=label,
        others={other: line for other, line in lines.items() if other != label},
        title=f"{recipe}: held-out examples, {len(curves)} seed{'s' * (len(curves) > 1)}",
        ylabel=axis,
        save_as=ROOT / "docs" / "figures" / f"learning-{recipe}",
    )


if __name__ == "__main__":
    sys.exit(main())

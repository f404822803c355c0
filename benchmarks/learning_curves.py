# SPDX-License-Identifier: Apache-2.0
"""Learning curves of a recipe on held-out examples: several seeds, and a control that must not learn.

    python benchmarks/learning_curves.py dpo --figure docs/figures/dpo-curves

Each run lives in RUNS/RECIPE/NAME-SEED and is continued or read when it is there. Prints one JSON line a run; with
--figure it draws all of them and writes the numbers beside the figure. The seed draws the split, the order of the rows
and the initial values of adapters; a size other than the recipe's own is given with -p NAME=VALUE.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib

import maxkit.run
from maxkit.config import resolve
from maxkit.nb import figures


class Curves(NamedTuple):
    """What is drawn of a recipe: its headline metric on held-out examples, and the parameters of its control."""

    title: str
    ylabel: str
    learns: str
    control: str
    control_parameters: dict[str, Any]


RECIPES = {
    "dpo": Curves(
        "Held-out pairs: chosen over rejected", "margin, times beta", "as labelled", "labels swapped",
        {"swap_labels": True},
    ),
}  # fmt: skip


def learn(recipe: str, run_dir: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """One run from start to end: its curve and its held-out metrics before and after."""
    given = {name: (value, "keyword") for name, value in {**parameters, "run_dir": str(run_dir)}.items()}
    run = maxkit.run.start(resolve(recipe, environ={}, given=given))
    run.load_data()
    run.load_model()
    before = run.baseline().metrics
    run.train()
    after = run.assess().metrics
    run.finish()
    return {"curve": sorted(run.held_out.items()), "before": before, "after": after, "parameters": run.cfg.different()}


def draw(shown: Curves, results: dict[str, list[dict[str, Any]]], save_as: str) -> figures.Figure:
    """Every run as a thin line, the mean over seeds as a thick one."""
    with matplotlib.rc_context(figures.STYLE):
        canvas, axes = figures._card(shown.title, "updates", shown.ylabel)
        told = []
        for colour, (name, runs) in zip(figures.COLOURS, results.items(), strict=False):
            curves = [list(zip(*run["curve"], strict=True)) for run in runs]
            steps = curves[0][0]
            mean = [sum(values) / len(values) for values in zip(*(values for _, values in curves), strict=True)]
            for _, values in curves:
                axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.55)
            axes.plot(steps, mean, color=colour, linewidth=2.2, marker="o", markersize=4, label=name)
            ends = ", ".join(f"{values[-1]:.3f}" for _, values in curves)
            told.append(f"{name} from {mean[0]:.3f} to {mean[-1]:.3f} on average, {ends} by seed")
        axes.axhline(0, color=figures.INK, linewidth=0.8)
        axes.legend(frameon=False, fontsize=9.5)
        return figures.finish(canvas, f"Line chart, {shown.title}: " + "; ".join(told) + ".", save_as)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...")
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"))
    parser.add_argument("--figure", help="path without suffix: .svg, .png and .json are written")
    parser.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the recipe")
    args = parser.parse_args()
    shown, given = RECIPES[args.recipe], dict(item.split("=", 1) for item in args.p)
    results: dict[str, list[dict[str, Any]]] = {shown.learns: [], shown.control: []}
    for seed in range(args.seeds):
        for name, extra in ((shown.learns, {}), (shown.control, shown.control_parameters)):
            folder = args.runs / args.recipe / f"{name.replace(' ', '-')}-{seed}"
            found = learn(args.recipe, folder, {**given, **extra, "seed": seed})
            results[name].append(found)
            print(json.dumps({"recipe": args.recipe, "run": name, "seed": seed, **found}), flush=True)
    if args.figure:
        print(draw(shown, results, args.figure))
        Path(f"{args.figure}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

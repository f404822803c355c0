# SPDX-License-Identifier: Apache-2.0
"""What the tutorials on mixed precision and on compile reports count and draw: against numbers worked out by hand."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import TINY

from maxkit.config import resolve
from maxkit.errors import UserError
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.nb import plan_tour, precision_tour, scan_tour
from maxkit.plan.abstract import blueprint
from maxkit.plan.examples import EXAMPLES, MODEL, RECIPE, RECORDS, example, record_of

ROOT = Path(__file__).resolve().parents[2]
BF16 = precision_tour.BF16


def is_good(figure) -> bool:
    return 20 <= len(figure.alt) <= 250 and len(figure.png) > 2000


def test_kinds_of_numbers_are_those_of_their_bits() -> None:
    assert precision_tour.bits("float32") == {"sign": 1, "exponent": 8, "fraction": 23}
    assert precision_tour.bits("bfloat16") == {"sign": 1, "exponent": 8, "fraction": 7}
    assert precision_tour.spacing("bfloat16", 1.0) == 2**-7 and precision_tour.spacing("float16", 1000.0) == 0.5
    assert precision_tour.facts("bfloat16")["after 256 comes"] == "258"
    figure = precision_tour.numbers_figure([(1, 1.0625)], title="Numbers")
    assert "65 in float16, 9 in bfloat16" in figure.alt and is_good(figure)


def test_a_bfloat16_sum_of_ones_ends_at_256() -> None:
    assert precision_tour.running_sum(np.ones((2, 300)), BF16).tolist() == [256, 256]
    assert precision_tour.running_sum(np.ones(300), np.float32) == 300


def test_maxkit_loses_one_rounding_where_bfloat16_throughout_loses_much_more() -> None:
    draw = np.random.default_rng(1)
    for part in (precision_tour._rope, precision_tour._norm, precision_tour._product):
        naive, ours = part(draw)
        assert ours <= precision_tour.HALF_STEP and naive > 5 * ours
    figure = precision_tour.errors_figure({"one": (0.5, 0.001), "other": (2.0, 0.0)}, title="Errors")
    assert "up to 200 % off, as maxkit does it 0.1 %" in figure.alt and is_good(figure)


def test_an_update_below_half_a_gap_moves_nothing() -> None:
    weights = np.array([1.0, -1.0, 0.25, 0.001])
    # Half a gap above 1 is 1/256; above 0.25 it is 1/1024.
    assert precision_tour.unmoved(weights, 0.0039, BF16) == 0.5
    assert precision_tour.unmoved(weights, 0.00097, BF16) == 0.75
    assert precision_tour.unmoved(weights, 1e-5, np.float32) == 0
    figure = precision_tour.vanishing_figure(weights, 0.001, 100, [1e-5, 1e-2], title="Vanishing")
    assert "a bfloat16 weight of 1 is 1, a float32 one 1.100" in figure.alt and is_good(figure)


def test_the_operations_of_a_mixed_step_and_what_its_state_is_kept_in() -> None:
    batch = scan_tour.random_batch(TINY, rows=2, length=8)
    rows = {row["operation"]: row for row in precision_tour.operations(TINY, batch, "bfloat16")}
    assert rows["dot_general"]["bfloat16"] > 10 > rows["dot_general"]["float32"]
    assert all(rows[name]["bfloat16"] == 0 < rows[name]["float32"] for name in ("rsqrt", "log", "cosine"))
    history, state = precision_tour.train(TINY, batch, weights="bfloat16", dtype="bfloat16", rate=0.01, steps=2)
    assert history[1]["loss"] < history[0]["loss"]
    assert precision_tour.kinds_of(state) == {"weights": "bfloat16", "optimizer": "float32"}


def test_what_adam_keeps_is_twelve_bytes_a_trained_weight_and_its_gradient() -> None:
    whole, adapters = ModelDefinition(TINY), ModelDefinition(TINY, lora=LoraConfig(rank=2))
    count = whole.num_params
    assert precision_tour.state_bytes(whole) == {"weights": 4 * count, "gradients": 4 * count, "moments": 8 * count}
    trained = adapters.num_params - count
    assert precision_tour.state_bytes(adapters)["moments"] == 8 * trained


# --- plans ------------------------------------------------------------------------------------


def test_every_example_is_of_what_it_says() -> None:
    assert {record_of(name).name for name in EXAMPLES} == {path.name for path in RECORDS.glob("*.json")}
    for name, (topology, given) in EXAMPLES.items():
        plan = example(name)
        assert (plan.recipe, plan.topology, plan.parameters) == (RECIPE, topology, MODEL | given), name
        assert plan.fits == (plan.memory.peak is not None) == (plan.required_bytes <= plan.available_bytes), name
    with pytest.raises(UserError, match="no example 'four chip'.*four chips"):
        example("four chip")


def test_the_examples_are_of_today_s_model() -> None:
    cfg = resolve(RECIPE, environ={}, given={name: (value, "keyword") for name, value in MODEL.items()})
    made, plan = blueprint(cfg), example("one chip")
    assert plan.num_params == made.definition.num_params
    assert plan.memory.params == sum(4 * x.size for x in jax.tree.leaves(made.definition.shapes))


def test_the_parts_of_a_plan_add_up_to_what_it_needs() -> None:
    for name in ("one chip", "four chips"):
        plan = example(name)
        assert sum(plan_tour.parts(plan).values()) == pytest.approx(plan.required_bytes / 2**30)
    assert "not told (refused)" in plan_tour.parts(example("one chip"))
    figure = plan_tour.memory_figure({"1": example("one chip"), "4": example("four chips")}, title="Memory")
    assert "1 40.5 (refused), 4 10.8" in figure.alt and is_good(figure)
    assert is_good(plan_tour.traffic_figure({"fsdp:4": example("four chips")}, title="Traffic"))


def test_floors_by_hand() -> None:
    plan = example("four chips")
    sent = {kind.opcode: kind.bytes for kind in plan.collectives}
    received = 3 / 4 * (sent["all-gather"] + sent["reduce-scatter"] + 2 * sent["all-reduce"])
    floors = plan_tour.floors(plan)
    assert floors["links"] == pytest.approx(received / 200e9)
    assert floors["compute"] == pytest.approx(plan.least_seconds_per_step)
    assert floors["memory"] == pytest.approx((plan.memory.arguments + plan.memory.output) / 819e9)
    assert plan_tour.floors(example("recompute"))["links"] == 0
    assert plan_tour.mesh_sizes(dataclasses.replace(plan, mesh="fsdp:2,tensor:2")) == {"fsdp": 2, "tensor": 2}
    assert is_good(plan_tour.floors_figure({"four": plan}, title="Floors"))


def test_the_script_writes_the_examples() -> None:
    spec = importlib.util.spec_from_file_location("plans", ROOT / "benchmarks" / "plans.py")
    plans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plans)
    assert plans.EXAMPLES is EXAMPLES and plans.FOLDER == ROOT / "recipes" / "plans"

# SPDX-License-Identifier: Apache-2.0
"""What the recipe builder offers is what the parameter classes take, also in combination."""

import random

import pytest
from recipe_builder import PROBE, builder_data

from maxkit.config import RECIPES, resolve
from maxkit.mesh_axes import parse_mesh

DATA = builder_data()
TRIALS = 300


def place(recipe, chosen, name):
    option = next((o for o in recipe["options"] if o["name"] == name), None)
    if option is None:
        return 0
    value = chosen.get(name, option["default"])
    return option["choices"].index(value) if "choices" in option else int(value != option["default"])


def allowed(recipe, chosen) -> bool:
    """The rule of the page: each group of parameters has one of its listed combinations."""
    return all(".".join(str(place(recipe, chosen, n)) for n in r["names"]) in r["valid"] for r in recipe["rules"])


def drawn(option, rng) -> str | None:
    """A value that the page would take, as text; None for one whose choices depend on the machine."""
    if option["kind"] == "choice":
        return rng.choice(option["choices"])
    if option["kind"] == "text":
        return "abc,d*" if option["list"] else PROBE
    if option["kind"] == "mesh":
        return None
    low = option.get("ge", option.get("gt", 0))
    high = option.get("le", option.get("lt", low + 1000))
    if option["whole"]:
        return str(rng.randint(low + ("gt" in option), high - ("lt" in option)))
    value = rng.uniform(low, high)
    return repr(value if value not in (low, high) else (low + high) / 2)


def test_every_recipe_is_offered_with_parameters_that_exist():
    assert DATA["recipes"]
    for recipe in DATA["recipes"]:
        fields = RECIPES[recipe["name"]].config.model_fields
        names = [option["name"] for option in recipe["options"]]
        assert len(set(names)) == len(names) and set(names) <= set(fields)
        left_out = set(fields) - set(names)
        assert len(left_out) < 4, left_out


@pytest.mark.parametrize("recipe", DATA["recipes"], ids=lambda recipe: recipe["name"])
def test_whatever_is_chosen_is_accepted(recipe):
    rng = random.Random(recipe["name"])
    tried = 0
    for _ in range(TRIALS):
        chosen: dict[str, str] = {}
        for option in rng.sample(recipe["options"], min(12, len(recipe["options"]))):
            value = drawn(option, rng)
            if value is not None and allowed(recipe, chosen | {option["name"]: value}):
                chosen[option["name"]] = value
        given = {name: (value, "command line") for name, value in chosen.items()}
        config = resolve(recipe["name"], environ={}, given=given)
        assert set(config.explicit) == set(chosen)
        tried += len(chosen)
    assert tried > TRIALS


def test_a_rule_that_is_left_out_is_noticed():
    pretrain = next(recipe for recipe in DATA["recipes"] if recipe["name"] == "pretrain")
    chosen = {"batch_size": "1", "gradient_accumulation_steps": "2"}
    assert not allowed(pretrain, chosen)
    assert allowed(pretrain, chosen | {"batch_size": "4"})


def test_every_mesh_is_one_of_its_machine():
    for machine in DATA["hardware"]:
        _, _, arrangement = machine["id"].partition(":")
        for mesh in machine["meshes"]:
            devices = 1
            for part in filter(None, mesh["text"].split(",")):
                devices *= int(part.partition(":")[2])
            sizes = parse_mesh(mesh["text"], devices) if mesh["text"] else None
            if sizes:
                assert mesh["ways"] == devices // sizes["tensor"]
        assert machine["meshes"][0]["text"] == "" and len(machine["setup"]) == 2, arrangement

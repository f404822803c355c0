# SPDX-License-Identifier: Apache-2.0
"""What the tutorials on the training step, the cache and LoRA count: against sums by hand and against XLA."""

import pytest
from tiny_models import TINY, random_batch, tiny

from maxkit.models.definition import ModelDefinition
from maxkit.nb import step_tour


def is_good(figure) -> bool:
    return 20 <= len(figure.alt) <= 250 and len(figure.png) > 2000


# --- a training step --------------------------------------------------------------------------


def test_products_take_two_flops_for_every_combination_of_indices() -> None:
    listed = {p.name: p for p in step_tour.products(TINY, 4, 16)}
    order = ["query", "key", "value", "scores", "weighted values", "out", "gate", "up", "down", "logits"]
    assert list(listed) == order
    assert listed["key"].flops == 2 * 2 * (4 * 16) * 16 * (2 * 4)  # 2 per combination, 2 layers, tokens, D, K x H
    assert listed["scores"].flops == 2 * 2 * 4 * 16 * 16 * (4 * 4) and listed["scores"].shape == (4, 4, 16, 16)
    assert listed["logits"].flops == 2 * (4 * 16) * 16 * 48 and listed["logits"].layers == 1
    assert "gate" not in {p.name for p in step_tour.products(tiny(mlp_gated=False), 4, 16)}
    by_part = step_tour.flops_by_part(listed.values())
    assert sum(by_part.values()) == sum(p.flops for p in listed.values())
    assert step_tour.recomputed(list(listed.values()), "none") == 0
    assert step_tour.recomputed(list(listed.values()), "dots") == by_part["attention, token by token"]
    without = by_part["output head"] + listed["down"].flops
    assert step_tour.recomputed(list(listed.values()), "full") == sum(by_part.values()) - without
    shown = repr(step_tour.shapes_table(list(listed.values()), title="Shapes"))
    assert "BTD,DKH->BTKH    4×16×2×4" in shown and "one number" in shown
    assert is_good(step_tour.flops_figure({"tiny": list(listed.values())}, title="FLOPs"))


@pytest.mark.parametrize("remat_policy", step_tour.POLICIES)
def test_what_is_counted_is_what_xla_counts_but_for_the_small_operations(remat_policy) -> None:
    # Wide enough that norms, softmax and activations are small beside the products.
    config = tiny(embed_dim=128, mlp_dim=320, head_dim=32, vocab_size=200)
    listed = step_tour.products(config, 4, 24)
    forward, again = sum(p.flops for p in listed), step_tour.recomputed(listed, remat_policy)
    found = step_tour.traced_flops(config, random_batch(config, 4, 24), remat_policy=remat_policy)
    assert 1 < found["forward"] / forward < 1.03
    assert 1 < found["forward and backward"] / (3 * forward + again) < 1.03
    assert found["whole step"] > found["forward and backward"]


def test_bytes_are_those_of_the_compiled_step() -> None:
    config, batch = tiny(mlp_dim=40), random_batch(tiny(), 4, 24)
    fixed = step_tour.state_bytes(ModelDefinition(config))
    assert set(fixed.values()) == {4 * ModelDefinition(config).num_params}
    reserved = step_tour.reserved_bytes(step_tour.compiled_step(config, batch))
    assert reserved["arguments"] == sum(fixed.values()) - fixed["gradients"] + step_tour.nbytes(batch) + 16
    kept = {policy: sum(step_tour.kept_bytes(config, batch, policy).values()) for policy in step_tour.POLICIES}
    assert reserved["all"] >= sum(fixed.values()) + kept["none"]
    stream = 2 * 4 * 24 * 16 * 4  # layers, rows, tokens, D, bytes
    assert stream <= kept["full"] < kept["dots"] < kept["none"]
    assert step_tour.kept_bytes(config, batch, "none")["MLP"] == pytest.approx(6 * 2 * 4 * 24 * 40 * 4)
    figure = step_tour.memory_figure({"none": (fixed | {"kept": kept["none"]}, reserved["all"])}, title="Memory")
    assert is_good(figure)

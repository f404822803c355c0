# SPDX-License-Identifier: Apache-2.0
"""What the tutorials measure and draw: against sums by hand, with models of a few thousand weights."""

import jax
import numpy as np
import pytest
from tiny_models import TINY

from maxkit import mesh as meshes
from maxkit.data.chat import encode_chat
from maxkit.data.packing import pack
from maxkit.errors import UserError
from maxkit.models.definition import ModelDefinition
from maxkit.nb import accumulation, objective_figures, packing_tour, scan_tour, sharding_tour
from maxkit.objectives import preference

CHATS = [
    [{"role": "user", "content": "a b?"}, {"role": "assistant", "content": "c."}],
    [{"role": "user", "content": "d?"}, {"role": "assistant", "content": "e."}],
]


def is_good(figure) -> bool:
    return 20 <= len(figure.alt) <= 250 and len(figure.png) > 2000


def test_a_token_of_a_short_row_counts_more_in_a_mean_of_means() -> None:
    mask = np.zeros((4, 8))
    for row, length in enumerate((1, 8, 3, 8)):
        mask[row, :length] = 1
    weights = accumulation.token_weights(mask, 4)
    assert weights[:, 0] == pytest.approx([20 / 4, 20 / 32, 20 / 12, 20 / 32])
    assert weights.sum() == pytest.approx(mask.sum()) and not weights[mask == 0].any()
    # Two micro-batches: rows 0 and 2 with 4 tokens, 1 and 3 with 16.
    assert accumulation.token_weights(mask, 2)[:, 0] == pytest.approx([2.5, 0.625, 2.5, 0.625])
    assert np.array_equal(accumulation.token_weights(mask, 1), mask)
    assert is_good(accumulation.votes_figure(mask, 4, title="Votes"))


def test_updates_have_an_angle_and_a_length() -> None:
    true, other = np.array([2.0, 0.0, 0.0]), np.array([0.0, 0.0, 3.0])
    assert accumulation.apart(other, true) == pytest.approx({"cosine": 0, "size": 1.5, "difference": 13**0.5 / 2})
    figure = accumulation.directions_figure(true, {"same": true}, {"other": other}, title="Two updates")
    assert "90 degrees off and 1.50 times as long" in figure.alt
    with pytest.raises(AssertionError, match="'?not the same"):
        accumulation.directions_figure(true, {"same": true + 1}, {"other": other}, title="Two updates")


def test_a_packed_row_is_drawn_and_its_leaks_are_counted() -> None:
    tokenizer = packing_tour.chatml_tokenizer(CHATS)
    encoded = [encode_chat(tokenizer, chat) for chat in CHATS]
    words = packing_tour.spelled(tokenizer, encoded[0][0])
    assert words[:2] == ["<|im_start|>", "user"] and "↵" in words
    assert [w for w, own in zip(words, encoded[0][1], strict=True) if own] == ["c", ".", "<|im_end|>"]
    assert is_good(packing_tour.tokens_figure(words, encoded[0][1], title="Tokens"))
    columns = pack(encoded, 40, pad_id=tokenizer.pad_id).columns
    spelled = packing_tour.spelled(tokenizer, columns["tokens"][0])
    assert "6 trained targets" in packing_tour.row_figure(columns, spelled, spelled, title="Row").alt
    segments, plain = packing_tour.told(columns, False, False)
    assert (segments == 1).all() and (plain == np.arange(40)).all()
    own = columns["segment_ids"][0]
    causal = np.tril(np.ones((40, 40)))
    first, second = int((own == 1).sum()), int((own == 2).sum())
    assert packing_tour.leaks(causal, own) == (first * second, 0)
    assert packing_tour.leaks(causal.T, own) == (first * second, first * second)
    assert packing_tour.leaks(causal * (own[:, None] == own), own) == (0, 0)
    assert is_good(packing_tour.influence_figure({"neither": causal}, own, title="Who sees whom"))


def test_lines_through_both_layouts_cross_where_they_do() -> None:
    cost = {"scanned": lambda n: 3.0, "unrolled": lambda n: 1 + 0.25 * n}
    rows = [{"layers": n, "layout": name, "compile": of(n)} for n in (1, 4, 16) for name, of in cost.items()]
    assert scan_tour.per_layer(rows, "unrolled", "compile") == pytest.approx(0.25)
    assert scan_tour.crossing(rows, "compile") == pytest.approx(8)
    figure = scan_tour.depth_figure(rows, {"compile": "seconds"}, title="Depth")
    assert "at 16 layers scanned and unrolled, seconds 3 and 5" in figure.alt
    assert scan_tour.with_layers(TINY, 5).num_layers == 5


def test_devices_cannot_be_simulated_once_jax_has_started() -> None:
    started = jax.device_count()
    with pytest.raises(UserError, match=f"{started + 1} CPU devices .* restart the kernel"):
        sharding_tour.simulate_devices(started + 1)
    assert jax.device_count() == started


def test_one_device_holds_everything_and_what_is_sent_is_added_up() -> None:
    mesh = meshes.make_mesh("", jax.devices()[:1])
    sharding = meshes.weight_sharding("DF", (8, 4), mesh)
    assert sharding_tour.parts(sharding, (8, 4)) == {((0, 8), (0, 4)): [jax.devices()[0].id]}
    definition = ModelDefinition(TINY)
    assert sharding_tour.held_bytes(definition, mesh) == 4 * definition.num_params
    rows = [{"mesh": "fsdp:8", "held": 1000, "sent": {"all-gather": 3000, "all-reduce": 2000}}]
    assert "fsdp:8 1 and 5" in sharding_tour.traffic_figure(rows, title="Traffic").alt


def test_slopes_and_shares_are_those_of_the_formulas() -> None:
    assert objective_figures.slope(lambda h: preference.sigmoid(h, 0.5), 0.0) == pytest.approx(-0.25)
    assert objective_figures.token_shares([2, 8], "sequence_mean") == pytest.approx([1 / 4, 1 / 16])
    assert objective_figures.token_shares([2, 8], "token_mean") == pytest.approx([0.1, 0.1])
    assert objective_figures.token_shares([2, 8], "sequence_scale", 8) == pytest.approx([1 / 16, 1 / 16])
    figure = objective_figures.clipping_figure(title="Clipping", epsilon_low=0.2, epsilon_high=0.5)
    assert "advantage +1 from ratio 1.5" in figure.alt and "to 0.80" in figure.alt
    assert is_good(objective_figures.margins_figure({"DPO": preference.sigmoid}, title="Margins"))

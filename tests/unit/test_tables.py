# SPDX-License-Identifier: Apache-2.0
"""The notation of the tables against slices written by hand, and what every family's table must be."""

import json

import numpy as np
import pytest
from golden.families import CASES, FIXTURES, unpack_keys

from maxkit.errors import UserError
from maxkit.formats.axes import parse_axes
from maxkit.formats.huggingface import read_config
from maxkit.formats.tables import TABLES, find_table, letter_sizes

SIZES = dict(N=6, K=2, H=5, D=7, F=4, Z=3, V=9, n=2, v=5, f=4, k=2, g=3, h=3, u=2, w=4, E=3)
KH, NH = SIZES["K"] * SIZES["H"], SIZES["N"] * SIZES["H"]
BY_HAND = {
    "VD": lambda x: x,
    "FD > DF": lambda x: x.T,
    "(NH)D > DNH": lambda x: x.T.reshape(7, 6, 5),
    "D(NH) > NHD": lambda x: x.T.reshape(6, 5, 7),
    "(*NH+KH+KH)D > DNH": lambda x: x[:NH].T.reshape(7, 6, 5),
    "(NH+*KH+KH)D > DKH": lambda x: x[NH : NH + KH].T.reshape(7, 2, 5),
    "(NH+KH+*KH)D > DKH": lambda x: x[NH + KH :].T.reshape(7, 2, 5),
    "D(NH+*KH+KH) > DKH": lambda x: x[:, NH : NH + KH].reshape(7, 2, 5),
    "(N(*n+v))Z > ZNn": lambda x: x.reshape(6, 7, 3)[:, :2].transpose(2, 0, 1),
    "(N(n+*v))Z > ZNv": lambda x: x.reshape(6, 7, 3)[:, 2:].transpose(2, 0, 1),
    "ED(*f+f) > EDf": lambda x: x[..., :4],
    "ED(f(*1+1)) > EDf": lambda x: x[..., 0::2],
    "ED(f(1+*1)) > EDf": lambda x: x[..., 1::2],
    "E(f(1+*1)) > Ef": lambda x: x[..., 1::2],
    "1D > D": lambda x: x[0],
    "(k(h+h+*gu+gu))D > D(kg)u": lambda x: x.reshape(2, 18, 7)[:, 6:12].reshape(6, 2, 7).transpose(2, 0, 1),
    "(kh+kh+*kgu)1w > (kg)uw": lambda x: x[12:, 0].reshape(6, 2, 4),
    "(k(g+*g))D > D(kg)": lambda x: x.reshape(2, 6, 7)[:, 3:].reshape(6, 7).T,
}  # fmt: skip


@pytest.mark.parametrize("axes", BY_HAND)
def test_a_rearrangement_is_the_slice_written_by_hand_and_back(axes):
    rearrangement = parse_axes(axes, SIZES)
    foreign = np.random.default_rng(0).standard_normal(rearrangement.foreign_shape).astype(np.float32)
    found = rearrangement.read(foreign)
    np.testing.assert_array_equal(found, BY_HAND[axes](foreign))
    assert found.shape == rearrangement.canonical_shape and found.flags.owndata
    again = np.full_like(foreign, np.nan)
    rearrangement.write_into(again, found)
    ours = ~np.isnan(again)
    assert ours.sum() == found.size and np.array_equal(again[ours], foreign[ours])
    assert rearrangement.is_whole == ours.all()
    if rearrangement.is_whole:
        np.testing.assert_array_equal(rearrangement.write(found), foreign)


@pytest.mark.parametrize("axes", ["(NH+KH)D > DNH", "(*NH+*KH)D > DNH", "DF > DH", "(*N)D > ND", "DD", "(DF", "D)F"])
def test_a_row_that_says_nothing_sensible_is_refused(axes):
    with pytest.raises((AssertionError, KeyError)):
        parse_axes(axes, SIZES)


@pytest.mark.parametrize("name", CASES)
def test_the_rows_of_a_family_fill_every_foreign_tensor_once(name):
    config = read_config(FIXTURES / name / "config.json")
    table = find_table(config, "hf")
    assert table.shapes() == dict(unpack_keys(json.loads((FIXTURES / name / "keys.json").read_text())))
    times = {key: np.zeros(shape, np.int8) for key, shape in table.shapes().items()}
    for place in table.entries.values():
        ones = np.ones(place.canonical_shape, np.int8)
        for number, key in enumerate(place.keys):
            part = np.zeros_like(times[key])
            place.write_into(part, ones, number)
            times[key] += part
    assert all((count == 1).all() for count in times.values())
    assert len(letter_sizes(config)) == len(set(letter_sizes(config)))


def test_every_family_has_a_case():
    assert {name.split("-")[0] for name in CASES} == {family for family, format in TABLES if format == "hf"}


def test_what_a_model_does_not_have_is_named():
    table = find_table(read_config(FIXTURES / "deepseek_v3-kimi" / "config.json"), "hf")
    for address, words in (
        (("layers/mlp/router/kernels", 1), "did you mean 'layers/mlp/router/kernel'"),
        (("layers/mlp/router/kernel", 9), "outside the model"),
        (("layers/mlp/router/kernel", 0), "not in this layer"),
    ):
        with pytest.raises(UserError, match=words):
            table[address]
    gguf = read_config(FIXTURES / "deepseek_v3-kimi" / "config.json")
    with pytest.raises(UserError, match="family 'deepseek_v3' cannot be stored as gguf"):
        find_table(gguf, "gguf")

# SPDX-License-Identifier: Apache-2.0
"""Every family against transformers: tensors, logits, packed rows, decoding, and the folder that is written again.

The fixtures are tiny random models (`families.py`, `make_families.py`); their weights are drawn anew here.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.families import (
    CASES,
    DOCUMENTS,
    FIXTURES,
    GRADIENTS,
    GREEDY,
    NUM_TOKENS,
    PROMPTS,
    checksum,
    projections,
    write_folder,
)  # fmt: skip
from safetensors.numpy import load_file

from maxkit.checkpoint.load import load
from maxkit.formats.huggingface import HuggingFaceReader, write_huggingface
from maxkit.formats.safetensors import SafetensorsFile

TOLERANCE = 2e-4  # of the standard deviation of the logits
# Cases that also decode when unrolled, which is the same code with a cache laid out otherwise: one of each mixer.
UNROLLED = ("gemma3-remainder", "deepseek_v3-groups", "qwen3_next-dense")


def leaves(reader):
    return ((path, layer, reader.read(path, layer)) for path, layer in reader.addresses())


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_read_and_written_again(tmp_path, name):
    tensors = write_folder(tmp_path / "in", name)
    assert checksum(tensors) == np.load(FIXTURES / name / "golden.npz")["checksum"], "not the weights of the fixture"
    reader = HuggingFaceReader(tmp_path / "in")
    assert (reader.missing_keys(), reader.unused_keys(), reader.ignored_keys()) == ([], [], {})
    for path, layer in reader.addresses():
        assert reader.read(path, layer).shape == reader.shape(path, layer)
    given = list(leaves(reader))
    np.random.default_rng(0).shuffle(given)  # any order will do
    write_huggingface(tmp_path / "out", reader.config, given, None, None)
    written = SafetensorsFile(tmp_path / "out/model.safetensors")
    assert written.entries.keys() == tensors.keys()
    for key, tensor in tensors.items():
        found = written.read(key)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and found.tobytes() == tensor.tobytes(), key
    assert HuggingFaceReader(tmp_path / "out").config == reader.config
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [CASES[name].model]


def rows_and_documents(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and segments [3, T]: the two rows, and one that packs the beginnings of both."""
    packed = np.concatenate([row[:length] for row, length in zip(tokens, DOCUMENTS, strict=True)])
    segments = np.repeat([1, 2], DOCUMENTS)
    positions = np.concatenate([np.arange(length) for length in DOCUMENTS])
    whole = np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return tuple(
        np.concatenate([both, one[None]]).astype(np.int32)
        for both, one in ((tokens, packed), (whole[1], positions), (whole[0], segments))
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def logits_of(definition, params, tokens, rows, decode):
    """Of all tokens at once, of both rows packed, and where `decode` from prompts and then token by token."""
    model = definition.merge(params)
    at_once = model(*rows[:2], segment_ids=rows[2])[0]
    if not decode:
        return at_once, None
    longest = max(PROMPTS)
    real = np.arange(longest) < np.array(PROMPTS)[:, None]
    cache = model.init_cache(2, longest + NUM_TOKENS - min(PROMPTS))
    start = np.broadcast_to(np.arange(longest), real.shape)
    first, cache = model(jnp.where(real, tokens[:, :longest], 0), start, cache, segment_ids=real.astype(np.int32))

    def step(cache, number):
        at = jnp.minimum(jnp.array(PROMPTS) + number, NUM_TOKENS - 1)[:, None]
        logits, cache = definition.merge(params)(jnp.take_along_axis(tokens, at, 1), at, cache)
        return cache, logits[:, 0]

    _, later = jax.lax.scan(step, cache, jnp.arange(NUM_TOKENS - min(PROMPTS)))
    return at_once, (first, later.swapaxes(0, 1))


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", CASES)
def test_logits(tmp_path, name, scan_layers):
    golden = np.load(FIXTURES / name / "golden.npz")
    write_folder(tmp_path, name)
    loaded = load(tmp_path, scan_layers=scan_layers, dtype="float32")
    tokens, wanted = golden["tokens"], golden["logits"]
    spread, stable = wanted.std(), CASES[name].prefix_stable
    decode = stable and (scan_layers or name in UNROLLED)
    at_once, decoded = logits_of(loaded.definition, loaded.params, tokens, rows_and_documents(tokens), decode)
    differences = {"rows": np.abs(at_once[:2] - wanted).max()}
    if stable:
        alone = np.concatenate([row[:length] for row, length in zip(wanted, DOCUMENTS, strict=True)])
        differences["packed"] = np.abs(at_once[2] - alone).max()
    if decode:
        first, later = decoded
        for row, prompt in enumerate(PROMPTS):
            left = NUM_TOKENS - prompt
            steps = np.concatenate([first[row, :prompt], later[row, :left]])
            differences[f"decoded {row}"] = np.abs(steps - wanted[row]).max()
            likely = steps[GREEDY - 1 : -1].argmax(-1)
            np.testing.assert_array_equal(likely, tokens[row, GREEDY:])
    print(name, {what: f"{difference / spread:.1e}" for what, difference in differences.items()})
    assert np.max(list(differences.values())) <= TOLERANCE * spread, differences


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_those_of_torch(tmp_path, name):
    golden = np.load(FIXTURES / name / "gradients.npz")
    tensors = write_folder(tmp_path / "in", name)
    loaded = load(tmp_path / "in", scan_layers=False)
    tokens = np.load(FIXTURES / name / "golden.npz")["tokens"]

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        logps = jax.nn.log_softmax(loaded.definition.merge(params)(tokens)[0][:, :-1])
        return -jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1).mean()

    loss, gradients = mean_loss(loaded.params)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)
    leaves = (
        (parameter.address, parameter.layers[0] if parameter.layers else None, np.asarray(gradient))
        for path, gradient in loaded.definition.flat(gradients).items()
        for parameter in [loaded.definition.parameters[path]]
    )
    write_huggingface(tmp_path / "out", loaded.config, leaves, None, None)
    found = projections(load_file(tmp_path / "out/model.safetensors"))
    assert found.keys() == tensors.keys()
    wanted = dict(zip(sorted(tensors), golden["projections"], strict=True))
    assert sum(norm > 0 for norm, _ in wanted.values()) > 0.9 * len(wanted)
    worst = {key: np.abs(found[key] - wanted[key]).max() / max(wanted[key][0], 1e-9) for key in wanted}
    print(name, f"gradients differ by {max(worst.values()):.1e}")
    assert np.max(list(worst.values())) <= 1e-4, {key: value for key, value in worst.items() if not value <= 1e-4}

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit.errors import UserError
from maxkit.infer import Engine, engine, sequence_logps, token_logps
from maxkit.infer.generate import encode, generate
from maxkit.models.config import BlockSpec, Execution, ModelConfig
from maxkit.models.definition import ModelDefinition

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=3,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
    pattern=(BlockSpec(sliding_window=4), BlockSpec(rope_theta=1000.0)),
)
PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [4]]


@functools.cache
def model(scan_layers=True, dtype="float32"):
    """A definition and weights large enough for peaked, varied distributions."""
    definition = ModelDefinition(CONFIG, Execution(scan_layers=scan_layers, dtype=dtype))
    return definition, jax.tree.map(lambda x: 1.5 * x, definition.init(0))


@functools.cache
def reference(scan_layers=True):
    """[tokens, logps] of each prompt from full forward passes without a cache, 12 tokens, greedy."""
    definition, params = model(scan_layers)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(definition.merge(params)(tokens)[0]))
    out = []
    for prompt in PROMPTS:
        ids, tokens, logps = np.zeros((1, 32), np.int32), [], []
        ids[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + 12):
            row = np.asarray(forward(ids)[0, at - 1])
            tokens.append(int(row.argmax()))
            logps.append(float(row.max()))
            ids[0, at] = tokens[-1]
        out.append((tokens, logps))
    return out


def drain(decoder, state, slots):
    """Generate until all slots are free; {slot: tokens}, continuing the lists in `slots`."""
    while state.active.any():
        state, step = decoder.generate(state)
        for slot, tokens in slots.items():
            if step.valid[slot]:
                tokens.append(int(step.tokens[slot]))
    return state


# ------------------------------------------------------------ whole batches


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_batch_of_unequal_prompts_equals_full_forward_passes(scan_layers):
    definition, params = model(scan_layers)
    out = Engine(definition, params).generate_batch(PROMPTS, max_new_tokens=12)
    for tokens, logps, (expected, expected_logps) in zip(out.tokens, out.logps, reference(scan_layers), strict=True):
        assert tokens == expected
        np.testing.assert_allclose(logps, expected_logps, atol=1e-5)
    assert out.lengths.tolist() == [12, 12, 12] and not out.stopped.any()


def test_more_prompts_than_rows_and_the_order_of_prompts_do_not_matter():
    definition, params = model()
    how = {"max_new_tokens": 6, "temperature": 0.8, "seed": 5}
    whole = Engine(definition, params, batch_size=4).generate_batch(PROMPTS, **how)
    parts = Engine(definition, params, batch_size=2).generate_batch(PROMPTS, **how)
    assert whole.tokens == parts.tokens
    alone = Engine(definition, params, batch_size=4).generate_batch(PROMPTS[2:], first_request=2, **how)
    assert whole.tokens[2] == alone.tokens[0]
    same = Engine(definition, params, batch_size=4).generate_batch([PROMPTS[0]] * 4, **how)
    assert len({tuple(tokens) for tokens in same.tokens}) == 4


def test_stop_tokens_end_a_row_and_are_part_of_it():
    definition, params = model()
    expected = reference()[1][0]
    stop = expected[4]
    out = Engine(definition, params, eos_ids=[stop]).generate_batch(PROMPTS, max_new_tokens=12)
    for tokens, stopped, (full, _) in zip(out.tokens, out.stopped, reference(), strict=True):
        cut = full[: full.index(stop) + 1] if stop in full else full
        assert tokens == cut and stopped == (stop in full)
    first = Engine(definition, params, eos_ids=[expected[0]]).generate_batch([PROMPTS[1]], max_new_tokens=12)
    assert first.tokens == [[expected[0]]] and first.stopped.all()


def test_one_token_and_a_full_cache():
    definition, params = model()
    small = Engine(definition, params, cache_size=19)
    out = small.generate_batch(PROMPTS, max_new_tokens=12)  # 7 + 12: not one slot to spare
    assert out.tokens == [tokens for tokens, _ in reference()]
    assert small.generate_batch(PROMPTS, max_new_tokens=1).tokens == [tokens[:1] for tokens, _ in reference()]


def test_new_settings_weights_and_engines_compile_nothing():
    definition, params = model()
    run = functools.partial(Engine(definition, params, eos_ids=[3]).generate_batch, PROMPTS)
    run(max_new_tokens=12)
    compiled = engine._generate_batch._cache_size()
    run(max_new_tokens=11, temperature=0.7)
    run(max_new_tokens=10, temperature=1.3, seed=4)
    run(max_new_tokens=12, temperature=1.0, top_k=3)
    run(max_new_tokens=12, temperature=1.0, top_p=0.5)
    halved = jax.tree.map(lambda x: 0.5 * x, params)
    Engine(definition, halved, eos_ids=[7]).generate_batch([[9] * 5, [2], [3]], max_new_tokens=12)
    assert engine._generate_batch._cache_size() == compiled


# ------------------------------------------------------------ slots


@pytest.mark.parametrize("scan_layers", [True, False])
def test_slots_are_filled_while_others_generate_and_used_again(scan_layers):
    definition, params = model(scan_layers)
    expected = [tokens for tokens, _ in reference(scan_layers)]
    decoder = Engine(definition, params, batch_size=2, cache_size=32)
    state = decoder.init_state()
    prefix = decoder.prefill([PROMPTS[0]], max_new_tokens=12)
    state = decoder.insert(prefix, state, [1])
    slots = {1: [int(prefix.tokens[0])]}
    for _ in range(3):
        state, step = decoder.generate(state)
        assert step.valid.tolist() == [False, True]
        slots[1].append(int(step.tokens[1]))
    prefix = decoder.prefill([PROMPTS[1]], max_new_tokens=5)
    state = decoder.insert(prefix, state, [0])
    slots[0] = [int(prefix.tokens[0])]
    state = drain(decoder, state, slots)
    assert slots[1] == expected[0] and slots[0] == expected[1][:5]
    # Free slots that idled past the end of their cache take a new request.
    for _ in range(40):
        state, step = decoder.generate(state)
        assert not step.valid.any() and not step.finished.any()
    prefix = decoder.prefill([PROMPTS[2], PROMPTS[1]], max_new_tokens=12)
    state = decoder.insert(prefix, state, [1, 0])
    slots = {1: [int(prefix.tokens[0])], 0: [int(prefix.tokens[1])]}
    drain(decoder, state, slots)
    assert slots == {1: expected[2], 0: expected[1]}


def test_slots_draw_what_the_batch_draws_and_report_their_end():
    definition, params = model()
    how = {"max_new_tokens": 8, "temperature": 1.2, "top_k": 20, "seed": 11}
    stop = Engine(definition, params).generate_batch(PROMPTS, **how).tokens[0][3]
    decoder = Engine(definition, params, batch_size=4, cache_size=32, eos_ids=[stop])
    batch = decoder.generate_batch(PROMPTS, **how)
    prefix = decoder.prefill(PROMPTS, **how)
    state = decoder.insert(prefix, decoder.init_state(), [3, 1, 0])
    tokens = {slot: [int(prefix.tokens[row])] for row, slot in enumerate([3, 1, 0])}
    ends = {}
    while state.active.any():
        state, step = decoder.generate(state)
        for slot in tokens:
            if step.valid[slot]:
                tokens[slot].append(int(step.tokens[slot]))
            if step.finished[slot]:
                ends[slot] = bool(step.stopped[slot])
    assert [tokens[slot] for slot in (3, 1, 0)] == batch.tokens
    assert all(ends[slot] == batch.stopped[row] for row, slot in enumerate([3, 1, 0]) if slot in ends)
    assert 3 in ends and ends[3]


def test_generating_in_slots_compiles_once():
    definition, params = model()
    decoder = Engine(definition, params, batch_size=3, cache_size=64)
    state = decoder.init_state()
    sizes = []
    for number, how in enumerate([{}, {"temperature": 0.5}, {"temperature": 1.0, "top_p": 0.3, "seed": 2}]):
        state = decoder.insert(decoder.prefill([PROMPTS[number]], max_new_tokens=30, **how), state, [number])
        state, _ = decoder.generate(state)
        sizes.append([f._cache_size() for f in (engine._prefill_rows, engine._insert, engine._generate_step)])
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_state_is_donated():
    definition, params = model()
    decoder = Engine(definition, params, batch_size=2, cache_size=16)
    state = decoder.init_state()
    decoder.generate(state)
    assert jax.tree.leaves(state.cache.layers)[0].is_deleted()


def test_bfloat16_generates():
    definition, params = model(dtype="bfloat16")
    out = Engine(definition, params).generate_batch(PROMPTS, max_new_tokens=4)
    assert all(np.isfinite(logps).all() and logps.dtype == np.float32 for logps in out.logps)


# ------------------------------------------------------------ scores


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_the_sampled_logps_and_the_full_logits(temperature):
    definition, params = model()
    out = Engine(definition, params).generate_batch(PROMPTS, max_new_tokens=12, temperature=temperature)
    sequences = [prompt + tokens for prompt, tokens in zip(PROMPTS, out.tokens, strict=True)]
    scored = sequence_logps(definition, params, sequences, temperature=temperature, batch_size=2)
    for prompt, ids, logps, sampled in zip(PROMPTS, sequences, scored, out.logps, strict=True):
        assert logps.shape == (len(ids) - 1,)
        np.testing.assert_allclose(logps[len(prompt) - 1 :], sampled, atol=1e-5)
        logits = definition.merge(params)(jnp.asarray([ids]))[0][0] / temperature
        full = jax.nn.log_softmax(logits)[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])]
        # 2e-5 is some twenty units in the last place of logits of size 10, which are summed in another order.
        np.testing.assert_allclose(logps, full, atol=2e-5)


def test_scoring_never_holds_all_logits():
    definition, _ = model()
    wide = ModelDefinition(CONFIG.model_copy(update={"max_seq_len": 512, "vocab_size": 96}), definition.execution)
    ids = jax.ShapeDtypeStruct((2, 320), jnp.int32)
    text = str(jax.make_jaxpr(lambda p, x: token_logps(wide.merge(p), x, x))(wide.shapes, ids))
    assert "f32[2,64,96]" in text and "f32[2,320,96]" not in text


def test_bad_sequences_are_refused():
    definition, params = model()
    for sequences, message in [
        ([[1], []], "sequence 1 has 0 tokens"),
        ([[1] * 65], "max_seq_len=64"),
        ([[64]], "0 to 63"),
    ]:
        with pytest.raises(UserError, match=message):
            sequence_logps(definition, params, sequences)
    with pytest.raises(UserError, match="temperature=0"):
        sequence_logps(definition, params, [[1, 2]], temperature=0)
    assert sequence_logps(definition, params, [[1]])[0].shape == (0,)


# ------------------------------------------------------------ bad input


def test_bad_prompts_and_sizes_are_refused_in_one_line():
    definition, params = model()
    small = Engine(definition, params, cache_size=16)
    for prompts, how, message in [
        ([[1], []], {"max_new_tokens": 1}, "prompt 1 is empty"),
        ([], {}, "no prompts"),
        (
            [[1] * 10],
            {"max_new_tokens": 7},
            "10 tokens, with max_new_tokens=7 that is 17: the cache holds 16",
        ),
        ([[1] * 10], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[64]], {"max_new_tokens": 1}, "ids from 64 to 64; allowed: 0 to 63"),
    ]:
        for call in (small.generate_batch, small.prefill):
            with pytest.raises(UserError, match=message) as error:
                call(prompts, **how)
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="max_seq_len=64"):
        Engine(definition, params, cache_size=65)
    with pytest.raises(UserError, match="vocabulary"):
        Engine(definition, params, eos_ids=[64])
    with pytest.raises(UserError, match="batch_size=0"):
        Engine(definition, params, batch_size=0)
    prefix = small.prefill([[1], [2]], max_new_tokens=2)
    for slots in ([0], [0, 0], [0, 8], [-1, 0]):
        with pytest.raises(UserError, match="2 different numbers below 8"):
            small.insert(prefix, small.init_state(), slots)


# ------------------------------------------------------------ text


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of ids as letters from "0" on, with a chat template."""

    eos_id: int | None = None
    chat_template: str = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"
    special: dict = dataclasses.field(default_factory=dict)

    def encode(self, text):
        return [ord(letter) - 48 for letter in text]

    def decode(self, ids, skip_special=False):
        return "".join(chr(48 + token) for token in ids if not (skip_special and token == self.eos_id))


@dataclasses.dataclass(frozen=True)
class Loaded:
    definition: ModelDefinition
    params: dict
    tokenizer: Letters | None
    source: str = "a-model"
    mesh: None = None


def test_text_and_messages_in_one_list():
    tokenizer = Letters()
    loaded = Loaded(*model(), tokenizer)
    messages = [{"role": "user", "content": "AB"}]
    assert encode(tokenizer, messages) == encode(tokenizer, "AB>")
    both = generate(loaded, [messages, "AB>"], max_new_tokens=5)
    assert both[0] == both[1] and len(both[0]) == 5
    compiled = engine._generate_batch._cache_size()
    generate(loaded, ["CD", "E"], max_new_tokens=5, temperature=1.0, seed=1, top_p=0.9)
    assert engine._generate_batch._cache_size() == compiled
    stop = tokenizer.encode(both[0])[2]
    ended = generate(dataclasses.replace(loaded, tokenizer=Letters(eos_id=stop)), ["AB>"], max_new_tokens=5)[0]
    assert ended == both[0][: both[0].index(chr(48 + stop))]


def test_bad_text_is_refused():
    loaded = Loaded(*model(), Letters())
    for prompts, message in [
        ("AB", "must be a list"),
        ([{"role": "user", "content": "A"}], "prompt 0 is one message"),
        (["A", ""], "prompt 1 is empty"),
        ([[{"role": "nobody", "content": "A"}]], "role 'nobody'"),
        (["A" * 60], "60 tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            generate(loaded, prompts)
    with pytest.raises(UserError, match="a-model has no tokenizer"):
        generate(dataclasses.replace(loaded, tokenizer=None), ["A"])


# ------------------------------------------------------------ meshes

ON_A_MESH = """
import json, sys
import jax, numpy as np
from maxkit.infer import Engine, sequence_logps
from maxkit.mesh import make_mesh
from maxkit.models.config import BlockSpec, Execution, ModelConfig
from maxkit.models.definition import ModelDefinition

config = ModelConfig.model_validate_json(sys.argv[1])
prompts, out = json.loads(sys.argv[2]), {}
for scan_layers, description in ((True, "fsdp:4,tensor:2"), (False, "fsdp:2,tensor:4")):
    definition = ModelDefinition(config, Execution(scan_layers=scan_layers))
    mesh = make_mesh(description)
    params = jax.tree.map(lambda x: 1.5 * x, definition.init(0, mesh))
    decoder = Engine(definition, params, batch_size=4, cache_size=32, mesh=mesh)
    greedy = decoder.generate_batch(prompts, max_new_tokens=12)
    drawn = decoder.generate_batch(prompts, max_new_tokens=12, temperature=0.9, top_k=30, top_p=0.95, seed=3)
    prefix = decoder.prefill(prompts[:2], max_new_tokens=12)
    state = decoder.insert(prefix, decoder.init_state(), [2, 0])
    slot = [int(prefix.tokens[0])]
    for _ in range(11):
        state, step = decoder.generate(state)
        slot.append(int(step.tokens[2]))
    scored = sequence_logps(definition, params, prompts, mesh=mesh)
    out[f"{scan_layers} {description}"] = [
        greedy.tokens, [x.tolist() for x in greedy.logps], drawn.tokens, slot, [x.tolist() for x in scored]
    ]
print(json.dumps(out))
"""


def test_eight_devices_equal_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, CONFIG.model_dump_json(), json.dumps(PROMPTS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    definition, params = model()
    here = Engine(definition, params, batch_size=4, cache_size=32)
    greedy = here.generate_batch(PROMPTS, max_new_tokens=12)
    drawn = here.generate_batch(PROMPTS, max_new_tokens=12, temperature=0.9, top_k=30, top_p=0.95, seed=3)
    scored = sequence_logps(definition, params, PROMPTS)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2
    for tokens, logps, drawn_tokens, slot, scores in found.values():
        assert tokens == greedy.tokens and drawn_tokens == drawn.tokens and slot == greedy.tokens[0]
        # Logits of size 10 in float32, summed in another order: some twenty units in the last place.
        np.testing.assert_allclose(np.concatenate(logps), np.concatenate(greedy.logps), atol=2e-5)
        np.testing.assert_allclose(np.concatenate(scores), np.concatenate(scored), atol=1e-5)

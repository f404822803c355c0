# SPDX-License-Identifier: Apache-2.0
"""Every case of tests/fixtures/tunix_parity.json: numbers of Tunix 0.1.7 and its head, and TRL's formulas by hand.

The objectives themselves run, on a model whose logits are those of the file: hidden states are logits, the head is the
identity. What a file's case has and an objective does not report is computed from the formulas.
"""

import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit import ops
from maxkit.objectives import Policy, Preference, policy, preference
from maxkit.rl import advantages
from maxkit.types import Batch, Hidden

FILE = json.loads((Path(__file__).parent.parent / "fixtures" / "tunix_parity.json").read_text())
ATOL = FILE["meta"]["tolerances"]["loss"]  # 2e-5: float32 there, float32 here
PROMPT, VOCAB = 3, 9


class GivenLogits:
    """A model whose logits are its parameters."""

    config = types.SimpleNamespace(final_soft_cap=None, vocab_size=VOCAB)

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, tokens, positions=None, *, segment_ids=None):
        return Hidden(self.logits, None, {})

    def head_operands(self, x):
        return x, jnp.eye(VOCAB)


def rows(prompts, completions, masks):
    """A batch of one sequence a row, targets shifted; the mask is that of the completions' targets."""
    tokens = np.concatenate([prompts, completions], axis=1)
    mask = np.zeros(tokens.shape)
    mask[:, PROMPT - 1 : -1] = masks
    targets = np.roll(tokens, -1, axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    ids = [jnp.asarray(x, jnp.int32) for x in (tokens, targets, np.ones_like(tokens), positions)]
    return Batch(ids[0], ids[1], jnp.asarray(mask, jnp.float32), *ids[2:])


def at_targets(values):
    """[B, 8] of the completions' [B, 5], or of one number a row."""
    values = np.asarray(values, np.float32)
    values = np.broadcast_to(values[:, None], (len(values), 5)) if values.ndim == 1 else values
    return jnp.asarray(np.pad(values, ((0, 0), (PROMPT - 1, 1))))


def completions(x):
    return np.asarray(x)[:, PROMPT - 1 : -1]


def close(found, wanted, name=""):
    np.testing.assert_allclose(found, wanted, atol=ATOL, rtol=0, err_msg=name)


# ---------------------------------------------------------------- policy

RL = FILE["rl_inputs"]
LOGITS = jnp.asarray(RL["logits"], jnp.float32)
MASK = jnp.asarray(RL["completion_mask"], jnp.float32)
ADVANTAGES = RL["advantages"] | {"trl": RL["trl_advantages_eps1e_4"]}
AGGREGATIONS = {
    "sequence-mean-token-mean": {"aggregation": "sequence_mean"},
    "token-mean": {"aggregation": "token_mean"},
    "seq-mean-token-sum": {"aggregation": "sequence_sum"},
    "sequence-mean-token-sum-norm": {"aggregation": "sequence_sum"},  # whose norm nobody sets: the sequences
    "sequence-mean-token-scale": {"aggregation": "sequence_scale", "max_tokens": 5},
}
KL = {"kl": "k1", "mse_kl": "k2", "low_var_kl": "k3"}


def run_policy(objective, advantage):
    """(loss, metrics, d loss / d log-prob of each completion token)."""
    columns = {
        "advantages": at_targets(ADVANTAGES[advantage]),
        "old_logps": at_targets(RL["old_logps"]),
        "ref_logps": at_targets(RL["ref_logps"]),
    }
    batch = rows(RL["prompt_ids"], RL["completion_ids"], RL["completion_mask"])
    batch = Batch(**{**vars(batch), "columns": columns})

    def loss(logits):
        out = objective(GivenLogits(logits), batch, None, objective.weights(batch))
        return out.loss, out.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(LOGITS)
    take = lambda x: np.take_along_axis(np.asarray(x), np.asarray(batch.targets)[..., None], 2)[..., 0]  # noqa: E731
    return value, metrics, completions(take(gradient) / (1 - take(jax.nn.softmax(LOGITS))))


def test_inputs_are_our_log_probs():
    batch = rows(RL["prompt_ids"], RL["completion_ids"], np.ones_like(RL["completion_mask"]))
    logps, _ = ops.token_logps(LOGITS, jnp.eye(VOCAB), batch.targets, batch.loss_mask)
    close(completions(logps), RL["logps"])


@pytest.mark.parametrize("name", FILE["tunix_rl_cases"])
def test_policy_of_tunix(name):
    case = FILE["tunix_rl_cases"][name]
    given, want = case["params"], dict(case["outputs"])
    sequence = given["loss_algo"] == "gspo-token"
    how = AGGREGATIONS[given["loss_agg_mode"]]
    objective = Policy(
        **how,
        ratio_level="sequence" if sequence else "token",
        epsilon_low=given["epsilon"],
        epsilon_high=given["epsilon_high"],
        dual_clip=given["epsilon_c"],
        beta=given["beta"] or 0.0,
        kl_estimator=KL[given["kl_loss_mode"]],
        temperature=given["temperature"],
    )
    advantage = "drgrpo_mean_only" if name.startswith("drgrpo") else "grpo_std_ddof1_eps1e-6"
    loss, metrics, gradient = run_policy(objective, advantage)
    close(loss, want.pop("loss"), "loss")
    close(gradient, want.pop("dloss_dlogps"), "gradient")
    close(metrics["clip_ratio/region_mean"], want.pop("pg_clipfrac"), "clip fraction")

    logps, old, reference = (jnp.asarray(RL[key], jnp.float32) for key in ("logps", "old_logps", "ref_logps"))
    kl, ratio = policy.kl(logps, reference, objective.kl_estimator), policy.log_ratios(logps, old, MASK)
    total = functools.partial(policy.aggregate, mask=MASK, **how)
    mean = functools.partial(policy.aggregate, mask=MASK)
    close(total(kl), want.pop("kl_loss"))
    close(mean(kl), want.pop("kl_token_mean"))
    if objective.kl_estimator == "k3":
        close(metrics["kl"], mean(kl))
    close(loss - objective.beta * total(kl), want.pop("pg_loss"))
    close(-mean(ratio), want.pop("ppo_kl"))
    level = policy.log_ratios(logps, old, MASK, level=objective.ratio_level)
    close(mean(jnp.exp(level)), want.pop("is_ratio_mean"))
    _, entropy = ops.token_logps(LOGITS[:, PROMPT - 1 : -1], jnp.eye(VOCAB), jnp.zeros(MASK.shape, int), MASK)
    close(total(entropy), want.pop("entropy"))
    close(metrics["entropy"], mean(entropy))
    assert not want, f"not checked: {list(want)}"


TRL = {
    "grpo|adv eps1e-4|beta .04|eps .2": (Policy("sequence_mean", beta=0.04), "trl"),
    "bnpo|adv eps1e-4|beta .04|eps .2": (Policy("token_mean", beta=0.04), "trl"),
    "dapo|adv eps1e-4|beta .04|eps .2": (Policy("token_mean", beta=0.04), "trl"),
    "dr_grpo|adv eps1e-4|beta .04|eps .2": (Policy("sequence_scale", beta=0.04, max_tokens=5), "trl"),
    "dapo|eps .2/.28|beta 0": (Policy("token_mean", epsilon_high=0.28), "trl"),
    "dr_grpo|scale_rewards none|beta 0": (Policy("sequence_scale", max_tokens=5), "drgrpo_mean_only"),
    "grpo two-sided delta 1.2|beta 0": (Policy("sequence_mean", dual_clip=1.2), "trl"),
    "grpo|same advantages as tunix|beta .04": (Policy("sequence_mean", beta=0.04), "grpo_std_ddof1_eps1e-6"),
}


@pytest.mark.parametrize("name", FILE["trl_by_hand"])
def test_policy_of_trl(name):
    close(run_policy(*TRL[name])[0], FILE["trl_by_hand"][name])


def test_kl_estimates_of_every_token():
    """To the 8 digits of the file: they are of size 0.5 in float32."""
    assert set(RL["kl_per_token"]) == set(KL)
    for name, wanted in RL["kl_per_token"].items():
        found = policy.kl(*(jnp.asarray(RL[key], jnp.float32) for key in ("logps", "ref_logps")), KL[name])
        close(found * MASK, wanted)


# ---------------------------------------------------------------- advantages

GROUP_OF_4 = FILE["advantages_group_of_4"]
ESTIMATES = [
    (RL["rewards"], 2, RL["advantages"]["grpo_std_ddof1_eps1e-6"], advantages.group_std),
    (RL["rewards"], 2, RL["advantages"]["drgrpo_mean_only"], advantages.group_mean),
    (RL["rewards"], 2, RL["advantages"]["rloo"], advantages.leave_one_out),
    (RL["rewards"], 2, RL["trl_advantages_eps1e_4"], functools.partial(advantages.group_std, epsilon=1e-4)),
    (GROUP_OF_4["rewards"], 4, GROUP_OF_4["tunix_grpo"], advantages.group_std),
    (GROUP_OF_4["rewards"], 4, GROUP_OF_4["tunix_drgrpo"], advantages.group_mean),
    (GROUP_OF_4["rewards"], 4, GROUP_OF_4["tunix_rloo"], advantages.leave_one_out),
    (
        GROUP_OF_4["rewards"],
        4,
        GROUP_OF_4["trl_group_std_eps1e-4"],
        functools.partial(advantages.group_std, epsilon=1e-4),
    ),
]


@pytest.mark.parametrize("case", range(len(ESTIMATES)))
def test_advantages(case):
    rewards, size, wanted, estimate = ESTIMATES[case]
    np.testing.assert_allclose(estimate(rewards, size), wanted, atol=FILE["meta"]["tolerances"]["advantages"], rtol=0)


def test_one_deviation_for_the_batch_is_group_mean_over_it():
    """TRL's `scale_rewards="batch"`, from the two parts it is made of."""
    rewards = np.asarray(GROUP_OF_4["rewards"])
    found = advantages.group_mean(rewards, 4) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found, GROUP_OF_4["trl_batch_std_eps1e-4"], atol=1e-6)


def test_generalised_advantages():
    gae = FILE["gae"]
    found, returns = advantages.generalised(
        gae["token_rewards"], gae["values"], gae["mask"], gamma=gae["gamma"], lam=gae["lam"]
    )
    np.testing.assert_allclose(returns, gae["returns"], atol=1e-6)
    np.testing.assert_allclose(advantages.whiten(found, gae["mask"]), gae["advantages_whitened"], atol=2e-6)


# ---------------------------------------------------------------- preference

PREFERENCE = FILE["preference_inputs"]
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (
    jnp.asarray(PREFERENCE[key], jnp.float32)
    for key in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
)
LENGTHS = jnp.asarray(PREFERENCE["completion_mask"], jnp.float32).sum(axis=1)
CHOSEN_MEAN, REJECTED_MEAN = CHOSEN / LENGTHS[:2], REJECTED / LENGTHS[2:]
NAMES = {
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "rewards/margin": "rewards/margins",
    "rewards/accuracy": "rewards/accuracies",
    "log_probs/chosen": "logps/chosen",
    "log_probs/rejected": "logps/rejected",
}


def run_preference(objective, reference=True):
    """(loss, metrics) of the file's two pairs, each in one row; a pair's reference lies on its first trained token."""
    prompts, masks = PREFERENCE["prompt_ids"], np.asarray(PREFERENCE["completion_mask"])
    sides = rows(prompts + prompts, PREFERENCE["completion_ids_chosen_then_rejected"], masks)
    paired = jax.tree.map(lambda x: jnp.concatenate([x[:2], x[2:]], axis=1), sides)
    real = jnp.concatenate([jnp.ones((4, PROMPT), int), jnp.asarray(masks)], axis=1)
    segments = jnp.concatenate([real[:2], 2 * real[2:]], axis=1)
    at = np.zeros((2, 16), np.float32)
    if reference:
        at[:, PROMPT - 1], at[:, 8 + PROMPT - 1] = REF_CHOSEN, REF_REJECTED
    batch = Batch(**{**vars(paired), "segment_ids": segments, "columns": {"ref_logps": jnp.asarray(at)}})
    logits = jnp.asarray(PREFERENCE["logits"], jnp.float32)
    model = GivenLogits(jnp.concatenate([logits[:2], logits[2:]], axis=1))
    out = jax.jit(lambda: objective(model, batch, None, objective.weights(batch)))()
    return out.loss, out.metrics


@pytest.mark.parametrize("name", FILE["tunix_dpo"])
def test_dpo_of_tunix(name):
    free = "reference-free" in name
    beta = 0.5 if "beta 0.5" in name else 0.1
    smoothing = 0.1 if name.endswith("smoothing 0.1") else 0.0
    loss, metrics = run_preference(Preference("sigmoid", beta, smoothing), reference=not free)
    want = dict(FILE["tunix_dpo"][name])
    close(loss, want.pop("loss"))
    for theirs, value in want.items():
        close(metrics[NAMES[theirs]], value, theirs)
    margins = CHOSEN - REJECTED if free else (CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED)
    close(preference.sigmoid(margins, beta, smoothing).mean(), loss)


def test_other_losses_of_trl():
    wanted = dict(FILE["dpo_other_losses_by_hand"])
    assert wanted.pop("sigmoid = tunix") is True
    close(run_preference(Preference("robust", 0.1, 0.1))[0], wanted.pop("robust|beta .1|ls .1"))
    simpo = wanted.pop("simpo-style (CPO simpo, beta 2, gamma .5, avg logps, no ref)")
    close(run_preference(Preference("simpo", 2.0, margin=0.5))[0], simpo)
    assert not wanted


def test_orpo_is_the_mean_over_tokens_of_the_answer():
    """Between TRL, which counts the prompt too, and Tunix's head, which takes a mean of sequence means."""
    loss, metrics = run_preference(Preference("orpo", 0.1), reference=False)
    close(loss, FILE["orpo"]["hand: avg logps; nll token-mean over completion only"]["loss"])
    like_head = FILE["orpo"]["tunix git c7d8950f|prompt_loss False|avg True"]
    for theirs, name in NAMES.items():
        close(metrics[name], like_head[theirs], theirs)


@functools.cache
def token_nll():
    """(nll, in the prompt, in the answer), each [4, 7]: of all targets, chosen rows first."""
    batch = rows(PREFERENCE["prompt_ids"] * 2, PREFERENCE["completion_ids_chosen_then_rejected"], np.ones((4, 5)))
    logits = jnp.asarray(PREFERENCE["logits"], jnp.float32)
    nll = -ops.token_logps(logits, jnp.eye(VOCAB), batch.targets, jnp.ones_like(batch.targets))[0][:, :-1]
    answer = np.pad(np.asarray(PREFERENCE["completion_mask"]), ((0, 0), (PROMPT - 1, 0)))
    prompt = np.pad(np.ones((4, PROMPT - 1)), ((0, 0), (0, 5)))
    return np.asarray(nll), prompt, answer


@pytest.mark.parametrize("name", [name for name in FILE["orpo"] if not name.startswith("hand")])
def test_orpo_of_others(name):
    """Their variants from the same formula: which log-probs it is given, and whose likelihood is added."""
    want = FILE["orpo"][name]
    average = "avg True" in name or name.startswith("trl")
    smoothing = 0.1 if name.endswith("smoothing .1") else 0.0
    chosen, rejected = (CHOSEN_MEAN, REJECTED_MEAN) if average else (CHOSEN, REJECTED)
    odds = preference.odds_ratio(chosen, rejected, smoothing).mean()
    nll, prompt, answer = token_nll()
    counted = (answer + prompt if "prompt_loss True" in name or name.startswith("trl") else answer)[:2]
    sums = (nll[:2] * counted).sum(axis=1)
    if name.startswith("trl"):
        likelihood = sums.sum() / counted.sum()
        close(likelihood, want["nll"])
        close(jnp.mean(_log_odds(chosen, rejected)), want["log_odds_mean"])
    else:
        per_sequence = "0.1.7" in name or average
        likelihood = (sums / counted.sum(axis=1) if per_sequence else sums).mean()
        close(likelihood, want["sft_loss"])
        close(jnp.mean(jnp.exp(_log_odds(chosen, rejected))), want["odds_ratio"])
        close(0.1 * chosen.mean(), want["rewards/chosen"])
        close(0.1 * rejected.mean(), want["rewards/rejected"])
        close(chosen.mean(), want["log_probs/chosen"])
        close(rejected.mean(), want["log_probs/rejected"])
    close(odds, want["or_loss"])
    close(likelihood + 0.1 * odds, want["loss"])


def _log_odds(chosen, rejected):
    return (chosen - rejected) - (jnp.log1p(-jnp.exp(chosen)) - jnp.log1p(-jnp.exp(rejected)))


# ---------------------------------------------------------------- SFT


def test_sft_of_tunix():
    batch = rows(RL["prompt_ids"], RL["completion_ids"], RL["completion_mask"])
    assert np.array_equal(np.asarray(batch.loss_mask)[:, :-1], np.asarray(FILE["sft"]["input_mask"])[:, 1:])
    nll, _ = ops.cross_entropy(LOGITS, jnp.eye(VOCAB), batch.targets, batch.loss_mask)
    close(nll / batch.loss_mask.sum(), FILE["sft"]["loss"])

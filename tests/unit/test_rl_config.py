# SPDX-License-Identifier: Apache-2.0
import pytest

from maxkit.config import RecipeConfig
from maxkit.objectives.policy import Policy
from maxkit.rl.config import ALGORITHMS, RlConfig


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_arguments_of_one_objective(algorithm):
    cfg = RlConfig(algorithm=algorithm, temperature=0.7, num_vocab_tiling=2, max_new_tokens=32)
    policy, row = Policy(**cfg.policy_arguments()), ALGORITHMS[algorithm]
    assert (policy.aggregation, policy.ratio_level) == (row.aggregation, row.ratio_level)
    assert (policy.epsilon_low, policy.epsilon_high) == (row.epsilon_low, row.epsilon_high)
    assert (policy.temperature, policy.num_tiles, policy.beta, policy.kl_estimator) == (0.7, 2, 0.0, "k3")
    assert policy.max_tokens == (32 if algorithm == "dr_grpo" else None)
    assert cfg.choice("dynamic_sampling") == (algorithm == "dapo")


def test_what_is_given_wins_over_the_algorithm():
    cfg = RlConfig(
        algorithm="dapo",
        epsilon_high=0.5,
        aggregation="sequence_scale",
        advantage="leave_one_out",
        dynamic_sampling=False,
    )
    arguments = cfg.policy_arguments()
    assert (arguments["epsilon_low"], arguments["epsilon_high"]) == (0.2, 0.5)
    assert (arguments["aggregation"], arguments["max_tokens"]) == ("sequence_scale", 64)
    assert cfg.choice("advantage") == "leave_one_out" and cfg.choice("dynamic_sampling") is False
    assert RlConfig(algorithm="dapo", epsilon_low=0.0).policy_arguments()["epsilon_low"] == 0.0  # 0 was given, too


def test_columns_follow_from_what_is_needed():
    assert RlConfig().policy_columns == ("advantages",)
    assert RlConfig(beta=0.1).policy_columns == ("advantages", "ref_logps")
    assert RlConfig(beta=0.1, epochs_per_rollout=2).policy_columns == ("advantages", "old_logps", "ref_logps")
    assert RlConfig(batches_per_rollout=2).policy_columns == ("advantages", "old_logps")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": 12}, "batch_size=12 times batches_per_rollout=1 must be a multiple of num_generations=8"),
        ({"max_new_tokens": 256}, "max_new_tokens=256 do not fit into seq_len=256"),
        ({"max_prompt_length": 200}, "max_prompt_length=200 and max_new_tokens=64 do not fit into seq_len=256"),
        ({"overlong_buffer": 64}, "overlong_buffer=64 must be below max_new_tokens=64"),
        ({"dual_clip": 1.1}, r"dual_clip=1.1 must be at least 1 \+ epsilon_high = 1.2"),
        ({"num_generations": 1}, "greater than or equal to 2"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        RlConfig(**given)


def test_groups_may_span_the_updates_of_a_rollout():
    cfg = RlConfig(batch_size=12, batches_per_rollout=2)
    assert cfg.rollout_size == 24 and cfg.updates_per_rollout == 2 and cfg.prompt_limit == 192


def test_a_recipe_inherits_it():
    class Recipe(RlConfig, RecipeConfig):
        pass

    cfg = Recipe(num_generations=4)
    assert cfg.dataset == "arithmetic" and cfg.num_generations == 4 and cfg.learning_rate > 0

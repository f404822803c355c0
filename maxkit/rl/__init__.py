# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: prompts, rollouts, rewards, advantages, batches. Names are imported when first used."""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Answerer": "maxkit.rl.answers:Answerer",
        "EngineRollout": "maxkit.rl.rollout:EngineRollout",
        "RlConfig": "maxkit.rl.config:RlConfig",
        "Rollout": "maxkit.rl.rollout:Rollout",
        "RolloutBatches": "maxkit.rl.batches:RolloutBatches",
        "evaluate": "maxkit.rl.answers:evaluate",
        "load_prompts": "maxkit.rl.prompts:load_prompts",
        "parse_rewards": "maxkit.rl.rewards:parse_rewards",
    },
)

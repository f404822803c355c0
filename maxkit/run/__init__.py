# SPDX-License-Identifier: Apache-2.0
"""Runs of recipes: what notebooks and scripts call. `session.py` is a run that trains, `conversion.py` one that
converts, `evaluation.py` one that evaluates, `cards.py` what they show of themselves.
"""

from maxkit.run.cards import describe_artifacts
from maxkit.run.conversion import ConversionRun, RoundTrip, start_conversion
from maxkit.run.distillation import next_tokens, teacher
from maxkit.run.evaluation import EvaluationRun, start_evaluation
from maxkit.run.imitation import Imitated, imitate
from maxkit.run.session import Assessment, Evaluation, Run, start
from maxkit.run.tunix import GrpoTunixRun, start_grpo_tunix

__all__ = [
    "Assessment",
    "ConversionRun",
    "Evaluation",
    "EvaluationRun",
    "GrpoTunixRun",
    "RoundTrip",
    "Imitated",
    "Run",
    "describe_artifacts",
    "imitate",
    "next_tokens",
    "start",
    "start_conversion",
    "start_evaluation",
    "start_grpo_tunix",
    "teacher",
]

# SPDX-License-Identifier: Apache-2.0
"""Runs of recipes: what notebooks and scripts call. `session.py` is a run, `cards.py` what it shows of itself."""

from maxkit.run.cards import describe_artifacts
from maxkit.run.session import Assessment, Evaluation, Run, start

__all__ = ["Assessment", "Evaluation", "Run", "describe_artifacts", "start"]

# SPDX-License-Identifier: Apache-2.0
"""How good a model is: perplexity, multiple choice by likelihood, written answers. Names are imported when first used.

No name here may be that of a module beside it: importing the module would hide the function.
"""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "evaluate": "maxkit.eval.measures:evaluate",
        "Result": "maxkit.eval.measures:Result",
        "wilson_interval": "maxkit.eval.measures:wilson_interval",
        "Continuations": "maxkit.eval.likelihood:Continuations",
        "continuation_logps": "maxkit.eval.likelihood:continuation_logps",
        "TASKS": "maxkit.eval.tasks:TASKS",
        "Task": "maxkit.eval.tasks:Task",
        "find_task": "maxkit.eval.tasks:find_task",
    },
)

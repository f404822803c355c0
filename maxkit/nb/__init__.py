# SPDX-License-Identifier: Apache-2.0
"""What notebooks call: cards, progress, figures, checks, the record. Imported when first used.

No name here may be that of a module beside it: importing the module would hide the function.
"""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "hardware_card": "maxkit.nb.cards:hardware_card",
        "table": "maxkit.nb.cards:table",
        "text_card": "maxkit.nb.cards:text_card",
        "Progress": "maxkit.nb.progress:Progress",
        "loss_figure": "maxkit.nb.figures:loss_figure",
        "bars_figure": "maxkit.nb.figures:bars_figure",
        "intervals_figure": "maxkit.nb.figures:intervals_figure",
        "metrics_figure": "maxkit.nb.figures:metrics_figure",
        "report": "maxkit.nb.run_report:report",
        "expect": "maxkit.nb.checks:expect",
        "check_all": "maxkit.nb.checks:check_all",
        "write_report": "maxkit.nb.record:write_report",
        "write_json": "maxkit.nb.record:write_json",
    },
)

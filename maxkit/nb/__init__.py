# SPDX-License-Identifier: Apache-2.0
"""What notebooks call: parameters, cards, progress, figures, checks, the record. Imported when first used."""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "bind": "maxkit.nb.bind:bind",
        "hardware_card": "maxkit.nb.cards:hardware_card",
        "table": "maxkit.nb.cards:table",
        "Progress": "maxkit.nb.progress:Progress",
        "loss_figure": "maxkit.nb.figures:loss_figure",
        "bars_figure": "maxkit.nb.figures:bars_figure",
        "expect": "maxkit.nb.expect:expect",
        "check_all": "maxkit.nb.expect:check_all",
        "write_report": "maxkit.nb.record:write_report",
    },
)

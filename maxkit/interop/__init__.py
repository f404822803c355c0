# SPDX-License-Identifier: Apache-2.0
"""Other training libraries that can work on a maxkit model. Each is imported only by its own package in here."""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(__name__, {"tunix": "maxkit.interop.tunix"})

# SPDX-License-Identifier: Apache-2.0
"""MaxText's and Tunix's checkpoints: `open` one as `Contents`, `write` one. Imports neither JAX, Orbax nor MaxText."""

from maxkit.formats.maxtext.form import describe, maxtext_form
from maxkit.formats.maxtext.reader import MaxTextContents

__all__ = ["MaxTextContents", "describe", "maxtext_form", "open"]

open = MaxTextContents

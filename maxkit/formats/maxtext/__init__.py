# SPDX-License-Identifier: Apache-2.0
"""MaxText's and Tunix's checkpoints: `open` one as `Contents`, `write` one. Imports neither JAX, Orbax nor MaxText."""

from maxkit.formats.maxtext.form import describe, maxtext_form
from maxkit.formats.maxtext.reader import MaxTextContents
from maxkit.formats.maxtext.writer import Written, write

__all__ = ["MaxTextContents", "Written", "describe", "maxtext_form", "open", "write"]

open = MaxTextContents

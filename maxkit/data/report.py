# SPDX-License-Identifier: Apache-2.0
"""The count of what was read: every row is either kept or listed under the reason why not."""

import dataclasses
from typing import Literal, NamedTuple

Rejected = Literal["empty", "malformed", "duplicate", "too_long"]
MAX_EXAMPLES = 3


class RowExample(NamedTuple):
    """One rejected row: its number in its file (from 1), why, and the file."""

    row: int
    reason: str
    source: str = ""


@dataclasses.dataclass
class RowReport:
    """Rows by what became of them; `rows_read` is the sum of all but `truncated`, which counts kept rows.

    examples: up to three rejected or truncated rows for each name.
    """

    kept: int = 0
    empty: int = 0
    malformed: int = 0
    duplicate: int = 0
    too_long: int = 0
    truncated: int = 0
    examples: dict[str, list[RowExample]] = dataclasses.field(default_factory=dict)

    @property
    def rejected(self) -> int:
        """Rows that are not used."""
        return self.empty + self.malformed + self.duplicate + self.too_long

    @property
    def rows_read(self) -> int:
        """All rows seen."""
        return self.kept + self.rejected

    def reject(self, why: Rejected, row: int, reason: str, source: str = "") -> None:
        """Count a row that is not used."""
        setattr(self, why, getattr(self, why) + 1)
        self._note(why, RowExample(row, reason, source))

    def reject_kept(self, why: Rejected, row: int, reason: str, source: str = "") -> None:
        """Take back a row that was counted as kept, because a later stage cannot use it."""
        assert self.kept > 0, "no kept row to take back"
        self.kept -= 1
        self.reject(why, row, reason, source)

    def truncate(self, row: int, reason: str, source: str = "") -> None:
        """Count a kept row that was cut."""
        self.truncated += 1
        self._note("truncated", RowExample(row, reason, source))

    def lines(self) -> list[str]:
        """Text for display: the totals, then each kind of rejected row with its examples."""
        out = [f"{self.rows_read} rows read, {self.kept} kept, {self.rejected} not used"]
        for name in ("empty", "malformed", "duplicate", "too_long", "truncated"):
            if not (count := getattr(self, name)):
                continue
            out.append(f"  {name}: {count}")
            out += [f"    {f'{e.source} ' if e.source else ''}row {e.row}: {e.reason}" for e in self.examples[name]]
        return out

    def _note(self, name: str, example: RowExample) -> None:
        examples = self.examples.setdefault(name, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(example)

# SPDX-License-Identifier: Apache-2.0
"""Which projections get low-rank adapters. The adapters themselves live in `layers.Projection`. No JAX here."""

from pydantic import Field, field_validator

from maxkit.errors import UserError, nearest
from maxkit.models.config import Frozen

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


class LoraConfig(Frozen):
    """Rank, scale and place of the adapters: y += (alpha / rank) x A B on every projection named in `targets`."""

    rank: int = Field(gt=0)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = TARGETS

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for target in targets:
            if target not in TARGETS:
                raise UserError(f"lora target {target!r} matches no projection; {nearest(target, TARGETS)}")
        return targets

    def covers(self, path: str) -> bool:
        """Whether the projection at `path` (its last part is the projection's name) gets an adapter."""
        return path.rsplit("/", 1)[-1] in self.targets

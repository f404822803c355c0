# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): which matrices get them, and a recipe's parameters for them.

The adapters themselves live in `layers.Matrix`. docs/design/012-lora.md has the why. No JAX here.
"""

import fnmatch
from collections.abc import Collection
from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from maxkit.errors import UserError, nearest
from maxkit.models.config import Frozen

ALL = ("*",)
BaseWeightType = Literal["", "int8", "nf4"]


class LoraConfig(Frozen):
    """Rank, scale and place of the adapters: y += (alpha / rank) B A dropout(x) beside every matrix of `targets`.

    targets: names of projections (`query`), or shell patterns over their paths (`attention/*`, `experts/*`, `*`).
    dropout: the fraction of an adapter's inputs that is left out in training (the others are scaled up for it).
    base_weight_dtype: how the frozen matrices are stored; "" as they are.
    """

    rank: int = Field(gt=0)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = ALL
    dropout: float = Field(0.0, ge=0, lt=1)
    base_weight_dtype: BaseWeightType = ""

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied with."""
        return self.alpha / self.rank

    def covers(self, path: str) -> bool:
        """Whether the matrix at `path` (`layers/attention/query`) gets an adapter."""
        return any(matches(target, path) for target in self.targets)

    def check(self, paths: Collection[str]) -> None:
        """Refuse what this model, whose matrices are at `paths`, cannot do.

        Raises:
            UserError: no target, one that matches nothing, or dropout inside experts.
        """
        if not self.targets:
            raise UserError("lora_targets is empty: name projections, or '*' for all")
        for target in self.targets:
            if not any(matches(target, path) for path in paths):
                known = {path.rsplit("/", 1)[-1] for path in paths} | {path.split("/", 1)[-1] for path in paths}
                raise UserError(
                    f"lora_targets: {target!r} matches no projection of this model; {nearest(target, sorted(known))}"
                )
        inside = sorted(path for path in paths if "/experts/" in path and self.covers(path))
        if self.dropout and inside:
            raise UserError(
                f"lora_dropout={self.dropout} and lora_targets={','.join(self.targets)}: the adapters of experts take "
                f"no dropout ({inside[0]}); set lora_dropout to 0, or name targets without experts, such as attention/*"
            )


def matches(target: str, path: str) -> bool:
    """Whether a target names a matrix: its name, or a pattern of the end of its path from any `/` on."""
    return fnmatch.fnmatchcase(path, target) or fnmatch.fnmatchcase(path, f"*/{target}")


class LoraFields(BaseModel):
    """The parameters of a recipe that can train adapters instead of all weights."""

    lora_rank: int = Field(0, ge=0, description="Rank of LoRA matrices beside frozen weights; 0 trains all weights.")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA's product is scaled by lora_alpha / lora_rank.")
    lora_targets: tuple[str, ...] = Field(
        ALL, description="Projections with LoRA: names (query,value) or patterns (attention/*); * is all."
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Fraction of the inputs of LoRA matrices left out in training."
    )
    base_weight_dtype: BaseWeightType = Field(
        "", description="Storage of the frozen weights beside LoRA: int8 or nf4 (QLoRA); empty keeps their own."
    )

    @model_validator(mode="after")
    def _only_with_adapters(self) -> "LoraFields":
        if not self.lora_rank:
            for name in ("lora_targets", "lora_dropout", "base_weight_dtype"):
                if getattr(self, name) != LoraFields.model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs LoRA matrices: set lora_rank, for example 8"
                    )
        return self

    @field_validator("lora_targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("must name at least one projection; * is all of them")
        return targets

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None where all weights are trained."""
        if not self.lora_rank:
            return None
        return LoraConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets=self.lora_targets,
            dropout=self.lora_dropout,
            base_weight_dtype=self.base_weight_dtype,
        )

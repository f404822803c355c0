# SPDX-License-Identifier: Apache-2.0
"""How MaxText holds a model: the config of its weights, from any description of the model.

`describe` takes what a user gives as `config=`; `maxtext_form` is also what a writer restates weights to
(`formats/restated.py`).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from maxkit.errors import UserError, nearest
from maxkit.formats import presets
from maxkit.formats.hf_config.reader import read_config
from maxkit.formats.maxtext.facts import UNSCALED, Settings, block_of, decoder_block, model_config, settings_of
from maxkit.formats.maxtext.settings import DEFAULTS, read_settings
from maxkit.formats.restated import effective_blocks, same_meaning
from maxkit.models.config import ModelConfig

_BY_BLOCK = ("family", "leading_blocks", "pattern", "max_seq_len")  # compared block by block, or not said by MaxText


@dataclass(frozen=True)
class Description:
    """config: of the weights as MaxText holds them. settings: MaxText's, all of them. source: who says so.

    stated: whether the source speaks of MaxText's run, so that its `param_scan_axis` and `scan_layers` are evidence.
    """

    config: ModelConfig
    settings: Settings
    source: str
    stated: bool

    @property
    def block(self) -> str:
        """The decoder block."""
        return decoder_block(self.settings)


def describe(given: ModelConfig | str | Path) -> Description:
    """Read a description: a log or YAML of MaxText's settings, a config.json (or its folder), a preset, a ModelConfig.

    A published architecture (config.json, preset) stands for the weights that MaxText's converter makes of it; a
    ModelConfig for itself.

    Raises:
        UserError: no such file or preset, or a model that MaxText cannot hold.
    """
    if isinstance(given, ModelConfig):
        return Description(given, DEFAULTS | settings_of(given), "a ModelConfig", False)
    path = Path(given).expanduser()
    if not path.exists():
        if str(given) in presets.PRESETS:
            return Description(*maxtext_form(presets.preset_config(str(given))), f"preset {given}", False)
        tail = nearest(str(given), presets.PRESETS)
        raise UserError(f"config={given}: no such file, and no such preset: {tail}")
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return Description(*maxtext_form(read_config(path)), str(path), False)
    settings = read_settings(path)
    if path.suffix in (".yml", ".yaml"):
        settings = _resolved(settings, path)
    return Description(model_config(settings), settings, str(path), True)


def _resolved(found: Settings, path: Path) -> Settings:
    """Settings of a YAML over those of the model it names, over MaxText's defaults."""
    name = str(found.get("model_name", "default"))
    if "decoder_block" in found or name == "default":
        return DEFAULTS | found
    if name not in presets.PRESETS:
        raise UserError(
            f"config={path}: model_name={name!r} is not known, and the file has no decoder_block: give the log of "
            f"resolved settings; {nearest(name, presets.PRESETS)}"
        )
    _, base = maxtext_form(presets.preset_config(name))
    return base | {"model_name": name} | found


def maxtext_form(config: ModelConfig) -> tuple[ModelConfig, Settings]:
    """(the config of the same function as MaxText's weights hold it, MaxText's settings for it).

    Raises:
        UserError: MaxText computes no such model; names the fields.
    """
    block = block_of(config)
    if block == "gemma2" and config.num_layers % 2:
        raise UserError(f"num_layers={config.num_layers}: MaxText's decoder_block=gemma2 has its layers in pairs")
    offset = 1.0 if block in ("gpt3", "qwen3_next") else 0.0
    changes: dict[str, Any] = {"norm_scale_offset": offset, "embedding_scale": None}
    if block in UNSCALED:
        changes["attention_scale"] = 1.0
    elif block != "deepseek" and not _is_said(config, block):
        changes["attention_scale"] = None  # the quotient goes into the weights
    if config.tie_embeddings:
        changes["logit_scale"] = config.logit_scale / (config.embedding_scale or 1.0)
    kind = config.rope_scaling.kind if config.rope_scaling else None
    if kind in ("llama3", "linear"):
        changes["rope_interleaved"] = kind == "llama3"
    wanted = config.model_copy(update=changes)
    settings = DEFAULTS | settings_of(wanted)
    made = model_config(settings)
    compared = [name for name in ModelConfig.model_fields if name not in _BY_BLOCK]
    names = [name for name in compared if not same_meaning(wanted, made, name)]
    problems = [f"{name}={_shown(getattr(wanted, name))}" for name in names]
    problems += _differing_blocks(wanted, made)
    if problems:
        raise UserError(
            f"MaxText's decoder_block={settings['decoder_block']} cannot compute a {config.family} model with "
            f"{', '.join(problems)}"
        )
    return wanted, settings


def _is_said(config: ModelConfig, block: str) -> bool:
    """Whether MaxText's block has the factor on query . key that the config has."""
    said = [config.head_dim**-0.5]
    if block == "gemma3":
        said.append((config.embed_dim // config.num_heads) ** -0.5)
    return config.attention_scale is None or any(math.isclose(config.attention_scale, scale) for scale in said)


def _shown(value: Any) -> str:
    """A value for a message; of a config, what is not its default."""
    if isinstance(value, BaseModel):
        return f"({', '.join(f'{name}={part!r}' for name, part in value.model_dump(exclude_defaults=True).items())})"
    return repr(value)


def _differing_blocks(wanted: ModelConfig, made: ModelConfig) -> list[str]:
    """What the layers of one kind have that MaxText's have not: "sliding_window=4096 in layer 0"."""
    found = {}
    pairs = zip(effective_blocks(wanted), effective_blocks(made), strict=True)
    for layer, (ours, theirs) in enumerate(pairs):
        for name, value in ours.model_dump().items():
            if value != getattr(theirs, name):
                found.setdefault(name, f"{name}={value!r} in layer {layer}")
    return list(found.values())

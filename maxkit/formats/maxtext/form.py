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
from maxkit.models.config import ModelConfig, RopeScaling


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
    changes: dict[str, Any] = {"norm_scale_offset": 0.0, "embedding_scale": None}
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
    names = [name for name in ModelConfig.model_fields if not _agree(wanted, made, name)]
    problems = [f"{name}={_shown(getattr(wanted, name))}" for name in names]
    problems += _differing_blocks(wanted, made)
    if problems:
        raise UserError(
            f"MaxText's decoder_block={settings['decoder_block']} cannot compute a {config.family} model with "
            f"{', '.join(problems)}"
        )
    return made.model_copy(update={"family": config.family, "max_seq_len": config.max_seq_len}), settings


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
    for layer, (ours, theirs) in enumerate(zip(wanted.blocks, made.blocks, strict=True)):
        for name, value in ours.model_dump().items():
            without_effect = name == "rope_scaled" and wanted.rope_scaling is None
            if value != getattr(theirs, name) and not without_effect:
                found.setdefault(name, f"{name}={value!r} in layer {layer}")
    return list(found.values())


def _agree(wanted: ModelConfig, made: ModelConfig, name: str) -> bool:
    """Whether a field means the same in both."""
    ours, theirs = getattr(wanted, name), getattr(made, name)
    if ours == theirs or name in ("family", "leading_blocks", "pattern", "max_seq_len"):
        return True
    if name == "attention_scale":
        default = wanted.head_dim**-0.5
        return math.isclose(ours or default, theirs or default, rel_tol=1e-6)
    if name == "rope_scaling" and ours is not None and theirs is not None:
        return _same_scaling(wanted, made)
    if name == "moe" and ours is not None and theirs is not None:
        return _same_choice(ours.model_dump(), theirs.model_dump())
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return False


def _same_scaling(wanted: ModelConfig, made: ModelConfig) -> bool:
    """Whether two length scalings turn alike, whatever they are written with."""
    assert wanted.rope_scaling and made.rope_scaling
    ours, theirs = wanted.rope_scaling, made.rope_scaling
    plain = {"attention_factor", "mscale", "mscale_all_dim", "original_max_seq_len"}
    if ours.model_dump(exclude=plain) != theirs.model_dump(exclude=plain):
        return False
    if ours.kind == "linear":
        return True
    lengths = [c.rope_scaling.original_max_seq_len or wanted.max_seq_len for c in (wanted, made) if c.rope_scaling]
    return lengths[0] == lengths[1] and math.isclose(_magnitude(ours), _magnitude(theirs), rel_tol=1e-6)


def _magnitude(scaling: RopeScaling) -> float:
    """YaRN's factor on cos and sin, as in `models/rope.py`."""
    if scaling.attention_factor is not None or scaling.kind != "yarn":
        return scaling.attention_factor or 1.0
    weights = (scaling.mscale, scaling.mscale_all_dim) if scaling.mscale and scaling.mscale_all_dim else (1.0, 0.0)
    above, below = (0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0 for weight in weights)
    return above / below


def _same_choice(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two routers choose and weigh alike: the score of a group matters only where there are groups."""
    if ours["num_groups"] == theirs["num_groups"] == 1:
        ours["group_score"] = theirs["group_score"] = ""
    return ours == theirs

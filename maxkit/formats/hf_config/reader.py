# SPDX-License-Identifier: Apache-2.0
"""config.json to `ModelConfig` and back, for every family; no JAX.

`read_config` reads a file, `read_config_dict` its content, `config_json` writes. A key that changes the maths is read
or refused by name, a key that nobody knows is refused. Families: `dense.py`, `gemma.py`, `experts.py`, `latent.py`,
`hybrid.py`, `layer_norm.py`, `relatives.py`. Next to read: `family.py`.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from maxkit.errors import UserError, nearest
from maxkit.formats.hf_config import dense, experts, gemma, hybrid, keys, latent, layer_norm, relatives, rope
from maxkit.formats.hf_config.family import Family
from maxkit.models.config import ModelConfig, compress

_GROUPS = (dense, gemma, experts, latent, hybrid, layer_norm, relatives)
FAMILIES: dict[str, Family] = {family.name: family for group in _GROUPS for family in group.FAMILIES}
_WRAPPERS = {family.wrapper[0]: family for family in FAMILIES.values() if family.wrapper}
ARCHITECTURES: dict[str, str] = {
    **{family.architecture: family.name for family in FAMILIES.values()},
    **{architecture: family.name for architecture, family in _WRAPPERS.items()},
}
MODEL_TYPES: dict[str, str] = {
    **{family.model_type or family.name: family.name for family in FAMILIES.values()},
    **{name: family.name for family in FAMILIES.values() for name in family.other_model_types},
    **{family.wrapper[1]: family.name for family in FAMILIES.values() if family.wrapper},
}


def read_config(path: str | Path) -> ModelConfig:
    """The architecture that a config.json describes.

    Keys that are absent have the defaults of transformers' configuration classes (5.23).

    Raises:
        UserError: not a JSON object; an architecture, key or value that is not supported or not possible, by name.
    """
    path = Path(path)
    return read_config_dict(read_object(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a UserError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def read_config_dict(raw: dict[str, Any], where: str) -> ModelConfig:
    """`read_config` of a file's content; `where` begins every message."""
    family = find_family(raw, where)
    raw = _text_part(raw, family, where)
    _check_keys(raw, family, where)
    values = _values(raw, family, where)
    try:
        return ModelConfig.model_validate(_fields(values, family))
    except UserError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: describes no possible model: {at + ': ' if at else ''}{first['msg']}") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from None


def find_family(raw: dict[str, Any], where: str) -> Family:
    """The family of a file's content, from `architectures` or else `model_type`."""
    named = raw.get("architectures")
    if named:
        architecture, known = (named[0] if isinstance(named, list) else named), ARCHITECTURES
    else:
        architecture, known = raw.get("model_type"), MODEL_TYPES
    found = known.get(architecture) if isinstance(architecture, str) else None
    if found is None:
        name = str(architecture)[:80]
        raise UserError(f"{where}: architecture {name!r} is not supported: {nearest(name, known)}")
    family = FAMILIES[found]
    _check_own_code(raw.get("auto_map"), family, where)
    return family


def _check_own_code(auto_map: Any, family: Family, where: str) -> None:
    """Code in the model's folder may compute anything, unless it is known to be what transformers has by now."""
    if not auto_map:
        return
    named = [
        name.rpartition("--")[2] for name in (auto_map.values() if isinstance(auto_map, dict) else [auto_map])
        if isinstance(name, str)
    ]  # fmt: skip
    strange = [name for name in named if name not in family.own_code]
    if strange or not isinstance(auto_map, dict) or len(named) < len(auto_map):
        raise UserError(
            f"{where}: auto_map names code of its own ({(strange or ['?'])[0][:60]}), so what the model computes "
            f"cannot be known; if it is the {family.name} of transformers, remove auto_map"
        )


def _text_part(raw: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The text model's keys: `text_config` of a multimodal file, else the file itself."""
    architecture = (raw.get("architectures") or [None])[0] if isinstance(raw.get("architectures"), list) else None
    if family.wrapper is None or not (
        architecture == family.wrapper[0] or (architecture is None and raw.get("model_type") == family.wrapper[1])
    ):
        return raw
    known = keys.NO_EFFECT.keys() | keys.REFUSED.keys() | family.wrapper[2].keys()
    unknown = sorted(set(raw) - known - {"text_config", "tie_word_embeddings"})
    if unknown:
        raise UserError(_unknown_key(where, unknown[0], family, known))
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        raise UserError(f"{where}: text_config must be an object")
    for key, only in keys.REFUSED.items():
        _check_only(raw, key, only, family, where)
    tied = [part["tie_word_embeddings"] for part in (raw, inner) if part.get("tie_word_embeddings") is not None]
    if len(set(map(str, tied))) > 1:
        raise UserError(f"{where}: tie_word_embeddings differs between the file and its text_config")
    return inner | ({"tie_word_embeddings": tied[0]} if tied else {})


def _check_keys(raw: dict[str, Any], family: Family, where: str) -> None:
    maths = family.keys.keys() | (rope_keys(family).keys())
    refused = keys.REFUSED | family.refused
    known = maths | family.no_effect.keys() | refused.keys() | keys.NO_EFFECT.keys() | family.aliases.keys()
    for key in raw:
        if key not in known:
            raise UserError(_unknown_key(where, key, family, known))
        if key in refused and key not in maths:
            _check_only(raw, key, refused[key], family, where)


def rope_keys(family: Family) -> dict[str, str]:
    """The keys of RoPE that the family's files may have."""
    if family.rope is None:
        return {}
    partial = {"partial_rotary_factor": "rope_dim"} if family.rope.partial is not None else {}
    return rope.KEYS | partial


def _check_only(raw: dict[str, Any], key: str, only: keys.Only, family: Family, where: str) -> None:
    if key not in raw or only.allows(raw[key]):
        return
    if key == "quantization_config" and isinstance(raw[key], dict) and raw[key].get("quant_method") in family.quantized:
        if raw[key].get("weight_block_size", [128, 128]) == [128, 128]:
            return
    allowed = " or ".join(json.dumps(value) for value in only.values)
    raise UserError(
        f"{where}: {key}={str(raw[key])[:80]} is not supported for {family.name} ({only.why}): allowed is {allowed}"
    )


def _unknown_key(where: str, key: str, family: Family, known: Any) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)
    hint = f"did you mean {close[0]!r}? Else remove it" if close else "remove it"
    return (
        f"{where}: the key {key[:60]!r} is not known for {family.name}, so that it may change what the model computes: "
        f"{hint} if it has no effect"
    )


def _values(raw: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Every key of the maths, checked, with the class's default where it is absent."""
    raw = dict(raw)
    for other, name in family.aliases.items():
        if other in raw:
            value = raw.pop(other)
            if raw.setdefault(name, value) != value:
                raise UserError(f"{where}: {other}={str(value)[:60]} differs from {name}={str(raw[name])[:60]}")
    values: dict[str, Any] = {}
    for name, key in family.keys.items():
        if name not in raw and key.default is keys.REQUIRED:
            raise UserError(f"{where}: {name} is missing")
        if name not in raw or (raw[name] is None and key.default is None):
            values[name] = key.default
        elif raw[name] is None and key.nullable:
            values[name] = None
        else:
            values[name] = rope.checked(where, name, key.kind, raw[name])
    if family.rope is not None:
        longest = values[next(name for name, key in family.keys.items() if key.feeds == "max_seq_len")]
        values["rope"] = _rope(raw, family, longest, where)
    return values


def _rope(raw: dict[str, Any], family: Family, longest: int, where: str) -> Any:
    spelled = family.rope
    if spelled.table and not raw.get("rope_scaling") and raw.get("rope_parameters") is None:
        raw = raw | {"rope_parameters": spelled.table}
    if spelled.by_layer_type:
        bases = {"full_attention": spelled.theta, "sliding_attention": spelled.local_theta}
        return rope.read_by_type(raw, where, theta=bases, local_key=spelled.local_key, longest=longest)
    if spelled.original and raw.get("original_max_position_embeddings") is None:
        raw = raw | {"original_max_position_embeddings": spelled.original}
    for name in ("rope_scaling", "rope_parameters"):
        given = raw.get(name)
        kind = given.get("rope_type", given.get("type")) if isinstance(given, dict) else None
        if isinstance(kind, str) and kind in spelled.names:
            raw = raw | {name: given | {"rope_type": spelled.names[kind]}}
    return rope.read(raw, where, theta=spelled.theta, partial=spelled.partial, longest=longest)


def _fields(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields of `ModelConfig`, nested ones as tables."""
    fields: dict[str, Any] = {"family": family.name}
    _merge(fields, family.always)
    for name, key in family.keys.items():
        if key.direct and values[name] is not None:
            _merge(fields, _nested(key.feeds, values[name]))
    fields.setdefault("num_kv_heads", fields["num_heads"])
    fields.setdefault("head_dim", max(fields["embed_dim"] // fields["num_heads"], 1))
    if family.rope is not None and not family.rope.by_layer_type:
        fields |= {"rope_theta": values["rope"].theta, "rope_scaling": values["rope"].scaling}
        if values["rope"].partial != 1.0:
            fields["rope_dim"] = int(fields["head_dim"] * values["rope"].partial)
    if family.fields is not None:
        _merge(fields, family.fields(values | {"fields": fields}))
    if fields.get("rope_dim") == fields["head_dim"]:
        fields.pop("rope_dim")
    blocks = fields.pop("blocks", None)
    _check_longrope(fields)
    experts = fields.get("moe", {}).get("num_experts", 0) * fields["num_layers"]
    if experts > keys.MAX_EXPERTS:  # each may become a row of a table
        raise ValueError(f"{experts} experts in all layers are more than {keys.MAX_EXPERTS}")
    return fields | (compress(blocks) if blocks is not None else {})


def _nested(path: str, value: Any) -> dict[str, Any]:
    """{"moe": {"num_experts": value}} of "moe.num_experts"."""
    outer, _, inner = path.partition(".")
    return {outer: {inner: value} if inner else value}


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Add `more` to `into`, table by table."""
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(into.get(name), dict)
        into[name] = into[name] | value if both else value


def _check_longrope(fields: dict[str, Any]) -> None:
    scaling = fields.get("rope_scaling")
    if scaling is None or scaling.kind != "longrope":
        return
    turned = fields["mla"]["rope_head_dim"] if "mla" in fields else fields.get("rope_dim", fields["head_dim"])
    for name in ("short_factor", "long_factor"):
        if len(getattr(scaling, name)) * 2 != turned:
            raise ValueError(f"rope_scaling.{name} must have {turned // 2} entries, one per pair that is turned")


def config_json(config: ModelConfig, tokenizer: Any, dtype: str) -> dict[str, Any]:
    """The config.json of a model, for transformers 4 and 5.

    `tokenizer` (None: unknown) gives the special tokens, `dtype` is that of the weights.

    Raises:
        UserError: the family's configuration class cannot say one of the config's fields, which is named.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise UserError(f"family {config.family!r} has no config.json: {nearest(config.family, FAMILIES)}")
    written: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type or family.name}
    for name, key in family.keys.items():
        value = _get(config, key.feeds) if key.direct else None
        if value is not None or (key.direct and key.nullable):
            written[name] = keys.write_activation(value) if key.feeds == "activation" else value
    if family.rope is not None and not family.rope.by_layer_type:
        written |= rope.flat_keys(config, has_partial=family.rope.partial is not None)
    try:
        written |= family.written(config) if family.written is not None else {}
        said = read_config_dict(written, "config.json")
    except ValueError as error:
        reason = str(error).removeprefix("config.json: ")
        raise UserError(f"a Hugging Face {family.name} model cannot be this: {reason}") from None
    lost = {name: value for name, value in config if getattr(said, name) != value}
    if lost:
        name, value = next(iter(lost.items()))
        raise UserError(
            f"a Hugging Face {family.name} model cannot have {name}={str(value)[:120]}: its configuration class "
            f"would mean {str(getattr(said, name))[:120]}"
        )
    ids = {
        key: value
        for key, value in special_ids(tokenizer).items()
        if value is not None or key not in family.required_ids
    }
    return written | {"torch_dtype": dtype, "dtype": dtype, **ids}


def _get(config: ModelConfig, path: str) -> Any:
    """A field, also of a nested config; None where that is not there."""
    found: Any = config
    for name in path.split("."):
        found = None if found is None else getattr(found, name)
    return found


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """The token ids of config.json; null where unknown: left out, transformers would take the class's own."""
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad")}

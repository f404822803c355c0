# SPDX-License-Identifier: Apache-2.0
"""RoPE in config.json: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of transformers 5.

Which spelling wins, and which key within, is as in transformers 5.23 (`RotaryEmbeddingConfigMixin`). A key that the
kind of scaling does not use is refused by name. Formulas: `models/rope.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maxkit.errors import UserError, nearest
from maxkit.formats.hf_config import keys
from maxkit.models.config import ModelConfig, RopeScaling

# Kind -> {key in the file: field of RopeScaling}.
KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_seq_len",
        "attention_factor": "attention_factor",
        "short_factor": "short_factor",
        "long_factor": "long_factor",
    },
}
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
# The keys of a rope family that `read` handles.
KEYS = {
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling, rope_theta, rope_dim",
    "rope_parameters": "rope_scaling, rope_theta, rope_dim",
    "original_max_position_embeddings": "rope_scaling.original_max_seq_len",
}


@dataclass(frozen=True)
class Rope:
    """What a config.json says: base, scaling, and which part of a head is turned."""

    theta: float
    scaling: RopeScaling | None
    partial: float


def _factors(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or not value or len(value) > 65536:
        raise ValueError("must be a list of numbers")
    return tuple(keys.number(item) for item in value)


def _scale(value: Any) -> float:
    """A number that may be 0, which means the default or none."""
    return 0.0 if value == 0 and not isinstance(value, bool) else keys.number(value)


_KIND_OF: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _scale),
    "original_max_position_embeddings": keys.count,
    "truncate": keys.flag,
    "short_factor": _factors,
    "long_factor": _factors,
}


def checked(where: str, name: str, kind: Callable[[Any], Any], value: Any) -> Any:
    """`kind(value)`, a UserError that names the field where it is not possible."""
    try:
        return kind(value)
    except ValueError as error:
        raise UserError(f"{where}: {name}={repr(value)[:60]} {error}") from None


def read(raw: dict[str, Any], where: str, *, theta: float, partial: float | None, longest: int) -> Rope:
    """RoPE of a flat description.

    Args:
        theta: the base where none is given.
        partial: the part of a head that is turned where none is given; None: the class turns all of it always.
        longest: max_position_embeddings, the length before scaling where none is given.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = checked(where, name, keys.table, raw.get(name) or {})
    return read_one(given, raw, name, where, theta=theta, partial=partial, longest=longest)


def read_one(
    given: dict[str, Any],
    outer: dict[str, Any],
    name: str,
    where: str,
    *,
    theta: float,
    partial: float | None,
    longest: int,
) -> Rope:
    """One table of parameters; what it lacks is looked for beside it (`outer`)."""
    given = {key: value for key, value in given.items() if value is not None}
    beside = {key: value for key, value in outer.items() if value is not None}
    base = given.get("rope_theta", beside.get("rope_theta", theta))
    base = checked(where, f"{name}.rope_theta" if "rope_theta" in given else "rope_theta", keys.number, base)
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in KINDS:
        raise UserError(f"{where}: {name}.rope_type={kind[:60]!r} is not supported: {nearest(kind[:60], KINDS)}")
    part = _partial(given, beside, name, where, partial)
    unknown = set(given) - set(KINDS[kind]) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise UserError(f"{where}: {name}.{min(unknown)[:60]} is not supported for rope_type={kind!r}")
    missing = [key for key in _NEEDED.get(kind, ()) if key not in given]
    if missing:
        raise UserError(f"{where}: {name}.{missing[0]} is missing")
    if kind == "default":
        return Rope(base, None, part)
    values = {}
    for theirs, ours in KINDS[kind].items():
        if theirs in given:
            values[ours] = checked(where, f"{name}.{theirs}", _KIND_OF.get(theirs, keys.number), given[theirs])
    if "original_max_seq_len" in KINDS[kind].values():
        # A value beside the table wins over one in it; without either the model was never stretched.
        original = beside.get("original_max_position_embeddings", values.get("original_max_seq_len", longest))
        values["original_max_seq_len"] = checked(where, "original_max_position_embeddings", keys.count, original)
    return Rope(base, _scaling(kind, values, base, longest, name, where), part)


def _partial(given: dict, beside: dict, name: str, where: str, default: float | None) -> float:
    found = given.get("partial_rotary_factor", beside.get("partial_rotary_factor", default or 1.0))
    part = checked(where, "partial_rotary_factor", keys.number, found)
    if part > 1.0 or (default is None and part != 1.0):
        limit = "up to 1" if default is not None else "1, because this family's class turns the whole head"
        raise UserError(f"{where}: {name}.partial_rotary_factor={part:g} is not supported: it must be {limit}")
    return part


def _scaling(kind: str, values: dict[str, Any], theta: float, longest: int, name: str, where: str) -> RopeScaling:
    original = values.get("original_max_seq_len", longest)
    if kind == "llama3" and values["low_freq_factor"] > values["high_freq_factor"]:
        raise UserError(f"{where}: {name}.low_freq_factor must not exceed high_freq_factor")
    if kind in ("yarn", "longrope") and (theta <= 1 or original <= 1):
        raise UserError(f"{where}: {name} of kind {kind} needs rope_theta and the original length above 1")
    # What is falsy means the default or none, as in transformers.
    drop = [key for key in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow") if values.get(key) == 0]
    values = {key: value for key, value in values.items() if key not in drop}
    if kind == "longrope":
        values.setdefault("factor", longest / original)
    return RopeScaling.model_validate({"kind": kind, **values})


def write(scaling: RopeScaling | None, max_seq_len: int) -> dict[str, Any]:
    """The table of a scaling without theta: {"rope_type": "default"} where there is none."""
    if scaling is None:
        return {"rope_type": "default"}
    values = {theirs: getattr(scaling, ours) for theirs, ours in KINDS[scaling.kind].items()}
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = values["original_max_position_embeddings"] or max_seq_len
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"rope_type": scaling.kind} | {key: value for key, value in values.items() if value is not None}


def flat_keys(config: ModelConfig, *, has_partial: bool) -> dict[str, Any]:
    """The keys of a model with one RoPE, in the spelling of transformers 4 and of 5."""
    table = write(config.rope_scaling, config.max_seq_len)
    part = {"partial_rotary_factor": partial(config)} if has_partial else {}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": table if config.rope_scaling else None,
        "rope_parameters": table | {"rope_theta": config.rope_theta} | part,
        **part,
    }


def partial(config: ModelConfig) -> float:
    """The part of a head that is turned; read back with int(head_dim * part), it gives rope_dim."""
    dim = config.rope_dim or config.head_dim
    part = dim / config.head_dim
    return part if int(config.head_dim * part) == dim else (dim + 0.5) / config.head_dim


LAYER_TYPES = ("full_attention", "sliding_attention")


def read_by_type(
    raw: dict[str, Any], where: str, *, theta: dict[str, float], local_key: str | None, longest: int
) -> dict[str, Rope]:
    """RoPE of full and of sliding layers. In the old spelling `rope_scaling` is of the full ones only.

    theta: the bases where none is given. local_key: the old spelling's key of the sliding layers' base; without one
    the versions of transformers disagree on what a top-level rope_theta means for them.
    """
    nested = checked(where, "rope_parameters", keys.table, raw.get("rope_parameters") or {})
    extra = sorted(set(nested) - set(LAYER_TYPES))
    if extra:
        raise UserError(
            f"{where}: rope_parameters.{extra[0][:60]} is read differently by versions of transformers: "
            f"for this family it must hold one object each for {' and '.join(LAYER_TYPES)} and nothing else"
        )
    found = {}
    for kind in LAYER_TYPES:
        given = checked(where, f"rope_parameters.{kind}", keys.table, nested.get(kind) or {})
        beside = {"rope_theta": raw.get(local_key if local_key and kind == "sliding_attention" else "rope_theta")}
        if local_key is None and "rope_theta" not in given and beside["rope_theta"] not in (None, theta[kind]):
            raise UserError(
                f"{where}: rope_theta={beside['rope_theta']} is read differently by versions of transformers for this "
                f"family: write rope_parameters.{kind}.rope_theta instead"
            )
        if kind == "full_attention":
            given = given | checked(where, "rope_scaling", keys.table, raw.get("rope_scaling") or {})
        if given.get("truncate") not in (None, True):  # the class looks for it beside the two tables, not in them
            raise UserError(f"{where}: rope_parameters.{kind}.truncate is not supported for this family")
        name = f"rope_parameters.{kind}"
        found[kind] = read_one(given, beside, name, where, theta=theta[kind], partial=None, longest=longest)
    return found


def fields_by_type(ropes: dict[str, Rope]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of the model, fields of its sliding blocks) that say what `ropes` says."""
    full, local = ropes["full_attention"], ropes["sliding_attention"]
    if local.scaling not in (None, full.scaling):
        raise ValueError("rope_parameters: sliding layers with a RoPE scaling of their own are not supported")
    block: dict[str, Any] = {}
    if local.theta != full.theta:
        block["rope_theta"] = local.theta
    if local.scaling != full.scaling:
        block["rope_scaled"] = False
    return {"rope_theta": full.theta, "rope_scaling": full.scaling}, block


def tables_by_type(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """`rope_parameters` of full and sliding layers, the inverse of `fields_by_type`."""
    local = next((block for block in config.blocks if block.sliding_window), None)
    theta = (local and local.rope_theta) or config.rope_theta
    scaled = local is None or local.rope_scaled
    full = write(config.rope_scaling, config.max_seq_len)
    return {
        "full_attention": full | {"rope_theta": config.rope_theta},
        "sliding_attention": (full if scaled else {"rope_type": "default"}) | {"rope_theta": theta},
    }

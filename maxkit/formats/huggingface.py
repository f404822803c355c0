# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model folders: config.json, safetensors in one or several files, tokenizer.

`HuggingFaceReader` gives tensors by canonical address, `write_huggingface` writes a folder that transformers
loads. A config.json key that changes the maths is either read or refused by name. Not here: the tensor names
(`tables.py`).
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError, nearest
from maxkit.formats.safetensors import DTYPE_NAMES, SafetensorsFile, SafetensorsWriter
from maxkit.formats.tables import Address, Table, find_table
from maxkit.models.config import ModelConfig, RopeScaling

SHARD_BYTES = 2_000_000_000
ARCHITECTURES = {"LlamaForCausalLM": "llama"}
_MODEL_TYPES = {"llama": "llama"}
_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Keys that change the maths and are supported at one value only (absent is that value as well).
_ONLY = {
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "layer_types": None,
    "sliding_window": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_ROPE_KEYS = {
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
}


class HuggingFaceReader:
    """A folder with config.json and safetensors as a model: config, tokenizer, tensors by canonical address.

    `dtypes` counts the tensors by stored dtype ("bfloat16": 272). Tensors are read when asked for, in their
    stored dtype. Raises UserError for a folder that is incomplete, damaged, or of an architecture that is not
    supported.
    """

    format = "hf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path / "config.json")
        self._files = self._open()
        if self.config.num_layers > len(self._files):
            raise UserError(f"{path}: config.json says {self.config.num_layers} layers for {len(self._files)} tensors")
        self._table: Table = find_table(self.config, self.format)
        names = {short: long for long, short in DTYPE_NAMES.items()}
        stored = [file.entries[key].dtype for key, file in self._files.items()]
        self.dtypes = dict(Counter(names.get(dtype, dtype) for dtype in stored))
        for key, rearrangement in self._table.entries.values():
            if key not in self._files:
                continue  # the caller decides what a missing tensor means: `missing_keys`
            shape, wanted = self._files[key].entries[key].shape, rearrangement.foreign_shape
            if shape != wanted:
                raise UserError(f"{path}: tensor {key!r} has shape {list(shape)}, config.json says {list(wanted)}")

    def _open(self) -> dict[str, SafetensorsFile]:
        """Every tensor name of the folder, with the file that holds it."""
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").is_file():
            names = ["model.safetensors"]
        elif index.is_file():
            names = _shard_names(index)
        else:
            raise UserError(f"{self.path}: no model.safetensors and no model.safetensors.index.json (.bin is not read)")
        found: dict[str, SafetensorsFile] = {}
        for name in names:
            file = SafetensorsFile(self.path / name)
            for key in file.entries:
                if key in found:
                    raise UserError(f"{file.path}: tensor {key!r} is also in {found[key].path.name}")
                found[key] = file
        return found

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the folder, None if there is no tokenizer.json."""
        return Tokenizer.load(self.path) if (self.path / "tokenizer.json").is_file() else None

    def addresses(self) -> list[Address]:
        """Every (canonical path, layer number or None) whose tensor is there."""
        return [address for address, (key, _) in self._table.entries.items() if key in self._files]

    def missing_keys(self) -> list[str]:
        """Tensors that the model needs and the folder lacks."""
        return [key for key, _ in self._table.entries.values() if key not in self._files]

    def shape(self, path: str, layer: int | None = None) -> tuple[int, ...]:
        """The canonical shape of a tensor, without reading it."""
        return self._table[path, layer][1].canonical_shape

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One tensor in canonical orientation and stored dtype, as an array of its own."""
        key, rearrangement = self._table[path, layer]
        if key not in self._files:
            raise UserError(f"{self.path}: tensor {key!r} is missing")
        return rearrangement.read(self._files[key].read(key))

    def unused_keys(self) -> list[str]:
        """Tensors of the folder that the model does not use."""
        used = self._table.keys()
        return [key for key in self._files if key not in used]


def _shard_names(index: Path) -> list[str]:
    placed = _read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{index}: weight_map is missing or not a table of file names")
    names = sorted(set(placed.values()))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name[:80]!r} is not the name of a safetensors file in the same folder")
    return names


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def read_config(path: str | Path) -> ModelConfig:
    """The architecture that a config.json describes; keys that are absent have the defaults that transformers
    gives them.

    Raises UserError naming the field that is not supported or not possible.
    """
    path = Path(path)
    raw = _read_object(path)
    family = _family(raw, path)
    for key, only in _ONLY.items():
        if raw.get(key, only) not in (only, None) and not _all_full_attention(key, raw[key]):
            raise UserError(f"{path}: {key}={str(raw[key])[:80]} is not supported for {family}")
    activation = str(raw.get("hidden_act") or "silu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{path}: hidden_act={activation!r} is not supported: {nearest(activation, _ACTIVATIONS)}")
    heads = _number(raw, "num_attention_heads", path, 32)
    embed_dim = _number(raw, "hidden_size", path, 4096)
    bias = _flag(raw, "attention_bias", path)
    theta, scaling = _rope(raw, path)
    try:
        return ModelConfig(
            family=family,
            vocab_size=_number(raw, "vocab_size", path, 32000),
            num_layers=_number(raw, "num_hidden_layers", path, 32),
            embed_dim=embed_dim,
            mlp_dim=_number(raw, "intermediate_size", path, 11008),
            num_heads=heads,
            num_kv_heads=_number(raw, "num_key_value_heads", path, heads),
            head_dim=_number(raw, "head_dim", path, max(embed_dim // heads, 1)),
            max_seq_len=_number(raw, "max_position_embeddings", path, 2048),
            norm_eps=_number(raw, "rms_norm_eps", path, 1e-6, float),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=_flag(raw, "tie_word_embeddings", path),
            attention_bias=bias,
            attention_out_bias=bias,
            mlp_bias=_flag(raw, "mlp_bias", path),
            activation=_ACTIVATIONS[activation],
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: describes no possible model: {' '.join(str(error).splitlines()[1:3])}") from None


def _family(raw: dict[str, Any], path: Path) -> str:
    named = raw.get("architectures")
    if named:
        architecture = named[0] if isinstance(named, list) else named
        found = ARCHITECTURES.get(str(architecture))
    else:
        architecture = raw.get("model_type")
        found = _MODEL_TYPES.get(str(architecture))
    if found is None:
        raise UserError(f"{path}: architecture {architecture!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    if raw.get("auto_map"):
        raise UserError(f"{path}: auto_map names code of its own, so what the model computes cannot be known")
    return found


def _all_full_attention(key: str, value: Any) -> bool:
    return key == "layer_types" and isinstance(value, list) and set(map(str, value)) == {"full_attention"}


def _number(raw: dict[str, Any], key: str, path: Path, default: float, kind: type = int) -> Any:
    value = raw.get(key)
    value = default if value is None else value
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < 2**40:
        raise UserError(f"{path}: {key}={str(value)[:60]} must be a positive {kind.__name__}")
    return kind(value)


def _flag(raw: dict[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key)
    if value not in (None, True, False) or isinstance(value, (int, float)) and not isinstance(value, bool):
        raise UserError(f"{path}: {key}={str(value)[:60]} must be true or false")
    return bool(value)


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling, from `rope_scaling` or `rope_parameters` (transformers 5)."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(name) or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: {name} must be an object")
    given = {key: value for key, value in given.items() if value is not None}
    theta = _number(given if "rope_theta" in given else raw, "rope_theta", path, 10000.0, float)
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in _ROPE_KEYS:
        raise UserError(f"{path}: {name}.rope_type={kind[:60]!r} is not supported: {nearest(kind, _ROPE_KEYS)}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: {name}.partial_rotary_factor={given['partial_rotary_factor']} is not supported")
    known = _ROPE_KEYS[kind]
    unknown = set(given) - set(known) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise UserError(f"{path}: {name}.{min(unknown)} is not supported for rope_type={kind!r}")
    if kind == "default":
        return theta, None
    fields = {ours: given[theirs] for theirs, ours in known.items() if theirs in given}
    if "original_max_seq_len" in known.values():
        # A value beside the rope keys wins over one among them; without either the model was never stretched.
        outer = raw.get("original_max_position_embeddings")
        longest = _number(raw, "max_position_embeddings", path, 2048)
        fields["original_max_seq_len"] = outer or fields.get("original_max_seq_len", longest)
    missing = {"factor", "low_freq_factor", "high_freq_factor"} & set(known.values()) - set(fields)
    if missing:
        raise UserError(f"{path}: {name}.{min(missing)} is missing")
    try:
        return theta, RopeScaling.model_validate({"kind": kind, **fields})
    except ValueError as error:
        raise UserError(f"{path}: {name} is not possible: {' '.join(str(error).splitlines()[1:3])}") from None


def config_json(config: ModelConfig, tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
    """The config.json of a model, for transformers 4 and 5. Raises UserError for what it cannot say."""
    if config.attention_bias != config.attention_out_bias:
        raise UserError("a Hugging Face llama model has biases on all attention projections or on none")
    if any(block.sliding_window or block.rope_theta for block in config.pattern):
        raise UserError("a Hugging Face llama model cannot have blocks with a sliding window or their own rope_theta")
    architecture = {family: name for name, family in ARCHITECTURES.items()}[config.family]
    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        kind = config.rope_scaling.kind
        values = {theirs: getattr(config.rope_scaling, ours) for theirs, ours in _ROPE_KEYS[kind].items()}
        if "original_max_position_embeddings" in values:
            values["original_max_position_embeddings"] = (
                values["original_max_position_embeddings"] or config.max_seq_len
            )
        elif config.rope_scaling.original_max_seq_len not in (None, config.max_seq_len):
            raise UserError(f"a Hugging Face model with {kind} RoPE has no original length besides max_seq_len")
        rope = {"rope_type": kind} | {key: value for key, value in values.items() if value is not None}
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
        "torch_dtype": dtype,
        "dtype": dtype,
        **_special_ids(tokenizer),
    }


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    # Written as null where unknown: left out, transformers would take 1 and 2.
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad")}


def write_huggingface(
    directory: str | Path,
    config: ModelConfig,
    leaves: Iterable[tuple[str, int | None, np.ndarray]],
    tokenizer: Tokenizer | None,
    dtype: str | None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, safetensors and tokenizer files that transformers loads.

    `leaves` are (canonical path, layer or None, array) in any order, taken one at a time; `dtype` is
    "float32", "bfloat16", "float16" or None = that of the leaves, which must then be one. config.json comes
    last, so a folder that has one is complete. Raises UserError for a missing, repeated or unknown leaf, a
    wrong shape, a folder that already holds a model, and a disk that is full; what was written is then
    removed.
    """
    directory, table = Path(directory), find_table(config, "hf")
    taken = _Leaves(leaves)
    target = _dtype(dtype or taken.peek().dtype.name)
    description = config_json(config, tokenizer, target.name)
    writers: list[SafetensorsWriter] = []
    complete = False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
            if (directory / name).exists():
                raise UserError(f"{directory} already holds a model ({name}): choose another folder or remove it first")
        shards = _plan(table, target, shard_bytes)
        for name, shapes in shards.items():
            writers.append(SafetensorsWriter(directory / name, shapes, target))
        _write_leaves(taken, table, {key: writer for writer in writers for key in shards[writer.path.name]}, dtype)
        for writer in writers:
            writer.finish()
        _write_companions(directory, shards, target, tokenizer)
        _write_object(directory / "config.json", description)
        complete = True
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror or error}") from None
    finally:
        for writer in writers if not complete else ():
            writer.discard()


class _Leaves:
    """An iterator of leaves whose first can be looked at."""

    def __init__(self, leaves: Iterable[tuple[str, int | None, np.ndarray]]) -> None:
        self._rest = iter(leaves)
        self._first: list[tuple[str, int | None, np.ndarray]] = []

    def peek(self) -> np.ndarray:
        if not self._first:
            self._first = [next(self._rest, ("", None, np.zeros((), np.float32)))]
        return self._first[0][2]

    def __iter__(self):
        yield from self._first
        self._first = []
        yield from self._rest


def _dtype(name: str) -> np.dtype:
    allowed = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if name not in allowed:
        raise UserError(f"dtype={name!r}: allowed are {', '.join(allowed)}")
    return np.dtype(allowed[name])


def _plan(table: Table, dtype: np.dtype, shard_bytes: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> tensors with their shapes; a file is closed before it would exceed `shard_bytes`."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for key, rearrangement in table.entries.values():
        size = int(np.prod(rearrangement.foreign_shape, dtype=np.int64)) * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][key] = rearrangement.foreign_shape
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_leaves(leaves: _Leaves, table: Table, writers: dict[str, SafetensorsWriter], dtype: str | None) -> None:
    written = set()
    for path, layer, array in leaves:
        key, rearrangement = table[path, layer]
        if key in written:
            raise UserError(f"tensor {path!r} (layer {layer}) was given twice")
        array = np.asarray(array)
        if array.shape != rearrangement.canonical_shape:
            wanted = list(rearrangement.canonical_shape)
            raise UserError(f"tensor {path!r} (layer {layer}) has shape {list(array.shape)}, the config says {wanted}")
        if dtype is None and array.dtype != writers[key].dtype:
            raise UserError(
                f"tensor {path!r} is {array.dtype.name}, others are {writers[key].dtype.name}: give a dtype"
            )
        writers[key].write(key, rearrangement.write(array).astype(writers[key].dtype, copy=False))
        written.add(key)
    missing = [address for address, (key, _) in table.entries.items() if key not in written]
    if missing:
        names = ", ".join(path if layer is None else f"{path} (layer {layer})" for path, layer in missing[:5])
        raise UserError(f"{len(missing)} tensors of the model were not given: {names}{', ...' if missing[5:] else ''}")


def _write_companions(directory: Path, shards: dict, dtype: np.dtype, tokenizer: Tokenizer | None) -> None:
    if len(shards) > 1:
        elements = sum(int(np.prod(shape, dtype=np.int64)) for shapes in shards.values() for shape in shapes.values())
        placed = {key: name for name, shapes in shards.items() for key in shapes}
        index = {"metadata": {"total_size": elements * dtype.itemsize}, "weight_map": placed}
        _write_object(directory / "model.safetensors.index.json", index)
    _write_object(directory / "generation_config.json", {"_from_model_config": True, **_special_ids(tokenizer)})
    if tokenizer is not None:
        tokenizer.save(directory)


def _write_object(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters as Hugging Face's `peft` keeps them: adapter_config.json and adapter_model.safetensors.

peft adapts the modules of transformers, of which some hold several projections of ours (`c_attn`, `qkv_proj`,
`gate_up_proj`, `kv_b_proj`). The adapter of such a module is written with the ranks of its projections side by side and
zeros between their parts, at `alpha / rank` of all others: the same function to the last bit of every product. Experts
that lie in one tensor are adapted as `target_parameters`.

Read and written for every family in `tables.py`, which has the names. tests/oracle/test_peft.py compares with peft
0.21. No JAX. Not here: the base model (`checkpoint/adapters.py`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxkit.errors import UserError
from maxkit.formats.axes import Rearrangement, letters_of
from maxkit.formats.contents import Address
from maxkit.formats.hf_config.reader import read_object
from maxkit.formats.safetensors import SafetensorsFile, SafetensorsWriter
from maxkit.formats.tables import TABLES, Place, find_table
from maxkit.models.config import ModelConfig
from maxkit.models.lora import LoraConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OWN = "maxkit"  # of the file's metadata: our LoraConfig, so that what we wrote is read back as it was
# (family, whether of experts): what transformers multiplies as x W, and says so to peft, which takes all other matrices
# for [outputs, inputs].
_INPUTS_FIRST = (("gpt2", False), ("gpt_oss", True))
# What makes an adapter something else than `alpha / r` times B A.
_REFUSED = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices", "use_bdlora")

Read = Callable[[str, int | None], np.ndarray]


class Part(NamedTuple):
    """One projection of ours inside a module: its path (without `/kernel`), layer and place."""

    path: str
    layer: int | None
    place: Place


class Module(NamedTuple):
    """What peft adapts as one: a module of transformers, or a parameter of one that holds all experts."""

    name: str
    parameter: str | None
    parts: tuple[Part, ...]

    @property
    def target(self) -> str:
        """The end of its name, the same in every layer."""
        name = f"{self.name}.{self.parameter}" if self.parameter else self.name
        found = re.search(r"(?:^|\.)(?:layers|h)\.\d+\.(.+)", name)
        return found[1] if found else name


class Adapter(NamedTuple):
    """A module with an adapter: its adapted parts, and the keys of lora_A and lora_B."""

    module: Module
    parts: tuple[Part, ...]
    low: str
    high: str


def modules_of(config: ModelConfig) -> list[Module]:
    """What peft can adapt of a model, in the order of the tables.

    Raises:
        UserError: no table for the family.
    """
    rows = TABLES.get((config.family, "hf"), ())
    whole = {  # as transformers holds experts in memory, however they are published
        row.key.replace("{i}", str(layer))
        for row in rows
        for layer in range(config.num_layers)
        if "/experts/" in row.path and ".mlp." in row.key and "{e}" not in row.key and "_blocks" not in row.key
    }
    found: dict[str, list[Part]] = {}
    for (path, layer), place in find_table(config, "hf", whole).entries.items():
        if layer is not None and path.endswith("/kernel") and len(place.rearrangement.foreign) == 2:
            found.setdefault(place.keys[0], []).append(Part(path.removesuffix("/kernel"), layer, place))
    modules = []
    for key, parts in found.items():
        if "/router" in parts[0].path or "/shared_gate" in parts[0].path:
            continue
        name, _, last = key.rpartition(".")
        modules.append(Module(name, None if last == "weight" else last, tuple(parts)))
    return modules


# ------------------------------------------------------------ writing


def write_peft(
    directory: Path, config: ModelConfig, lora: LoraConfig, read: Read, base: str | None, dtype: np.dtype
) -> list[Address]:
    """Write the adapters that `read(path, layer)` gives; the addresses written.

    `base` is the name of the model they belong to. adapter_config.json comes last.

    Raises:
        UserError: no table for the family, an adapter that peft has no module for, a folder that is not empty or not to
            be written.
    """
    adapters = _adapted(config, lora)
    tensors: dict[str, tuple[int, ...]] = {}
    for _, parts, low, high in adapters:
        inputs, outputs = sides(config, parts[0].place)
        place, total = parts[0].place, lora.rank * len(parts) * parts[0].place.num_experts
        tensors[low] = (total, place.rearrangement.foreign_shape[inputs])
        tensors[high] = (place.rearrangement.foreign_shape[outputs], total)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {_OWN: lora.model_copy(update={"base_weight_dtype": ""}).model_dump_json()}
    writer = SafetensorsWriter(directory / TENSORS, tensors, dtype, metadata)
    try:
        for _, parts, *keys in adapters:
            for key, matrix in zip(keys, _join(config, parts, lora.rank, read), strict=True):
                writer.write(key, matrix.astype(dtype))
        writer.finish()
        text = json.dumps(_description(config, lora, adapters, base), indent=2)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        writer.discard()
        raise UserError(f"{directory}: cannot be written: {error.strerror or error}") from None
    return [(f"{p.path}/{name}", p.layer) for a in adapters for p in a.parts for name in ("lora_a", "lora_b")]


def _adapted(config: ModelConfig, lora: LoraConfig) -> list[Adapter]:
    """The modules of which `lora` names a part."""
    pairs = [(module, tuple(p for p in module.parts if lora.covers(p.path))) for module in modules_of(config)]
    return _with_keys([(module, parts) for module, parts in pairs if parts])


def _with_keys(chosen: list[tuple[Module, tuple[Part, ...]]]) -> list[Adapter]:
    """Peft wraps a module once for each adapted parameter, the first one innermost."""
    wrapped = Counter(module.name for module, _ in chosen)
    found = []
    for module, parts in chosen:
        wrapped[module.name] -= 1
        stem = f"{_PREFIX}{module.name}{'.base_layer' * wrapped[module.name]}"
        found.append(Adapter(module, parts, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"))
    return found


def sides(config: ModelConfig, place: Place) -> tuple[int, int]:
    """Which foreign axis peft's A belongs to, and which its B."""
    return (0, 1) if (config.family, place.experts != "none") in _INPUTS_FIRST else (1, 0)


def _factors(part: Part, rank: int, axis: int, num_inputs: int) -> tuple[str, Rearrangement]:
    """Which of our factors has the letters of a foreign axis, and how it lies in [axis, R]."""
    whole = part.place.rearrangement
    inputs, outputs = whole.canonical[:num_inputs], whole.canonical[num_inputs:]
    ours = set(letters_of(inputs)) & set(letters_of((whole.foreign[axis],)))
    name, canonical = ("lora_a", (*inputs, "R")) if ours else ("lora_b", ("R", *outputs))
    return name, Rearrangement((whole.foreign[axis], "R"), canonical, whole.sizes | {"R": rank})


def num_inputs(path: str, place: Place) -> int:
    """How many of a kernel's canonical axes its product sums over: two where heads are put together."""
    out = path.rsplit("/", 1)[-1] == "out"
    return len(place.rearrangement.canonical) - 1 if out else 1


def _join(config: ModelConfig, parts: tuple[Part, ...], rank: int, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """Peft's A [experts * ranks, inputs] and B [outputs, ranks * experts] of a module."""
    place = parts[0].place
    count, total = place.num_experts, rank * len(parts)
    matrices = []
    for axis in sides(config, place):
        side = np.zeros((count, place.rearrangement.foreign_shape[axis], total), np.float32)
        for number, part in enumerate(parts):
            name, rearrangement = _factors(part, rank, axis, num_inputs(part.path, part.place))
            values = read(f"{part.path}/{name}", part.layer).astype(np.float32)
            for expert, value in enumerate(values if place.experts != "none" else values[None]):
                own = np.zeros(rearrangement.foreign_shape, np.float32)
                rearrangement.write_into(own, np.ascontiguousarray(value))
                side[expert, :, number * rank : (number + 1) * rank] = own
        matrices.append(side)
    low = matrices[0].transpose(0, 2, 1).reshape(count * total, -1)  # (experts, ranks, inputs)
    high = matrices[1].transpose(1, 2, 0).reshape(-1, total * count)  # (outputs, ranks, experts)
    return low, high


def _spelled(config: ModelConfig, module: Module) -> str:
    """What to call a module's target. Beside experts peft takes these three names for experts of the old kind."""
    taken = module.target.endswith((".gate_proj", ".up_proj", ".down_proj")) and module.parameter is None
    return f"{module.target}.weight" if taken and config.moe is not None else module.target


def _description(config: ModelConfig, lora: LoraConfig, adapters: list[Adapter], base: str | None) -> dict[str, Any]:
    """What adapter_config.json says."""
    targets = {_spelled(config, a.module): (a.module, len(a.parts)) for a in adapters}
    parameters = [t for t, (module, _) in targets.items() if module.parameter or t != module.target]
    several = {target: count for target, (_, count) in targets.items() if count > 1}
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else lora.dropout,  # peft has none for parameters; ours is in the other file
        "target_modules": sorted(set(targets) - set(parameters)),
        "target_parameters": parameters or None,
        "rank_pattern": {re.escape(t): lora.rank * count for t, count in several.items()},
        "alpha_pattern": {re.escape(t): alpha * count for t, count in several.items()},
        "fan_in_fan_out": config.family == "gpt2",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


# ------------------------------------------------------------ reading


def base_of(path: Path) -> str:
    """The model that the adapters in a folder say they belong to.

    Raises:
        UserError: they do not say.
    """
    base = read_object(path / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: adapter_config.json names no base_model_name_or_path: give base=")
    return base


class PeftReader:
    """The adapters of a folder for a base model, by canonical address. `lora` says rank, scale and targets.

    Adapters of several ranks are filled up with zeros to the largest, which changes no product; where their scales
    differ, B takes the quotient.

    Raises:
        UserError: damaged, or something else than low-rank adapters of modules that the base model has.
    """

    def __init__(self, path: str | Path, config: ModelConfig):
        self.path, self.config = Path(path), config
        self.description = read_object(self.path / CONFIG)
        self._refuse()
        self._file = SafetensorsFile(self.path / TENSORS)
        own = self._file.metadata.get(_OWN)
        known = LoraConfig.model_validate_json(own) if own else None
        self._adapters = self._find(known)
        self.facts: dict[str, str] = {}
        if known is not None:
            self.lora, self._own = known, True
        else:
            self.lora, self._own = self._deduced(), False
        self._parts = {
            (part.path, part.layer): (adapter, number)
            for adapter in self._adapters
            for number, part in enumerate(adapter.parts)
        }

    def _refuse(self) -> None:
        found, kind = self.description, self.description.get("peft_type")
        if kind != "LORA":
            raise UserError(f"{self.path}: peft_type={kind!r} is not read; only LORA is")
        others = [name for name in _REFUSED if found.get(name)]
        others += ["bias"] if found.get("bias", "none") != "none" else []
        if others:
            shown = ", ".join(f"{name}={found[name]!r}" for name in others)
            raise UserError(f"{self.path}: {shown} is not read: only plain low-rank adapters are")
        if not (self.path / TENSORS).is_file():
            raise UserError(f"{self.path}: no {TENSORS} (.bin is not read)")

    def _find(self, known: LoraConfig | None) -> list[Adapter]:
        """The modules that have an adapter; every tensor must belong to one."""
        present = set(self._file.entries)
        if known is not None:
            adapters = _adapted(self.config, known)
        else:
            modules = [module for module in modules_of(self.config) if self._names(module, present)]
            adapters = _with_keys([(module, module.parts) for module in modules])
        used = {key for adapter in adapters for key in (adapter.low, adapter.high)}
        missing, extra = sorted(used - present), sorted(present - used)
        if missing or extra or not adapters:
            what = f"lacks {missing[0]}" if missing else f"has {extra[0]}" if extra else "holds no adapter"
            raise UserError(
                f"{self.path}: {what}: these are not adapters of the projections of this {self.config.family} model "
                f"with {self.config.num_layers} layers ({len(missing)} tensors missing, {len(extra)} unknown)"
            )
        return adapters

    def _names(self, module: Module, present: set[str]) -> bool:
        """Whether a module has an adapter: by its key, a parameter by the list of parameters."""
        if module.parameter is None:
            return f"{_PREFIX}{module.name}.lora_A.weight" in present
        names = self.description.get("target_parameters") or ()
        return any(f".{module.target}".endswith(f".{name}") for name in names)

    def _rank(self, adapter: Adapter) -> int:
        """Of what is stored for a module."""
        return self._file.entries[adapter.low].shape[0] // adapter.parts[0].place.num_experts

    def _scale(self, adapter: Adapter) -> float:
        """Alpha / rank of a module, as peft finds them."""
        found, rank, module = self.description, self._rank(adapter), adapter.module
        name = f"{module.name}.{module.parameter}" if module.parameter else module.name
        alpha = float(found.get("lora_alpha", 8))
        for pattern, value in (found.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                alpha = float(value)
        return alpha / (rank**0.5 if found.get("use_rslora") else rank)

    def _deduced(self) -> LoraConfig:
        ranks, scales = {self._rank(a) for a in self._adapters}, {self._scale(a) for a in self._adapters}
        rank, scale = max(ranks), max(scales)
        if len(ranks) > 1:
            self.facts["ranks"] = f"{', '.join(map(str, sorted(ranks)))}: filled up with zeros to {rank}"
        if len(scales) > 1:
            self.facts["scales"] = f"of several: B is rescaled to alpha / rank = {scale:g}"
        targets = tuple(dict.fromkeys(p.path.removeprefix("layers/") for a in self._adapters for p in a.parts))
        self._whole_model(targets)
        dropout = float(self.description.get("lora_dropout") or 0.0)
        experts = any("/experts/" in f"/{target}" for target in targets)
        return LoraConfig(rank=rank, alpha=scale * rank, targets=targets, dropout=0.0 if experts else dropout)

    def _whole_model(self, targets: tuple[str, ...]) -> None:
        """Refuse adapters of some layers only: ours are of every layer that has the projection."""
        there = {(p.path, p.layer) for a in self._adapters for p in a.parts}
        for module in modules_of(self.config):
            for part in module.parts:
                if part.path.removeprefix("layers/") in targets and (part.path, part.layer) not in there:
                    raise UserError(
                        f"{self.path}: {part.path} has adapters in some layers but not in layer {part.layer}: "
                        "adapters of some layers are not read; merge them into their model with peft first"
                    )

    # ------------------------------------------------------------ the tensors

    def addresses(self) -> list[Address]:
        """Every factor of every adapter."""
        return [(f"{path}/{name}", layer) for path, layer in self._parts for name in ("lora_a", "lora_b")]

    def shape(self, path: str, layer: int | None = None) -> tuple[int, ...]:
        """The canonical shape, without reading."""
        stem, _, name = path.rpartition("/")
        adapter, number = self._parts[stem, layer]
        part = adapter.parts[number]
        shape, cut = part.place.rearrangement.canonical_shape, num_inputs(part.path, part.place)
        front = (part.place.num_experts,) if part.place.experts != "none" else ()
        return front + ((*shape[:cut], self.lora.rank) if name == "lora_a" else (self.lora.rank, *shape[cut:]))

    def dtype(self, path: str, layer: int | None = None) -> np.dtype:
        """The type it is stored in."""
        adapter, _ = self._parts[path.rpartition("/")[0], layer]
        return self._file.read(adapter.low).dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One factor in canonical orientation."""
        stem, _, name = path.rpartition("/")
        adapter, number = self._parts[stem, layer]
        part, total = adapter.parts[number], self._rank(adapter)
        low, high = self._file.read(adapter.low), self._file.read(adapter.high)
        count = part.place.num_experts
        matrices = low.reshape(count, total, -1).transpose(0, 2, 1), high.reshape(-1, total, count).transpose(2, 0, 1)
        cut = num_inputs(part.path, part.place)
        rank = self.lora.rank if self._own else total
        columns = slice(number * rank, (number + 1) * rank) if self._own else slice(None)
        for axis, side in zip(sides(self.config, part.place), matrices, strict=True):
            found, rearrangement = _factors(part, rank, axis, cut)
            if found == name:
                values = [rearrangement.read(np.ascontiguousarray(expert[:, columns])) for expert in side]
                value = np.stack(values) if part.place.experts != "none" else values[0]
                return value if self._own else self._fitted(value, name, adapter, part.place.experts != "none")
        raise AssertionError(path)

    def _fitted(self, value: np.ndarray, name: str, adapter: Adapter, experts: bool) -> np.ndarray:
        """Filled up to the common rank and brought to the common scale."""
        axis = (1 if experts else 0) if name == "lora_b" else value.ndim - 1
        lacking = self.lora.rank - value.shape[axis]
        if lacking:
            value = np.pad(value, [(0, lacking if a == axis else 0) for a in range(value.ndim)])
        quotient = self._scale(adapter) / self.lora.scale
        return value * value.dtype.type(quotient) if name == "lora_b" and quotient != 1.0 else value

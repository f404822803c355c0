# SPDX-License-Identifier: Apache-2.0
"""Write any `Contents` as a checkpoint that MaxText restores: `<directory>/0/items`, and `<directory>/maxtext.yml`.

- Both layouts are what MaxText 0.2.4 and 0.2.5 write for a run: `params/params/...`, `opt_state/...`, `step`. NNX runs
  keep the state of their random numbers under `nnx_aux` as well: it is copied where the source has it in the same
  layout, and drawn anew by MaxText where it is not there.
- Params only they differ: `params/params/...` with an empty `opt_state`, as MaxText's own tool makes of a Linen run; or
  the bare tree with a part `value` at the end of every path, as it makes of an NNX run.
- The step's metadata has `scan_layers`, where MaxText looks for it, and the architecture, by which maxkit opens the
  checkpoint without `config=`. The YAML holds the settings with which MaxText computes the same function.
- What MaxText cannot say in its settings is rewritten in the weights (`formats/restated.py`), and listed.

One array at a time is in memory, of a large stack one layer.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from maxkit.errors import UserError, nearest
from maxkit.formats.contents import WEIGHTS, Address, Contents
from maxkit.formats.maxtext import containers
from maxkit.formats.maxtext.facts import decoder_block
from maxkit.formats.maxtext.form import maxtext_form
from maxkit.formats.maxtext.reader import Place, make_places
from maxkit.formats.maxtext.settings import DEFAULTS
from maxkit.formats.orbax_arrays import OrbaxWriter, dtype_of, new_step
from maxkit.formats.restated import Restated

LAYOUTS = ("maxtext-linen", "maxtext-nnx")
SETTINGS_FILE = "maxtext.yml"
STACK_BYTES = 16 * 2**20  # stacks up to this size are put together before they are written


class State(NamedTuple):
    """Where MaxText keeps an optimizer's state. slots: {slot: paths above the moments}; one that has several is split.

    empty: places that hold nothing. indices: whether the second part of a path is an index (of optax's chain).
    wrapped: whether `params` stands above the tree of moments.
    """

    slots: dict[str, tuple[str, ...]]
    counters: tuple[str, ...]
    empty: tuple[str, ...] = ()
    indices: bool = False
    wrapped: bool = True


_MUON, _ADAM = "opt_state/inner_states/muon/inner_state", "opt_state/inner_states/adam/inner_state"
STATES = {
    "adamw": State(
        {"mu": ("opt_state/0/mu",), "nu": ("opt_state/0/nu",)},
        ("opt_state/0/count", "opt_state/2/count"),
        ("opt_state/1",),
        indices=True,
    ),
    "adam_pax": State({"mu": ("opt_state/mu",), "nu": ("opt_state/nu",)}, ("opt_state/count",)),
    "sgd": State({}, ("opt_state/1/count",), ("opt_state/0",), indices=True),
    # Parameters with a second moment are Adam's, the others Muon's; each has a tree with empty places for the other's.
    "muon": State(
        {"mu": (f"{_ADAM}/0/mu", f"{_MUON}/0/mu"), "nu": (f"{_ADAM}/0/nu",)},
        (f"{_ADAM}/0/count", f"{_ADAM}/2/count", f"{_MUON}/0/count", f"{_MUON}/3/count"),
        wrapped=False,
    ),
}
_MUON_COEFFICIENTS = f"{_MUON}/0/ns_coeffs"


class Written(NamedTuple):
    """What became of a checkpoint. rewritten: {path: what was done to it}; left_out: {what: why}."""

    path: Path
    rewritten: dict[str, tuple[str, ...]]
    left_out: dict[str, str]


def write(
    directory: str | Path,
    contents: Contents,
    *,
    layout: Literal["maxtext-linen", "maxtext-nnx"] = "maxtext-linen",
    scan_layers: bool = True,
    dtype: str | None = None,
    params_only: bool = False,
    scan_axis: int = 1,
) -> Written:
    """Write `contents` below `directory`, which must not hold step 0 yet.

    dtype: cast the weights ("float32", "bfloat16", "float16"); optimizer state keeps its type. scan_axis: where
    layers are stacked (MaxText's `param_scan_axis`).

    Raises:
        UserError: MaxText computes no such model, the weights are incomplete or of several types, an optimizer whose
            form in MaxText is not known, a full disk.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r}: {nearest(layout, LAYOUTS)}")
    adapters = sorted({path for path, _ in contents.addresses() if path.rpartition("/")[2].startswith("lora_")})
    if adapters:
        raise UserError(f"adapters have no place in a {layout} checkpoint ({adapters[0]}, ...): merge them first")
    config, settings = maxtext_form(contents.config)
    source = Restated(contents, config)
    block = decoder_block(settings)
    cycle = containers.cycle_of(block, settings)
    scheme = containers.schemes(block, config, cycle)["scanned" if scan_layers else "unrolled"]
    if scan_layers and config.num_layers % cycle and block not in ("gemma3", "qwen3_next"):
        # Only these have a place for the rest; MaxText's others would leave it out of the model in silence.
        raise UserError(
            f"MaxText scans {block} layers in cycles of {cycle}, the model has {config.num_layers}: "
            "give scan_layers=false"
        )
    job = _Job(source, make_places(block, config, scheme), layout, dtype, params_only, scan_axis)
    job.check()
    directory = Path(directory)
    metadata = {"scan_layers": scan_layers, "param_scan_axis": scan_axis, "model": config.model_dump(mode="json")}
    with new_step(directory / "0", metadata) as writer:
        job.run(writer, scan_layers)
    _write_settings(directory / SETTINGS_FILE, settings, scan_layers, scan_axis)
    return Written(directory / "0", source.rewritten, job.left_out)


class _Job:
    """One call of `write`."""

    def __init__(
        self,
        source: Restated,
        places: dict[Address, Place],
        layout: str,
        dtype: str | None,
        params_only: bool,
        scan_axis: int,
    ) -> None:
        self.source, self.places, self.layout = source, places, layout
        self.dtype = dtype_of(dtype) if dtype else None
        self.params_only, self.scan_axis = params_only, scan_axis
        self.left_out: dict[str, str] = {}
        self.trees: dict[str, list[tuple[Address, Place]]] = {}  # path in the tree -> what lies there
        for address, place in places.items():
            self.trees.setdefault(place.tree, []).append((address, place))

    def check(self) -> None:
        """Refuse, before anything is written, what cannot be written."""
        there = set(self.source.addresses())
        missing = [address for address in self.places if address not in there]
        strange = [address for address in there if address not in self.places]
        for found, what in ((missing, "are missing"), (strange, "have no place in MaxText's model")):
            if found:
                names = ", ".join(path if layer is None else f"{path} (layer {layer})" for path, layer in found[:5])
                raise UserError(f"{len(found)} tensors {what}: {names}{', ...' if found[5:] else ''}")
        wrong = [
            f"{path} is {list(self.source.shape(path, layer))}, not {list(place.rearrangement.canonical_shape)}"
            for (path, layer), place in self.places.items()
            if self.source.shape(path, layer) != place.rearrangement.canonical_shape
        ]
        if wrong:
            raise UserError(f"{len(wrong)} tensors are not of the size that the config says: {'; '.join(wrong[:5])}")
        if not self.params_only and self.source.optimizer not in (None, *STATES):
            raise UserError(
                f"optimizer {self.source.optimizer!r}: its form in MaxText is not known (known: {', '.join(STATES)}); "
                "params_only leaves the optimizer out"
            )

    def run(self, writer: OrbaxWriter, scan_layers: bool) -> None:
        """Write everything."""
        bare = self.params_only and self.layout == "maxtext-nnx"
        above, below = ((), ("value",)) if bare else (("params", "params"), ())
        for tree in self.trees:
            self._write_tree(writer, tree, WEIGHTS, (*above, *tree.split("/"), *below), frozenset(), self.dtype)
        if bare:
            return
        step = int(self.source.scalars.get("step", np.int64(0)))
        if self.params_only:
            writer.write(("step",), np.asarray(0, np.int64))
            writer.empty(("opt_state",), "Dict")
            return
        writer.write(("step",), np.asarray(step, np.int32))
        self._write_optimizer(writer)
        if self.layout == "maxtext-nnx":
            self._write_random_state(writer, scan_layers)

    def _write_optimizer(self, writer: OrbaxWriter) -> None:
        state, scalars = STATES.get(self.source.optimizer or ""), dict(self.source.scalars)
        scalars.pop("step", None)
        count = scalars.pop("count", None)
        if state is None:
            writer.empty(("opt_state",), "Dict")
        else:
            self._write_state(writer, state, scalars, count)
        self.left_out |= dict.fromkeys(scalars, "no place in MaxText's state of this optimizer")

    def _write_state(
        self, writer: OrbaxWriter, state: State, scalars: dict[str, np.ndarray], count: np.ndarray | None
    ) -> None:
        indices = frozenset((1,)) if state.indices else frozenset()
        for path in state.empty:
            writer.empty(tuple(path.split("/")), "None", indices)
        for path in state.counters:
            value = scalars.pop(path, count if count is not None else self.source.scalars.get("step", 0))
            writer.write(tuple(path.split("/")), np.asarray(int(value), np.int32), indices)
        if self.source.optimizer == "muon":
            default = np.asarray([3.4445, -4.7750, 2.0315], np.float32)  # Keller Jordan's, optax's default
            coefficients = scalars.pop(_MUON_COEFFICIENTS, default)
            writer.write(tuple(_MUON_COEFFICIENTS.split("/")), coefficients)
        wrapper = ("params",) if state.wrapped else ()
        held = {slot: set(self.source.addresses(slot)) for slot in self.source.slots if slot != WEIGHTS}
        for slot, prefixes in state.slots.items():
            for prefix in prefixes:
                for tree, members in self.trees.items():
                    parts = (*prefix.split("/"), *wrapper, *tree.split("/"))
                    if self._belongs(prefix, prefixes, members, slot, held):
                        self._write_tree(writer, tree, slot, parts, indices, None)
                    elif len(prefixes) > 1 or not state.wrapped:
                        writer.empty(parts, "None", indices)
                    else:
                        raise UserError(f"{members[0][0][0]} has no {slot}: the state of the optimizer is incomplete")
        known = {*state.slots, WEIGHTS}
        self.left_out |= {slot: "no place in MaxText's state of this optimizer" for slot in held if slot not in known}

    @staticmethod
    def _belongs(prefix: str, prefixes: tuple[str, ...], members: list, slot: str, held: dict[str, set]) -> bool:
        """Whether a tensor's statistic lies under this path."""
        there = all(address in held.get(slot, ()) for address, _ in members)
        adams = all(address in held.get("nu", ()) for address, _ in members)
        return there and (len(prefixes) == 1 or adams == prefix.startswith(_ADAM))

    def _write_random_state(self, writer: OrbaxWriter, scan_layers: bool) -> None:
        state = getattr(self.source.contents, "random_state", dict)()
        if state and self.source.scan_layers != scan_layers:
            self.left_out["nnx_aux"] = "its random numbers are drawn per stack of layers; MaxText draws new ones"
            return
        for parts, (array, impl) in state.items():
            writer.write(parts, array, impl=impl)

    # ------------------------------------------------------------ one array

    def _write_tree(
        self,
        writer: OrbaxWriter,
        tree: str,
        slot: str,
        parts: tuple[str, ...],
        indices: frozenset[int],
        dtype: np.dtype | None,
    ) -> None:
        """One array of MaxText's: one tensor of ours, several that it fuses, or a stack of layers."""
        members = self.trees[tree]
        first = members[0][1]
        dtype = dtype or self._one_dtype(members, slot)
        shape = first.stored_shape(self.scan_axis)
        if not first.rows:
            writer.write(parts, self._composed(members, slot, dtype), indices)
            return
        if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize <= STACK_BYTES:
            whole = np.empty(shape, dtype)
            for index, layer in self._layers(members, slot, dtype):
                whole[index] = layer
            writer.write(parts, whole, indices)
            return
        target = writer.create(parts, shape, dtype, self.scan_axis, indices)
        for index, layer in self._layers(members, slot, dtype):
            target[index].write(layer).result()

    def _layers(self, members: list, slot: str, dtype: np.dtype) -> Iterator[tuple[tuple, np.ndarray]]:
        """(index into the stack, that layer) one after the other."""
        layers: dict[tuple[int, ...], list[tuple[Address, Place]]] = {}
        for address, place in members:
            layers.setdefault(place.rows, []).append((address, place))
        for _, layer in sorted(layers.items()):
            yield layer[0][1].slices(self.scan_axis), self._composed(layer, slot, dtype)

    def _composed(self, members: list[tuple[Address, Place]], slot: str, dtype: np.dtype) -> np.ndarray:
        """The foreign tensor of one layer, from the tensors of ours that lie in it."""
        (path, layer), first = members[0]
        array = self.source.read(path, layer, slot)
        if first.rearrangement.foreign == first.rearrangement.canonical:
            return array.astype(dtype, copy=False)
        result = np.empty(first.rearrangement.foreign_shape, dtype)
        first.rearrangement.write_into(result, array)
        for (path, layer), place in members[1:]:
            place.rearrangement.write_into(result, self.source.read(path, layer, slot))
        return result

    def _one_dtype(self, members: list[tuple[Address, Place]], slot: str) -> np.dtype:
        found = {self.source.dtype(path, layer, slot) for (path, layer), _ in members}
        if len(found) > 1:
            names = ", ".join(sorted(kind.name for kind in found))
            raise UserError(f"{members[0][0][0]} is of several types ({names}), MaxText keeps one: give dtype=")
        return found.pop()


def _write_settings(path: Path, settings: dict[str, Any], scan_layers: bool, scan_axis: int) -> None:
    """The settings that are not MaxText's defaults, for `python -m maxtext... maxtext.yml`."""
    named = settings["model_name"] != DEFAULTS["model_name"]
    # A name brings settings of its own: then nothing is left to defaults.
    differing = {name: value for name, value in settings.items() if named or DEFAULTS.get(name) != value}
    layout = {"scan_layers": scan_layers, "param_scan_axis": scan_axis, "decoder_block": settings["decoder_block"]}
    text = yaml.safe_dump(json.loads(json.dumps(differing | layout)), sort_keys=True)
    head = "# What MaxText needs to know to compute the model in 0/items.\n"
    if named:
        head += "# MaxText prefers its own file on a model_name to this one: give these as NAME=VALUE after base.yml.\n"
    path.write_text(f"{head}base_config: base.yml\n{text}")

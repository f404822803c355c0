# SPDX-License-Identifier: Apache-2.0
"""A MaxText or Tunix checkpoint as `Contents`: tensors and moments by canonical address, one layer at a time.

layout.py      what each key is: weight, moment, counter, random numbers
containers.py  which container holds which layer
rows.py        which tensor each leaf below it is
form.py        what the model computes (`config=`): a checkpoint of MaxText records none of it
"""

import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.formats.axes import Rearrangement, parse_axes
from maxkit.formats.contents import WEIGHTS, Address
from maxkit.formats.maxtext import containers, unknown
from maxkit.formats.maxtext.form import Description, describe
from maxkit.formats.maxtext.layout import Sorted, sort_keys
from maxkit.formats.maxtext.rows import ROWS
from maxkit.formats.orbax_arrays import METADATA, STEP_METADATA, OrbaxArrays
from maxkit.formats.restated import differences
from maxkit.formats.tables import letter_sizes
from maxkit.models.config import BlockSpec, ModelConfig
from maxkit.models.lora import LoraConfig

ITEMS = ("items", "state", "model_params", "default")  # what holds the weights, in the order of preference


class Place(NamedTuple):
    """Where a tensor lies: path in the tree, how, its row on each layer axis (none: no axis), these axes' lengths."""

    tree: str
    rearrangement: Rearrangement
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    def stored_shape(self, axis: int) -> tuple[int, ...]:
        """The shape of the array that holds it."""
        shape = self.rearrangement.foreign_shape
        return (*shape[:axis], *self.lengths, *shape[axis:])

    def slices(self, axis: int) -> tuple[int | slice, ...]:
        """Of the tensor in the array that holds it, `axis` being where layers are stacked."""
        return (slice(None),) * axis + self.rows


class MaxTextContents:
    """An opened checkpoint; the contract is `formats/contents.py`.

    description: what `config=` said. layout: "scanned", "unrolled" or "numbered". scan_axis: where layers are stacked.
    dtypes: {dtype: number of weights stored in it}.

    Raises:
        UserError: no checkpoint, a damaged one, quantised weights, no description, or one that the tensors contradict
            (all shapes in one message).
    """

    def __init__(
        self, path: Any, config: ModelConfig | str | Path | None = None, *, replica: int | None = None
    ) -> None:
        self.step_path, self.item = _locate(path)
        self.path = path
        self._arrays = OrbaxArrays(self.step_path / self.item if self.item else self.step_path)
        self._sorted = sort_keys(self._arrays.leaves, self.item, replica is not None)
        self._optimizer_arrays = self._open_optimizer()
        self._replica = replica
        self.metadata = _metadata(self.step_path)
        recorded = _recorded(self.metadata)
        given = config if config is not None else recorded
        if given is None:
            raise UserError(unknown.refusal(path, self._sorted, self._weight_shapes()))
        self.description: Description = describe(given)
        differing = differences(recorded, self.description.config) if recorded else []
        if differing:
            raise UserError(f"config={config} contradicts what {path} records: {'; '.join(differing)}")
        self.config = self._with_stored_bias(self.description.config)
        self.format, self.optimizer = self._sorted.format, self._sorted.optimizer
        self.slots = (WEIGHTS, *(slot for slot in self._sorted.trees if slot != WEIGHTS))
        self.facts: dict[str, str] = dict(_facts_of_weights(self.description))
        self.layout, scheme = self._find_scheme()
        self._places = make_places(self.description.block, self.config, scheme, self._sorted.trees[WEIGHTS])
        self.lora = self._find_adapters()
        self.scan_axis = self._find_axis()
        self._check_shapes()
        self.scan_layers = self._find_scan_layers()
        self._held: tuple[str, np.ndarray] | None = None  # the last stack that could only be read as a whole

    # ------------------------------------------------------------ the contract

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """The step, `count` where all counters of the optimizer agree, and every other value under its path."""
        values = {name: self._fetch(key) for name, key in self._sorted.scalars.items()}
        counters = {name: value for name, value in values.items() if name.endswith("/count")}
        if counters and len({value.tobytes() for value in counters.values()}) == 1:
            values = {name: value for name, value in values.items() if name not in counters}
            values["count"] = next(iter(counters.values()))
        return values

    @property
    def dtypes(self) -> dict[str, int]:
        """{dtype: number of weights stored in it}."""
        trees = self._sorted.trees[WEIGHTS].values()
        return dict(Counter(self._arrays.leaves[key].dtype.name for key in trees))

    def tokenizer(self) -> Tokenizer | None:
        """None: such checkpoints have none."""
        return None

    def addresses(self, slot: str = WEIGHTS) -> list[Address]:
        """Every tensor of a slot, all layers of a path one after the other."""
        tree = self._sorted.trees.get(slot, {})
        return [address for address, place in self._places.items() if place.tree in tree]

    def shape(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> tuple[int, ...]:
        """The canonical shape."""
        return self._place(path, layer, slot)[0].rearrangement.canonical_shape

    def dtype(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.dtype:
        """The stored dtype."""
        return self._leaf(self._place(path, layer, slot)[1]).dtype

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor in canonical orientation and stored dtype, as an array of its own.

        Of a stack, only the pieces that hold the layer are read; one that is stored in one piece is kept until another
        is asked for.
        """
        place, key = self._place(path, layer, slot)
        array = self._layer(key, place)
        own = self._held is None or array.base is not self._held[1]
        same = place.rearrangement.foreign == place.rearrangement.canonical
        return array if own and same else place.rearrangement.read(array)

    def missing_keys(self) -> list[str]:
        """Weights that the model needs and that are not stored."""
        tree = self._sorted.trees[WEIGHTS]
        return list(dict.fromkeys(place.tree for place in self._places.values() if place.tree not in tree))

    def unused_keys(self) -> list[str]:
        """Stored arrays that are no tensor of the model and of which nothing is known."""
        known = {place.tree for place in self._places.values()}
        strays = [key for tree in self._sorted.trees.values() for name, key in tree.items() if name not in known]
        return sorted([*strays, *self._sorted.unknown])

    def ignored_keys(self) -> dict[str, str]:
        """Stored arrays that are no part of the model, each with the reason."""
        return dict(self._sorted.ignored)

    # ------------------------------------------------------------ beyond the contract

    def random_state(self) -> dict[tuple[str, ...], tuple[np.ndarray, str | None]]:
        """What NNX runs keep under `nnx_aux`: {path: (array, kind of PRNG key or None)}."""
        return {
            self._arrays.leaves[key].parts: (self._fetch(key), self._arrays.extension(key).get("random_key_impl"))
            for key in self._sorted.ignored
            if self._arrays.leaves[key].parts[0] == "nnx_aux"
        }

    # ------------------------------------------------------------ reading

    def _place(self, path: str, layer: int | None, slot: str) -> tuple[Place, str]:
        place = self._places.get((path, layer))
        key = self._sorted.trees.get(slot, {}).get(place.tree) if place else None
        if place is None or key is None:
            raise UserError(f"{self.path}: no tensor {path!r} (layer {layer}) in {slot}")
        return place, key

    def _leaf(self, key: str):
        return (self._arrays if key in self._arrays.leaves else self._optimizer_arrays).leaves[key]

    def _fetch(self, key: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """An array or part of it; of DiLoCo's replicas, the chosen one's."""
        if self._replica is not None:
            index = (self._replica, *index)
        arrays = self._arrays if key in self._arrays.leaves else self._optimizer_arrays
        return arrays.read(key, index)

    def _layer(self, key: str, place: Place) -> np.ndarray:
        if not place.rows:
            return self._fetch(key)
        index, axis = place.slices(self.scan_axis), self.scan_axis + (self._replica is not None)
        if self._leaf(key).chunks[axis] < place.lengths[0]:  # in pieces: only those of this layer
            return self._fetch(key, index)
        if self._held is None or self._held[0] != key:
            self._held = None  # let go of the last one before the next is read
            self._held = key, self._fetch(key)
        return self._held[1][index]

    # ------------------------------------------------------------ opening

    def _open_optimizer(self) -> OrbaxArrays | None:
        """Tunix keeps the optimizer in an item of its own; its keys are sorted in with the others."""
        if self.item != "model_params" or not (self.step_path / "optimizer_state" / METADATA).exists():
            return None
        arrays = OrbaxArrays(self.step_path / "optimizer_state")
        sort_optimizer(self._sorted, arrays)
        return arrays

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._arrays.leaves[key].shape for name, key in self._sorted.trees[WEIGHTS].items()}

    def _with_stored_bias(self, config: ModelConfig) -> ModelConfig:
        """MaxText's `attention_bias` does not say whether the output projection has one as well: the tensors do."""
        stored = any(path.endswith("/out/bias") for path in self._sorted.trees[WEIGHTS])
        if not self.description.stated or not config.attention_bias or stored == config.attention_out_bias:
            return config
        return config.model_copy(update={"attention_out_bias": stored})

    def _find_scheme(self) -> tuple[str, containers.Scheme]:
        """The arrangement of which most containers are there."""
        settings, tree = self.description.settings, self._sorted.trees[WEIGHTS]
        block = self.description.block
        schemes = containers.schemes(block, self.config, containers.cycle_of(block, settings))
        found: dict[str, int] = {}
        for name, scheme in schemes.items():
            wanted = {slot.container for slot in containers.slots(scheme)}
            there = sum(any(path.startswith(f"{container}/") for path in tree) for container in wanted)
            # `layers/0/` must not count as `layers/`.
            stray = name.startswith("scanned") and any(
                path.split("/")[2:3] and path.split("/")[2].isdecimal() for path in tree
            )
            found[name] = 0 if stray else there
        best = max(found, key=found.__getitem__)
        if not found[best]:
            below = sorted({"/".join(path.split("/")[:2]) for path in tree})
            raise UserError(
                f"{self.path}: no layers of a {self.description.block} model ({self.description.source}); it "
                f"holds {', '.join(below)}"
            )
        return best, schemes[best]

    def _find_adapters(self) -> LoraConfig | None:
        """Places for the adapters that are stored, and what they are: rank by their shapes, alpha by the metadata."""
        found, tree = adapter_places(self._places, self._weight_shapes()), self._sorted.trees[WEIGHTS]
        if not found:
            return None
        self._places |= found
        ranks = {place.rearrangement.sizes["R"] for place in found.values()}
        if len(ranks) > 1:
            raise UserError(f"{self.path}: adapters of several ranks ({sorted(ranks)}) are not read")
        noted = [source.get("lora") for source in (self.metadata, self.description.settings)]
        alphas = [lora.get("lora_alpha") for lora in noted if isinstance(lora, dict)]
        alpha = float(next((value for value in alphas if value), 0))
        if not alpha:
            raise UserError(
                f"{self.path}: adapters of rank {max(ranks)}, but nothing says their lora_alpha: "
                "give config= the log of the settings of the run that made them"
            )
        targets = tuple(dict.fromkeys(path.split("/")[-2] for path, _ in found))
        if not any(place.tree in tree for address, place in self._places.items() if address not in found):
            self.facts["adapters"] = "only adapters: the weights they belong to are elsewhere"
        return LoraConfig(rank=max(ranks), alpha=alpha, targets=targets)

    def _find_axis(self) -> int:
        """The layer axis that all stacks agree with: the one described, or else MaxText's default, before others."""
        described = int(self.description.settings["param_scan_axis"])
        shapes, stacked = self._stored_shapes(), [place for place in self._places.values() if place.rows]
        stacked = [place for place in stacked if place.tree in shapes]
        for axis in dict.fromkeys((described, 1, 0, 2, 3)):
            if all(
                axis <= len(place.rearrangement.foreign_shape) and shapes[place.tree] == place.stored_shape(axis)
                for place in stacked
            ):
                if axis != described and self.description.stated:
                    self.facts["param_scan_axis"] = f"{axis} in the arrays; {self.description.source} says {described}"
                return axis
        return described

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        skip = 1 if self._replica is not None else 0
        return {name: shape[skip:] for name, shape in self._weight_shapes().items()}

    def _check_shapes(self) -> None:
        """The description and the tensors must agree, those of the optimizer too; all contradictions at once."""
        problems: dict[str, str] = {}
        skip = 1 if self._replica is not None else 0
        for slot in self.slots:
            tree = self._sorted.trees[slot]
            for place in self._places.values():
                if place.tree in tree:
                    shape, wanted = self._leaf(tree[place.tree]).shape[skip:], place.stored_shape(self.scan_axis)
                    if shape != wanted:
                        problems[tree[place.tree]] = f"{tree[place.tree]} is {list(shape)}, not {list(wanted)}"
        if problems:
            lines = list(problems.values())
            raise UserError(
                f"{self.path}: {len(lines)} tensors contradict {self.description.source}: {'; '.join(lines[:12])}"
                f"{', ...' if lines[12:] else ''}"
            )

    def _find_scan_layers(self) -> bool:
        """The structure, which reading depends on; what the metadata and the description say beside it is reported."""
        structure = self.layout.startswith("scanned")
        stored = self.metadata.get("scan_layers")
        if "scan_layers" in self.metadata and not isinstance(stored, bool):
            self.facts["scan_layers"] = f"metadata has {stored!r}, not a boolean: read from the structure"
        elif isinstance(stored, bool) and stored != structure:
            self.facts["scan_layers"] = f"metadata says {stored}, the arrays are {structure}: read as they are"
        elif self.description.stated and bool(self.description.settings["scan_layers"]) != structure:
            self.facts["scan_layers"] = f"{self.description.source} says {not structure}, the arrays are {structure}"
        return structure


def make_places(
    block: str, config: ModelConfig, scheme: containers.Scheme, stored: Collection[str] = ()
) -> dict[Address, Place]:
    """Every tensor of a model, path by path: by the first row whose key is stored, or the very first."""
    sizes, slots = letter_sizes(config), containers.slots(scheme)
    found: dict[Address, Place] = {}
    for row in ROWS[block]:
        outside: list[tuple[int | None, BlockSpec | None]] = [(None, None)]
        for layer, spec in enumerate(config.blocks) if row.per_layer else outside:
            if not row.exists(config, spec):
                continue
            slot = slots[layer] if layer is not None else containers.Slot("", "", (), ())
            tree = row.key.replace("{i}", slot.container).replace("{part}", slot.suffix)
            known = found.get((row.path, layer))
            if known is None or (known.tree not in stored and tree in stored):
                found[row.path, layer] = Place(tree, parse_axes(row.axes, sizes), slot.rows, slot.lengths)
    order = {path: number for number, path in enumerate(dict.fromkeys(path for path, _ in found))}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1] or 0)))


def adapter_places(places: dict[Address, Place], shapes: dict[str, tuple[int, ...]]) -> dict[Address, Place]:
    """Where low-rank adapters lie: `kernel_lora_a` beside a kernel (training), or `lora_a.kernel` (serving).

    The first has what the kernel contracts and the rank, the second the rank and what it produces.
    """
    found: dict[Address, Place] = {}
    for (path, layer), place in places.items():
        if not path.endswith("/kernel") or layer is None or not place.rearrangement.is_whole:
            continue
        letters, sizes = "".join(map(str, place.rearrangement.canonical)), place.rearrangement.sizes
        produced = 1 if path.split("/")[-2] in ("out", "down") else len(letters) - 1 - letters.startswith("E")
        axes = {"lora_a": letters[:-produced] + "R", "lora_b": "R" + letters[-produced:]}
        stem = place.tree.removesuffix("kernel")
        for spelled in (f"{place.tree}_{{}}", f"{stem}{{}}.kernel"):
            first = shapes.get(spelled.format("lora_a"))
            for name in axes if first else ():
                place_of = Place(spelled.format(name), parse_axes(axes[name], sizes | {"R": first[-1]}), *place[2:])
                found[f"{path.removesuffix('kernel')}{name}", layer] = place_of
    return found


def sort_optimizer(found: Sorted, arrays: OrbaxArrays) -> None:
    """Sort the keys of Tunix's item `optimizer_state` into `found`: as NNX state of an optimizer, one level up."""
    renamed = {f"optimizer/{path}": leaf for path, leaf in arrays.leaves.items()}
    weights = {f"model/{name}": arrays_leaf for name, arrays_leaf in _first(found, arrays)}
    leaves = {path: leaf._replace(parts=("optimizer", *leaf.parts)) for path, leaf in renamed.items()}
    other = sort_keys(leaves | weights)
    strip = len("optimizer/")
    for slot, tree in other.trees.items():
        if slot != WEIGHTS:
            found.trees[slot] = {name: key[strip:] for name, key in tree.items()}
    found.scalars |= {name: key[strip:] for name, key in other.scalars.items()}
    found.ignored |= {key[strip:]: reason for key, reason in other.ignored.items()}
    found.unknown += [key[strip:] for key in other.unknown]
    found.optimizer = other.optimizer


def _first(found: Sorted, arrays: OrbaxArrays):
    """One weight, without which a tree is no checkpoint."""
    name = next(iter(found.trees[WEIGHTS]))
    leaf = next(leaf for leaf in arrays.leaves.values() if leaf.is_array)
    return [(name, leaf._replace(parts=("model", *name.split("/"))))]


def _locate(path: Any) -> tuple[Any, str]:
    """(step directory, item) of a run, step or item directory; the newest step of a run."""
    place = path
    if isinstance(path, str):
        text = path.removeprefix("file://").rstrip("/")
        if "://" in text:
            from etils import epath  # not needed for local paths

            place = epath.Path(text)
        else:
            place = Path(text).expanduser()
    if not place.exists():
        raise UserError(f"{path}: no such file or directory")
    if (place / METADATA).exists():
        parent = place.absolute().parent if isinstance(place, Path) else place.parent
        is_step = (parent / STEP_METADATA).exists() or parent.name.isdecimal()
        return (parent, place.name) if is_step else (place, "")
    for folder in (place, place / "checkpoints"):
        item = next((name for name in ITEMS if (folder / name / METADATA).exists()), None)
        if item is not None:
            return folder, item
        numbers = sorted((int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else ())
        if numbers:
            return _locate(folder / str(numbers[-1]))
    raise UserError(f"{path}: no checkpoint of MaxText or Tunix there (no {METADATA} in {', '.join(ITEMS)})")


def _metadata(step_path: Any) -> dict[str, Any]:
    """The step's `custom_metadata`, {} where there is none."""
    for folder in (step_path, *(step_path / name for name in ITEMS)):
        file = folder / STEP_METADATA
        if file.exists():
            try:
                found = json.loads(file.read_text()).get("custom_metadata")
            except (ValueError, AttributeError) as error:
                raise UserError(f"{file} is not JSON: {error}") from error
            return found if isinstance(found, dict) else {}
    return {}


def _recorded(metadata: dict[str, Any]) -> ModelConfig | None:
    """The architecture that our own writer notes beside `scan_layers`."""
    model = metadata.get("model")
    try:
        return ModelConfig.model_validate(model) if isinstance(model, dict) else None
    except ValueError:
        return None


def _facts_of_weights(description: Description) -> dict[str, str]:
    """What the weights went through, that the config says now."""
    config, found = description.config, {}
    if config.attention_scale == 1.0:
        found["query scale"] = "in the queries' kernel; attention_scale=1"
    if config.family.startswith("gemma"):
        found["norm offset"] = "in the norms' scales; norm_scale_offset=0"
        found["embedding scale"] = "in the embedding table; embedding_scale=None"
    if config.tie_embeddings:
        if not math.isclose(config.logit_scale, 1.0):
            found["logit scale"] = "logits are divided by sqrt(embed_dim); logit_scale"
        found["tied table"] = "MaxText rounds it to bfloat16 for the logits; here it keeps its type"
    if config.rope_interleaved:
        found["rope order"] = "neighbouring dimensions are a pair; rope_interleaved"
    return found

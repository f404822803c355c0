# SPDX-License-Identifier: Apache-2.0
"""`maxkit convert`: any readable checkpoint to any writable one, tensor by tensor, optimizer state included.

    contents = open_contents(path)            what is there, by canonical address
    plan = make_plan(contents, "maxkit", ...) what will be where; reads no tensor
    write(contents, plan, destination)        into NAME.partial, read back and verified, then renamed

A destination therefore exists only when it is whole and was compared. Into our own format an interrupted conversion
goes on where it stopped; docs/design/009-convert-and-compare.md says why the others begin again.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (numpy then knows "bfloat16")
import numpy as np

from maxkit.checkpoint import arrays, digest_stream, inspect
from maxkit.checkpoint import manifest as manifests
from maxkit.checkpoint.contents import (
    FOREIGN,
    KEY_NAMES,
    OPTIMIZER_PLACES,
    StoreContents,
    stored_form,
    tokenizer_files,
)
from maxkit.checkpoint.layout import Layout
from maxkit.checkpoint.lock import LOCK_FILE, FolderLock
from maxkit.checkpoint.manifest import DamagedCheckpoint, GroupRecord, LeafRecord, Manifest
from maxkit.checkpoint.merge import Merged
from maxkit.checkpoint.open import Description, open_contents
from maxkit.checkpoint.statement import for_huggingface
from maxkit.errors import UserError, nearest
from maxkit.formats.contents import WEIGHTS, Contents
from maxkit.formats.huggingface import HuggingFaceReader, write_huggingface
from maxkit.formats.maxtext import MaxTextContents, containers, maxtext_form
from maxkit.formats.maxtext import facts as maxtext_facts
from maxkit.formats.maxtext import writer as maxtext_writer
from maxkit.formats.maxtext.reader import make_places
from maxkit.formats.restated import Restated
from maxkit.formats.tables import find_table

TARGETS = ("maxkit", "hf", *maxtext_writer.LAYOUTS)
DTYPES = ("float32", "bfloat16", "float16")
ADAPTERS = ("lora_a", "lora_b")
PARTIAL, JOURNAL = ".partial", "progress.jsonl"
_NEW_KEY = LeafRecord(shape=(), dtype="key<fry>", digest="")  # jax.random.key(0): its two words are zero


class Tensor(NamedTuple):
    """One tensor of the source."""

    slot: str
    path: str
    layer: int | None


class Planned(NamedTuple):
    """One array of the destination: its name, form, and the tensors it is made of, row by row when `stacked`."""

    target: str
    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[Tensor, ...]
    stacked: bool
    transform: str

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will do. `notes` say what is left out or made up."""

    source: str
    to: str
    scan_layers: bool | None
    step: int
    dtype: str | None
    params_only: bool
    leaves: tuple[Planned, ...]
    notes: tuple[str, ...]
    param_scan_axis: int = 0  # where MaxText's formats stack layers

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(leaf.num_bytes for leaf in self.leaves)

    def lines(self) -> Iterator[str]:
        """A line for each array: from, to, what is done."""
        for leaf in self.leaves:
            first = leaf.tensors[0]
            name = first.path if first.slot == WEIGHTS else f"{first.slot} of {first.path}"
            layers = [t.layer for t in leaf.tensors if t.layer is not None]
            where = "" if not layers else f" [layer {_ranges(layers)}]"
            yield f"{name}{where} -> {leaf.target} {leaf.dtype}{list(leaf.shape)}: {leaf.transform}"

    def summary(self) -> str:
        """One line."""
        layout = "" if self.scan_layers is None else f", scan_layers={self.scan_layers}"
        return f"{self.source} -> {self.to}{layout}: {len(self.leaves)} arrays, {self.num_bytes / 1e6:,.1f} MB"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done. `resumed`: arrays that an interrupted conversion had already written."""

    plan: Plan
    path: Path | None
    verified: int = 0
    resumed: int = 0
    seconds: float = 0.0


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    config: Description = None,
    scan_layers: bool | None = None,
    params_only: bool = False,
    dtype: str | None = None,
    unexpected: str = "error",
    param_scan_axis: int | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Read `source` and write it to `destination` in another format or layout.

    Args:
        to: one of `TARGETS`.
        config: how the source was made, where it does not say.
        scan_layers: the layout to write; None keeps that of the source (stacked where it has none).
        params_only: leave optimizer state, counters and random numbers out.
        dtype: of the weights, one of `DTYPES`; optimizer state keeps its own.
        unexpected: "warn" leaves tensors out that the model does not use; "error" refuses.
        param_scan_axis: where a MaxText format stacks layers, 0 or 1; None keeps what a MaxText source has, else 1.
        dry_run: only make the plan.

    Raises:
        UserError: nothing readable there, a destination that exists, something that the format cannot hold, missing or
            unexpected tensors, a full disk.
        DamagedCheckpoint: the source's bytes are not those that were saved.
    """
    contents = open_contents(source, config)
    plan = make_plan(
        contents,
        to,
        source,
        scan_layers=scan_layers,
        params_only=params_only,
        dtype=dtype,
        unexpected=unexpected,
        param_scan_axis=param_scan_axis,
    )
    refuse_existing(Path(destination))
    return Conversion(plan, None) if dry_run else write(contents, plan, destination)


# ------------------------------------------------------------ the plan


def make_plan(
    contents: Contents,
    to: str,
    where: object,
    *,
    scan_layers: bool | None = None,
    origin: str = "command line",
    params_only: bool = False,
    dtype: str | None = None,
    unexpected: str = "error",
    param_scan_axis: int | None = None,
) -> Plan:
    """What is to be written where; arguments as `convert`. Reads no tensor.

    Raises:
        UserError: as `convert`.
    """
    if to not in TARGETS:
        raise UserError(f"to={to!r}: {nearest(to, TARGETS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: {nearest(dtype, DTYPES)}")
    notes = _check_source(contents, where, unexpected)
    if to == "hf":
        return _plan_hf(contents, where, scan_layers, origin, dtype, notes)
    layout = scan_layers
    if layout is None:
        layout = True if contents.scan_layers is None else contents.scan_layers
    slots = (WEIGHTS,) if params_only else contents.slots
    if to in maxtext_writer.LAYOUTS:
        axis = getattr(contents, "scan_axis", 1) if param_scan_axis is None else param_scan_axis
        return _plan_maxtext(contents, to, where, layout, params_only, dtype, axis, notes)
    if param_scan_axis is not None:
        raise UserError(f"param_scan_axis={param_scan_axis}: layers are stacked on axis 0 but in MaxText's formats")
    leaves = _plan_store(contents, where, layout, slots, dtype)
    notes += _left_out(contents, params_only)
    step = int(contents.scalars["step"]) if "step" in contents.scalars else 0
    return Plan(str(where), to, layout, step, dtype, params_only, tuple(leaves), tuple(notes))


def _check_source(contents: Contents, where: object, unexpected: str) -> list[str]:
    missing, unused = contents.missing_keys(), contents.unused_keys()
    if missing:
        raise UserError(
            f"{where}: {len(missing)} tensors that the model needs are not there: {', '.join(missing[:20])}"
            f"{', ...' if missing[20:] else ''}; load it with missing='warn' or 'init' and save the result"
        )
    if unused and unexpected == "error":
        raise UserError(
            f"{where}: {len(unused)} tensors are not part of the model: {', '.join(unused[:20])}"
            f"{', ...' if unused[20:] else ''}; --unexpected warn leaves them out"
        )
    notes = [f"left out, not part of the model: {key}" for key in unused]
    reasons: dict[str, list[str]] = {}
    if not isinstance(contents, StoreContents):
        for key, reason in contents.ignored_keys().items():
            reasons.setdefault(reason, []).append(key)
    kept = "kept to be converted back" if hasattr(contents, "random_state") else "left out"
    return notes + [
        f"{kept if 'random' in reason else 'left out'}, {reason}: {len(keys)} arrays ({keys[0]}, ...)"
        for reason, keys in reasons.items()
    ]


def _plan_store(
    contents: Contents, where: object, scan_layers: bool, slots: tuple[str, ...], dtype: str | None
) -> list[Planned]:
    """The arrays of our own format, in the order in which the source has their first tensors."""
    layout, found = Layout(contents.config, scan_layers), {}
    for slot in slots:
        for path, layer in contents.addresses(slot):
            leaf, row = layout.place(path, layer)
            target = f"{_prefix(contents, slot, path, layer)}/{leaf}"
            found.setdefault(target, {})[row] = Tensor(slot, path, layer)
    planned, problems = [], []
    for target, rows in found.items():
        tensors = tuple(rows[row] for row in sorted(rows, key=lambda row: row or 0))
        forms = {(contents.shape(t.path, t.layer, t.slot), contents.dtype(t.path, t.layer, t.slot)) for t in tensors}
        count = _rows_of(layout, target)
        if count is not None and len(tensors) != count:
            missing = sorted(set(range(count)) - {row for row in rows if row is not None})
            problems.append(f"{target} lacks rows {_ranges(missing)} of {count}")
        elif len(forms) > 1:
            shown = ", ".join(sorted(f"{d.name}{list(s)}" for s, d in forms))
            problems.append(f"{target} would stack different tensors: {shown}")
        else:
            ((shape, stored),) = forms
            wanted = _cast_to(stored, dtype if tensors[0].slot == WEIGHTS else None)
            shape = shape if count is None else (count, *shape)
            transform = _transform(contents, tensors, count is not None, stored.name, wanted)
            planned.append(Planned(target, shape, wanted, tensors, count is not None, transform))
    if problems:
        raise UserError(
            f"{where} cannot be written with scan_layers={scan_layers}: {'; '.join(problems[:20])}"
            f"{'; ...' if problems[20:] else ''}: check that config describes this checkpoint"
        )
    return planned


def _prefix(contents: Contents, slot: str, path: str, layer: int | None) -> str:
    """The branch of the state for a tensor: of our own checkpoints the one it was in, of others where ours would be."""
    if isinstance(contents, StoreContents):
        leaf, row = contents.place(slot, path, layer)
        below, _ = contents.layout.place(path, layer)
        return leaf.removesuffix(f"/{below}")
    if slot == WEIGHTS:
        frozen = getattr(contents, "lora", None) is not None and path.rpartition("/")[2] not in ADAPTERS
        return "base" if frozen else "params"
    # A kind that maxkit has no optimizer for is kept under its own names, so that it can be converted back.
    places = OPTIMIZER_PLACES.get(contents.optimizer or "")
    return (places.slots if places else {}).get(slot, f"opt_state/{slot}")


def _rows_of(layout: Layout, target: str) -> int | None:
    parts = target.split("/")
    for cut in range(len(parts) - 2):
        if parts[cut + 1].startswith(("block_", "layer_")):
            return layout.rows("/".join(parts[cut:]))
    return None


def _cast_to(stored: np.dtype, wanted: str | None) -> str:
    return wanted if wanted is not None and stored.name in (*DTYPES, "float64") else stored.name


def _transform(contents: Contents, tensors: tuple[Tensor, ...], stacked: bool, stored: str, wanted: str) -> str:
    cast = [] if stored == wanted else [f"cast {stored} to {wanted}"]
    first = tensors[0]
    if first.layer is None or contents.scan_layers == stacked:
        return ", ".join(cast) or "as it is"
    return ", ".join([f"stack {len(tensors)} layers" if stacked else "take out of its stack", *cast])


def _left_out(contents: Contents, params_only: bool) -> list[str]:
    """What of the source has no place in the destination, and what is made up."""
    if params_only:
        rest = [*contents.slots[1:], *sorted(contents.scalars)]
        return [f"left out (params only): {', '.join(rest)}"] if rest else []
    if isinstance(contents, StoreContents):
        return []
    if contents.optimizer is None:
        return []
    notes = ["rng: jax.random.key(0), for the source keeps none that maxkit uses"]
    if contents.optimizer not in OPTIMIZER_PLACES:
        known = ", ".join(OPTIMIZER_PLACES)
        notes.append(f"optimizer {contents.optimizer}: kept to be converted again; maxkit continues runs of {known}")
    return notes


def _plan_hf(
    contents: Contents, where: object, scan_layers: bool | None, origin: str, dtype: str | None, notes: list[str]
) -> Plan:
    if scan_layers is not None and scan_layers != contents.scan_layers:
        has = "has no layout either" if contents.scan_layers is None else f"stores scan_layers={contents.scan_layers}"
        raise UserError(
            f"scan_layers={scan_layers} was given ({origin}) but a Hugging Face folder has no layout of its layers, "
            f"and {where} {has}: leave scan_layers out"
        )
    merged = _for_hf(contents)
    table = find_table(merged.config, "hf")
    kinds = {_cast_to(merged.dtype(path, layer), dtype) for path, layer in merged.addresses()}
    if len(kinds) > 1:
        raise UserError(f"{where} holds weights of types {', '.join(sorted(kinds))}: give --dtype, one for all of them")
    leaves = []
    for path, layer in merged.addresses():
        place = table[path, layer]
        target = place.keys[0] if len(place.keys) == 1 else f"{place.keys[0]} and {len(place.keys) - 1} more"
        stored = merged.dtype(path, layer)
        steps = ["rearrange the axes"] if place.foreign_shape != merged.shape(path, layer) else []
        steps += [f"cast {stored.name} to {next(iter(kinds))}"] if stored.name not in kinds else []
        adapted = getattr(contents, "lora", None) is not None and merged.is_adapted(path, layer)
        steps += ["add its adapter"] if adapted else []
        steps += getattr(merged, "rewritten", {}).get(path, ())
        tensor = Tensor(WEIGHTS, path, layer)
        shape = merged.shape(path, layer)
        leaves.append(Planned(target, shape, next(iter(kinds)), (tensor,), False, ", ".join(steps) or "as it is"))
    notes = notes + _left_out(contents, True)
    notes += [f"rewritten: {names} in {path}" for path, names in _rewritten(merged).items()]
    return Plan(str(where), "hf", None, 0, dtype, True, tuple(leaves), tuple(notes))


def _plan_maxtext(
    contents: Contents,
    to: str,
    where: object,
    scan_layers: bool,
    params_only: bool,
    dtype: str | None,
    axis: int,
    notes: list[str],
) -> Plan:
    merged = _merged(contents)
    slots = (WEIGHTS,) if params_only else merged.slots
    if axis not in (0, 1):
        raise UserError(f"param_scan_axis={axis}: MaxText stacks layers on axis 0 or 1")
    config, settings = maxtext_form(merged.config)
    stated = Restated(merged, config)
    block = maxtext_facts.decoder_block(settings)
    scheme = containers.schemes(block, config)["scanned" if scan_layers else "unrolled"]
    found: dict[tuple[str, str], list[tuple[Tensor, Any]]] = {}
    for (path, layer), place in make_places(block, config, scheme).items():
        for slot in slots:
            if (path, layer) in set(merged.addresses(slot)):
                found.setdefault((slot, place.tree), []).append((Tensor(slot, path, layer), place))
    leaves = []
    for (slot, tree), members in found.items():
        first, place = members[0]
        stored = merged.dtype(first.path, first.layer, slot)
        wanted = _cast_to(stored, dtype if slot == WEIGHTS else None)
        steps = [f"stack {place.repeats} layers"] if place.row is not None else []
        steps += [*stated.rewritten.get(first.path, ()), *([f"cast {stored} to {wanted}"] if stored != wanted else [])]
        name = f"params/params/{tree}" if slot == WEIGHTS else f"{slot}/{tree}"
        tensors = tuple(tensor for tensor, _ in members)
        shape = place.stored_shape(axis)
        leaves.append(Planned(name, shape, wanted, tensors, False, ", ".join(steps) or "rearrange the axes"))
    if contents.tokenizer() is not None:
        notes = [*notes, "left out: the tokenizer, which MaxText keeps elsewhere"]
    notes = notes + [f"rewritten: {names} in {path}" for path, names in _rewritten(stated).items()]
    if params_only:
        notes += _left_out(contents, True)
    return Plan(str(where), to, scan_layers, 0, dtype, params_only, tuple(leaves), tuple(notes), axis)


def _merged(contents: Contents) -> Any:
    return Merged(contents) if getattr(contents, "lora", None) else contents


def _for_hf(contents: Contents) -> Any:
    """Without adapters, and stated as a config.json can say it."""
    return for_huggingface(_merged(contents))


def _rewritten(contents: Any) -> dict[str, str]:
    """{path: what is done} of tensors whose values change by more than a cast."""
    return {path: ", ".join(names) for path, names in getattr(contents, "rewritten", {}).items()}


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


# ------------------------------------------------------------ writing


def refuse_existing(destination: Path) -> None:
    """Refuse a destination that holds something: nothing is ever overwritten.

    Raises:
        UserError: it is a file or a folder that is not empty, or not on this machine's file system.
    """
    if "://" in str(destination) or ":/" in str(destination):
        raise UserError(f"{destination}: a checkpoint is written to a local folder; copy it from there")
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists():
        raise UserError(f"{destination} exists already: nothing is overwritten; choose another path or remove it first")


def write(contents: Contents, plan: Plan, destination: str | Path) -> Conversion:
    """Write what `plan` says, read it back, compare, and only then give it its name.

    Raises:
        UserError: the destination exists, is being written by another process, or cannot be written.
        DamagedCheckpoint: a tensor of the source is damaged, or what was read back is not what was written.
    """
    start, destination = time.perf_counter(), Path(destination).expanduser().absolute()
    refuse_existing(destination)
    partial = destination.with_name(destination.name + PARTIAL)
    with arrays.failure_named(destination):
        partial.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(partial)
    except UserError as error:
        raise UserError(f"{destination} is being written by another process, or cannot be: {error}") from error
    try:
        writer = {"maxkit": _write_store, "hf": _write_hf}.get(plan.to, _write_maxtext)
        verified, resumed = writer(contents, plan, partial)
        with arrays.failure_named(destination):
            for name in (JOURNAL, LOCK_FILE):
                (partial / name).unlink(missing_ok=True)
            os.replace(partial, destination)
            _sync_folder(destination.parent)
    finally:
        lock.release()
    return Conversion(plan, destination, verified, resumed, time.perf_counter() - start)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_store(contents: Contents, plan: Plan, partial: Path) -> tuple[int, int]:
    """One step of our own format below `partial`; (arrays verified, arrays that were there already)."""
    step_path = partial / "checkpoints" / str(plan.step)
    journal = _Journal(partial, _fingerprint(contents, plan))
    resumed = len(journal.done)
    writer = arrays.ArrayWriter(step_path / manifests.STATE)
    waiting = [leaf for leaf in plan.leaves if leaf.target not in journal.done]
    writer.create({leaf.target: (leaf.shape, np.dtype(leaf.dtype), leaf.stacked) for leaf in waiting if leaf.num_bytes})
    for leaf in waiting:
        commits = writer.commits
        found = _copy(contents, leaf, writer)
        if writer.commits > commits:  # what was written before this array is on disk
            journal.flush()
        journal.add(leaf.target, found)
    writer.commit()
    journal.flush()
    records = {
        leaf.target: LeafRecord(shape=leaf.shape, dtype=leaf.dtype, digest=journal.done[leaf.target])
        for leaf in plan.leaves
    }
    records |= _write_rest(contents, plan, writer)
    shapes = {path: stored_form(record.shape, record.dtype)[0] for path, record in records.items()}
    writer.finish({path: shape for path, shape in shapes.items() if math.prod(shape)})
    with arrays.failure_named(step_path):
        _write_files(contents, plan, step_path, records)
    return StoreContents(step_path).check_all(), resumed


def _copy(contents: Contents, leaf: Planned, writer: arrays.ArrayWriter) -> str:
    """Read the tensors of one array and write them; its digest."""
    running = digest_stream.RunningDigest(leaf.shape, leaf.dtype)
    for row, tensor in enumerate(leaf.tensors):
        value = np.ascontiguousarray(
            contents.read(tensor.path, tensor.layer, tensor.slot).astype(leaf.dtype, copy=False)
        )
        wanted = leaf.shape[1:] if leaf.stacked else leaf.shape
        if value.shape != wanted:
            raise UserError(f"{tensor.path} (layer {tensor.layer}) has shape {list(value.shape)}, not {list(wanted)}")
        running.add(value, row * value.size)
        if value.size:
            writer.write(leaf.target, value, row if leaf.stacked else None)
    return running.result()


def _write_rest(contents: Contents, plan: Plan, writer: arrays.ArrayWriter) -> dict[str, LeafRecord]:
    """Counters, step and key: small, so they are written at once."""
    values: dict[str, tuple[np.ndarray, tuple[int, ...], str]] = {}
    scalars = contents.scalars
    if isinstance(contents, StoreContents):
        for path in contents.unplaced:
            record = contents.manifest.leaves[path]
            if path == "step" or not plan.params_only:
                values[path] = contents.read_leaf(path), record.shape, record.dtype
    elif contents.optimizer is not None and not plan.params_only:
        places = OPTIMIZER_PLACES.get(contents.optimizer)
        count = np.asarray(scalars.get("count", plan.step), np.int32)
        values = {path: (count, (), "int32") for path in (places.counters if places else ("opt_state/count",))}
        values["step"] = np.asarray(plan.step, np.int32), (), "int32"
        values["rng"] = np.zeros(2, np.uint32), _NEW_KEY.shape, _NEW_KEY.dtype
        for name in scalars.keys() - {"step", "count"}:
            path = name if name.startswith("opt_state/") else f"opt_state/{name}"
            values[path] = scalars[name], scalars[name].shape, scalars[name].dtype.name
    elif "step" in scalars:
        values["step"] = scalars["step"], (), scalars["step"].dtype.name
    values |= _random_state(contents, plan)
    writer.create({path: (array.shape, array.dtype, False) for path, (array, _, _) in values.items() if array.size})
    for path, (array, _, _) in values.items():
        if array.size:
            writer.write(path, array)
    return {
        path: LeafRecord(shape=shape, dtype=dtype, digest=digest_stream.digest(array))
        for path, (array, shape, dtype) in values.items()
    }


def _random_state(contents: Contents, plan: Plan) -> dict[str, tuple[np.ndarray, tuple[int, ...], str]]:
    """Random numbers of a foreign writer, kept beside the state to be converted back: {leaf: (words, shape, dtype)}."""
    if plan.params_only or isinstance(contents, StoreContents) or not hasattr(contents, "random_state"):
        return {}
    found = {}
    for parts, (array, kind) in contents.random_state().items():
        path = "/".join((FOREIGN, *parts))
        if kind is None:
            found[path] = array, array.shape, array.dtype.name
        else:
            found[path] = array, array.shape[:-1], f"key<{KEY_NAMES.get(kind, kind)}>"
    return found


def _write_files(contents: Contents, plan: Plan, step_path: Path, records: dict[str, LeafRecord]) -> None:
    """The manifest with its tokenizer, the position in the data, and Orbax's record of the step, which comes last."""
    tokenizer = tokenizer_files(contents)
    manifest = _manifest(contents, plan, records, tokenizer)
    files = {f"{manifests.MANIFEST}/{k}": v for k, v in manifests.manifest_files(manifest, tokenizer).items()}
    if isinstance(contents, StoreContents) and manifest.has_iterator:
        place = contents.step_path / manifests.ITERATOR
        files |= {
            f"{manifests.ITERATOR}/{p.name}": p.read_bytes() for p in place.iterdir() if p.name.startswith("process_")
        }
    custom = {"scan_layers": plan.scan_layers, "format": manifests.FORMAT, "version": manifests.VERSION}
    files[inspect.STEP_METADATA] = json.dumps({"item_handlers": {}, "metrics": {}, "custom_metadata": custom}).encode()
    for name, content in files.items():
        path = step_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _manifest(contents: Contents, plan: Plan, records: dict[str, LeafRecord], tokenizer: dict[str, bytes]) -> Manifest:
    if isinstance(contents, StoreContents):
        config = dict(contents.manifest.config)
        if config.get("scan_layers") is not None:
            config["scan_layers"] = plan.scan_layers
        changes: dict[str, Any] = {"scan_layers": plan.scan_layers, "leaves": records, "config": config}
        if plan.params_only:
            changes |= {"optimizer": None, "has_iterator": False}
        return contents.manifest.model_copy(update=changes)
    groups = tuple(
        GroupRecord(name=g.name, pattern_length=len(g.pattern), repeats=g.repeats)
        for g in contents.config.layer_groups()
    )
    model = contents.config.model_dump(mode="json")
    lora = getattr(contents, "lora", None)
    if lora is not None:
        model["lora"] = lora.model_dump(mode="json")
    return Manifest(
        step=plan.step,
        scan_layers=plan.scan_layers,
        config={},
        explicit={},
        model=model,
        groups=groups,
        optimizer=None if plan.params_only else contents.optimizer,
        leaves=records,
        tokenizer={name: manifests.sha256(content) for name, content in tokenizer.items()},
        parent=None if plan.source == "memory" else plan.source,
        packages=manifests.package_versions(),
    )


class _Journal:
    """Which arrays are on disk, with their digests: one line each, after a first line that says of which conversion."""

    def __init__(self, folder: Path, fingerprint: str):
        self._path, self._waiting = folder / JOURNAL, []
        self.done: dict[str, str] = {}
        if not self._continues(fingerprint):
            for path in folder.iterdir():
                if path.name != LOCK_FILE:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            with arrays.failure_named(folder):
                self._append([json.dumps({"fingerprint": fingerprint})])

    def _continues(self, fingerprint: str) -> bool:
        if not self._path.exists():
            return False
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        try:  # a last line without its end was being written when the process died
            first, *rest = [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            return False
        if first != {"fingerprint": fingerprint}:
            return False
        self.done = {entry["array"]: entry["digest"] for entry in rest}
        return True

    def add(self, array: str, digest: str) -> None:
        """Note an array that was written; `flush` makes the note last."""
        self.done[array] = digest
        self._waiting.append(json.dumps({"array": array, "digest": digest}))

    def flush(self) -> None:
        """Write the notes; only what they speak of may be on disk before."""
        with arrays.failure_named(self._path):
            self._append(self._waiting)
        self._waiting = []

    def _append(self, lines: list[str]) -> None:
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())


def _fingerprint(contents: Contents, plan: Plan) -> str:
    """Of what is read and what is written: a conversion goes on only with the very same."""
    content = [plan.to, plan.scan_layers, plan.step, plan.dtype, plan.params_only, [list(leaf) for leaf in plan.leaves]]
    if isinstance(contents, StoreContents):
        content.append({path: leaf.digest for path, leaf in contents.manifest.leaves.items()})
    elif path := getattr(contents, "path", None):
        content.append(_files(Path(str(path))))
    else:
        content.append(time.time_ns())  # weights in memory: nothing says that they are the same
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _files(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _write_hf(contents: Contents, plan: Plan, partial: Path) -> tuple[int, int]:
    """A model's folder that transformers opens; (tensors compared after reading them back, 0)."""
    _start_again(partial)
    source = _for_hf(contents)
    digests: dict[tuple[str, int | None], str] = {}

    def leaves() -> Iterator[tuple[str, int | None, np.ndarray]]:
        for leaf in plan.leaves:
            _, path, layer = leaf.tensors[0]
            value = source.read(path, layer).astype(leaf.dtype, copy=False)
            digests[path, layer] = digest_stream.digest(value)
            yield path, layer, value

    folder = partial / "model"
    write_huggingface(folder, source.config, leaves(), contents.tokenizer(), plan.leaves[0].dtype)
    compare_digests(HuggingFaceReader(folder).read, digests, folder)
    with arrays.failure_named(partial):
        for path in folder.iterdir():
            os.replace(path, partial / path.name)
        folder.rmdir()
    return len(digests), 0


class _Recorder:
    """`contents` that remembers the digest of every tensor as it will be written, {(slot, path, layer): digest}."""

    def __init__(self, contents: Any, dtype: str | None):
        self._contents, self._dtype = contents, dtype
        self.digests: dict[Tensor, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._contents, name)

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor."""
        value = self._contents.read(path, layer, slot)
        wanted = _cast_to(value.dtype, self._dtype if slot == WEIGHTS else None)
        self.digests[Tensor(slot, path, layer)] = digest_stream.digest(value.astype(wanted, copy=False))
        return value


def _write_maxtext(contents: Contents, plan: Plan, partial: Path) -> tuple[int, int]:
    """A checkpoint that MaxText restores; (tensors compared after reading them back, 0)."""
    _start_again(partial)
    recorder = _Recorder(_merged(contents), plan.dtype)
    done = maxtext_writer.write(
        partial,
        recorder,
        layout=plan.to,  # type: ignore[arg-type]
        scan_layers=bool(plan.scan_layers),
        dtype=plan.dtype,
        params_only=plan.params_only,
        scan_axis=plan.param_scan_axis,
    )
    written = MaxTextContents(partial)
    rewritten = _Recorder(Restated(_merged(contents), written.config), plan.dtype)
    wrong = []
    for tensor, digest in recorder.digests.items():
        key = tensor.path, tensor.layer, tensor.slot
        if tensor.path in done.rewritten:  # read once more, to be restated
            rewritten.read(*key)
            digest = rewritten.digests[tensor]
        if digest_stream.digest(written.read(*key)) != digest:
            wrong.append(f"{tensor.slot} of {tensor.path} (layer {tensor.layer})")
    if wrong:
        raise DamagedCheckpoint(f"{partial}: read back, these are not what was written: {', '.join(wrong[:10])}")
    return len(recorder.digests), 0


def compare_digests(
    read: Callable[[str, int | None], np.ndarray], digests: dict[tuple[str, int | None], str], where: Any
) -> None:
    """Read tensors back and compare them with what was written.

    Raises:
        DamagedCheckpoint: names those that differ.
    """
    wrong = [f"{p} (layer {i})" for (p, i), wanted in digests.items() if digest_stream.digest(read(p, i)) != wanted]
    if wrong:
        raise DamagedCheckpoint(f"{where}: read back, these are not what was written: {', '.join(wrong[:10])}")


def _start_again(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name != LOCK_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

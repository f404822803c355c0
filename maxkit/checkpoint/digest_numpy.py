# SPDX-License-Identifier: Apache-2.0
"""The 64-bit digest of one array, in numpy: for readers that have no JAX.

The formula, shared with `digest.py` (which computes it on the device):
an element is one 32-bit word (8 and 16 bit patterns are zero-extended) or, from 64 bits on, several words,
low first. Word number n holds w; each of two lanes adds `mix(w ^ (n * step + seed))` modulo 2^32, `mix` being
a bijective finaliser. A sum of integers has no order, so the digest knows nothing of shards, layouts on disk
or devices; a bijection means that a change inside a single word always changes both lanes.
Arrays of more than 2^32 words have (outer, n) in place of n: n counts the words of the largest group of
trailing dimensions that has at most 2^32 of them, outer counts the groups.
Shape and dtype are not part of it: the manifest records them beside it.
"""

import functools
from typing import Any

import numpy as np

# Per lane: step and seed of the position, step of `outer`, shifts and multipliers of the finaliser
# (murmur3's, and the one of lower bias that Wellons found by search, github.com/skeeto/hash-prospector).
LANES = (
    (0x9E3779B1, 0x00000001, 0x27D4EB2F, (16, 13, 16), (0x85EBCA6B, 0xC2B2AE35)),
    (0x85EBCA77, 0x165667B1, 0x9E3779B1, (16, 15, 16), (0x7FEB352D, 0x846CA68B)),
)
_CHUNK_WORDS = 1 << 15  # 128 KiB per temporary stays in the second level cache: 2x faster than whole arrays


def words_per_element(dtype: Any) -> int:
    """How many 32-bit words one element fills: 1 up to 32 bits, 2 for 64, 4 for 128."""
    return max(1, np.dtype(dtype).itemsize // 4)


def inner_words(shape: tuple[int, ...], words: int) -> int:
    """Words in the largest group of trailing dimensions that has at most 2^32 of them."""
    size = words
    for extent in reversed(shape):
        if size * extent > 1 << 32:
            return size
        size *= extent
    return size


def format_lanes(first: int, second: int) -> str:
    """The 16 hex digits of two lane sums."""
    return f"{int(first) & 0xFFFFFFFF:08x}{int(second) & 0xFFFFFFFF:08x}"


def digest_array(array: Any) -> str:
    """Digest a numpy array (or memory map) as 16 hex digits; the bits count, so -0.0 is not 0.0.

    Reads chunk by chunk: beside the array it needs about 1 MB (a non-contiguous array is copied).
    """
    array = np.asarray(array)
    words = as_words(array)
    if not words.size:
        return format_lanes(0, 0)
    inner = inner_words(array.shape, words_per_element(array.dtype))
    sums = [0, 0]
    for start in range(0, words.size, inner):
        for lane, value in enumerate(lane_sums(words[start : start + inner], 0, start // inner)):
            sums[lane] += value
    return format_lanes(*sums)


def lane_sums(words: np.ndarray, offset: int, outer: int) -> tuple[int, int]:
    """Both lane sums of the words number `offset` and on of group `outer`, modulo 2^32."""
    sums = [0, 0]
    for start in range(0, words.size, _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        for lane, constants in enumerate(LANES):
            sums[lane] += _lane_sum(chunk, offset + start, outer, lane, constants)
    return sums[0] & 0xFFFFFFFF, sums[1] & 0xFFFFFFFF


def as_words(array: np.ndarray) -> np.ndarray:
    """Flat little-endian words of 1, 2 or 4 bytes, without a copy where the array is contiguous."""
    dtype = array.dtype
    if dtype.name in ("int2", "uint2", "int4", "uint4"):  # ml_dtypes keeps them one to a byte
        array = array.astype(np.int8 if dtype.name.startswith("i") else np.uint8)
    elif dtype.kind not in "biufcV" or dtype.hasobject:
        raise TypeError(f"no digest for dtype {dtype}: arrays of numbers only")
    elif dtype.byteorder == ">":
        array = array.astype(dtype.newbyteorder("<"))
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view({1: np.uint8, 2: np.uint16}.get(flat.dtype.itemsize, np.uint32))


def _lane_sum(words: np.ndarray, first: int, outer: int, lane: int, constants: tuple) -> int:
    step, seed, outer_step, shifts, multipliers = constants
    start = np.uint32((first * step + outer * outer_step + seed) & 0xFFFFFFFF)
    h = _steps(lane)[: words.size] + start  # modulo 2^32, as all that follows
    h ^= words
    other = np.empty_like(h)
    for shift, multiplier in zip(shifts, multipliers, strict=False):
        h ^= np.right_shift(h, np.uint32(shift), out=other)
        h *= np.uint32(multiplier)
    h ^= np.right_shift(h, np.uint32(shifts[-1]), out=other)
    return int(np.add.reduce(h, dtype=np.uint32))


@functools.cache
def _steps(lane: int) -> np.ndarray:
    """The step times 0, 1, 2, ... of a chunk."""
    return np.arange(_CHUNK_WORDS, dtype=np.uint32) * np.uint32(LANES[lane][0])

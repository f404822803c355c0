# SPDX-License-Identifier: Apache-2.0
"""The mesh axes and their one-line notation, without JAX, so that a bad `mesh` is refused before anything starts."""

import math
import re

from maxkit.errors import UserError, nearest

# data: rows, weights whole. fsdp: rows and weights. expert: rows and experts. tensor: heads, mlp and vocabulary.
AXES = ("data", "fsdp", "expert", "tensor")


def parse_sizes(description: str) -> dict[str, int]:
    """`"fsdp:4,tensor:2"` to {"fsdp": 4, "tensor": 2}; -1 stands for what remains.

    Raises:
        UserError: syntax, unknown or repeated axis, a size that is neither positive nor -1, more than one -1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in description.split(","))):
        name, colon, size = (piece.strip() for piece in part.partition(":"))
        if not colon or not re.fullmatch(r"-?[0-9]+", size):
            raise UserError(f"mesh={description!r}: {part!r} is not axis:size, as in 'fsdp:4,tensor:2'")
        if name not in AXES:
            raise UserError(f"mesh={description!r}: unknown axis {name!r}; {nearest(name, AXES)}")
        if name in sizes:
            raise UserError(f"mesh={description!r}: axis {name!r} is given twice")
        if int(size) < 1 and int(size) != -1:
            raise UserError(f"mesh={description!r}: size {size} of {name!r} must be positive, or -1 for what remains")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh={description!r}: only one size may be -1")
    return sizes


def parse_mesh(description: str, num_devices: int) -> dict[str, int]:
    """Sizes of all `AXES` for `num_devices`; `""` puts all of them on fsdp.

    Raises:
        UserError: as `parse_sizes`, or the sizes do not multiply to `num_devices`.
    """
    sizes = parse_sizes(description) or {"fsdp": -1}
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if num_devices % known:
            raise UserError(f"mesh={description!r}: {num_devices} devices cannot be divided by {known}")
        sizes = {name: num_devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise UserError(
            f"mesh={description!r} needs {math.prod(sizes.values())} devices, here are {num_devices}; "
            "use '' for all on fsdp, or -1 for one of the sizes"
        )
    return {name: sizes.get(name, 1) for name in AXES}

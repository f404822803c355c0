# SPDX-License-Identifier: Apache-2.0
"""Everything that is claimed of MaxText's checkpoints, tried on a folder of them and printed as a Markdown table.

    PYTHONPATH=.:tests .venv/bin/python tests/golden/maxtext_table.py FOLDER

FOLDER/*/ holds what tests/fixtures/maxtext/README.md describes. Columns:

| column | what is tried | wanted |
| --- | --- | --- |
| inspected | format, scan_layers, optimizer, step and groups | those that wrote it |
| without config | opened without a description | refused, with what is unknown |
| logits | the largest difference to MaxText's, plain / packed, as a part of their spread | below 5e-4 |
| there and back | to maxkit's format and back, SHA-256 of every array | all equal |
| through HF | to a Hugging Face folder and back | equal, but for what is rewritten: that within 1 ulp |
| one value | one number of one layer changed in a copy of the other layout | path, layer and index named |

Logits of a tied model are taken with the table rounded to bfloat16, as MaxText does; without it they differ by up to
2e-2. Exit code 1 where anything is not as wanted.
"""

import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SAME = (  # pairs that hold the same weights, and the steps of rounding between them
    ("linen_scanned_024", "nnxnative_scanned", 0.0),
    ("linen_unscanned_024", "nnxnative_unscanned_integer", 0.0),
    ("paramonly_linen_scanned_024", "paramonly_linen_unrolled_024", 0.0),
    ("paramonly_nnx_scanned_025", "paramonly_nnx_unrolled_025", 0.0),
    ("nnx_scanned_024", "nnx_scanned_025", 0.0),  # two releases, one seed
    ("nnx_scanned_024", "paramonly_nnx_scanned_025", 2**-8),
    ("nnx_scanned_024", "paramonly_nnx_unrolled_025", 2**-8),
    ("linen_scanned_024", "paramonly_linen_scanned_024", 2**-8),
    ("linen_scanned_024", "paramonly_linen_unrolled_024", 2**-8),
    ("nnxnative_scanned", "paramonly_linen_scanned_024", 2**-8),
    ("nnxnative_scanned", "paramonly_linen_unrolled_024", 2**-8),
    ("nnx_scanned_025", "paramonly_nnx_scanned_025", 2**-8),
    ("nnx_scanned_025", "paramonly_nnx_unrolled_025", 2**-8),
)


class Changed:
    """`contents` with `amount` more in one place."""

    def __init__(self, contents: Any, address: tuple[str, int], index: tuple[int, ...], amount: float) -> None:
        self.contents, self.address, self.index, self.amount = contents, address, index, amount

    def __getattr__(self, name: str) -> Any:
        return getattr(self.contents, name)

    def read(self, path: str, layer: int | None = None, slot: str = "params") -> np.ndarray:
        """One tensor."""
        array = self.contents.read(path, layer, slot)
        if (path, layer, slot) == (*self.address, "params"):
            array = array.copy()
            array[self.index] += np.asarray(self.amount, array.dtype)
        return array


def ulps(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many numbers of their type lie between two arrays at most."""

    def ordered(array: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}").astype(np.int64)
        return np.where(bits < 0, -(bits & (2 ** (8 * array.dtype.itemsize - 1) - 1)), bits)

    return int(np.abs(ordered(ours) - ordered(theirs)).max(initial=0))


class Table:
    """One row after the other, by the functions of the tests."""

    def __init__(self, folder: Path) -> None:
        os.environ["MAXKIT_MAXTEXT_FIXTURES"] = str(folder)
        from golden import test_maxtext  # which looks at the variable once

        self.tests, self.folder, self.failed = test_maxtext, folder, False
        self.names = sorted(path.parent.name for path in folder.glob("*/config_resolved.txt"))

    def tried(self, name: str, action: str, *arguments: Any) -> str:
        """The cell of one column: what was found, or what went wrong."""
        try:
            return getattr(self, action)(name, *arguments)
        except Exception as error:  # each cell is a result, an exception too
            self.failed = True
            return f"**{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}**"

    def source(self, name: str) -> tuple[Path, Path]:
        """Checkpoint and description."""
        return self.folder / name / "checkpoints", self.folder / name / "config_resolved.txt"

    def inspected(self, name: str) -> str:
        """As the test expects it."""
        self.tests.test_inspected(name)
        kind, scanned, optimizer, _, groups = self.tests.EXPECTED[name]
        layers = ", ".join(f"{group} {length} x {repeats}" for group, length, repeats in groups)
        return f"{kind}, {'scanned' if scanned else 'unrolled'} ({layers}), {optimizer or 'params only'}"

    def refused(self, name: str) -> str:
        """Without a description."""
        self.tests.test_refused_without_a_description(name)
        return "refused"

    def logits(self, name: str) -> str:
        """Plain and packed."""
        file = self.folder / name / "logits.npz"
        if not file.exists():
            return "not recorded"
        contents, arrays, found = self.tests.open_fixture(name), np.load(file), []
        tied = contents.config.tie_embeddings
        for prefix, wanted in (("", arrays["logits"]), ("packed_", arrays["packed_logits"])):
            got = self.tests.logits(contents, contents.scan_layers, arrays, prefix, rounded=tied)
            found.append(self.tests.difference(got, wanted, arrays[f"{prefix}segment_ids"]))
        self.failed |= max(found) >= self.tests.SPREAD
        return " / ".join(f"{value:.0e}" for value in found)

    def there_and_back(self, name: str, work: Path) -> str:
        """Through maxkit's own format."""
        from maxkit.checkpoint.convert import convert
        from maxkit.formats.orbax_arrays import OrbaxArrays

        path, config = self.source(name)
        contents = self.tests.open_fixture(name)
        there = convert(path, work / "there", to="maxkit", config=config)
        back = convert(
            there.path,
            work / "back",
            to="maxtext-linen" if "linen" in name else "maxtext-nnx",
            params_only=contents.optimizer is None,
            param_scan_axis=contents.scan_axis,
        )
        arrays = OrbaxArrays(back.path / "0" / "items")
        wanted = {key: leaf["sha256"] for key, leaf in self.tests.recorded(name).items() if leaf}
        if name.startswith("nnxnative"):  # comes back in the form of today's runs, without its random numbers
            keys = {self.tests.as_a_run_writes_it(key): digest for key, digest in wanted.items() if "rngs" not in key}
            step = keys.pop("step")  # an int32 there
            assert step and int(arrays.read("step")) == int(contents.scalars["step"])
            wanted = keys
        equal = sum(self.tests.digest(arrays.read(key)) == digest for key, digest in wanted.items())
        self.failed |= equal != len(wanted)
        return f"{equal} of {len(wanted)}"

    def through_hf(self, name: str, work: Path) -> str:
        """And back; what is rewritten within an ulp."""
        from maxkit.checkpoint.convert import convert
        from maxkit.errors import UserError
        from maxkit.formats import maxtext

        path, config = self.source(name)
        try:
            there = convert(path, work / "hf", to="hf", config=config)
        except UserError as error:
            assert "cannot have moe=" in str(error), error
            return "refused: config.json cannot say how its router uses the bias"
        contents = self.tests.open_fixture(name)
        layout = contents.scan_layers
        back = maxtext.open(
            convert(there.path, work / "from_hf", to="maxtext-linen", params_only=True, scan_layers=layout).path
        )
        notes = [note.removeprefix("rewritten: ").split(" in ") for note in there.plan.notes if "rewritten: " in note]
        rewritten = {path: kind for kind, path in notes}
        most = dict.fromkeys(rewritten.values(), 0)
        equal = 0
        for address in contents.addresses():
            away = ulps(contents.read(*address), back.read(*address))
            if address[0] in rewritten:
                kind = rewritten[address[0]]
                most[kind] = max(most[kind], away)
            else:
                equal += away == 0
                self.failed |= away > 0
        self.failed |= max(most.values(), default=0) > 1
        kinds = ", ".join(f"{kind}: {away} ulp" for kind, away in most.items())
        return f"{equal} equal; {kinds} ({len(contents.addresses()) - equal} tensors)"

    def one_value(self, name: str, work: Path) -> str:
        """Changed in a copy of the other layout."""
        from maxkit.checkpoint.compare import compare
        from maxkit.checkpoint.conversion_plan import make_plan
        from maxkit.checkpoint.convert import write

        path, config = self.source(name)
        contents = self.tests.open_fixture(name)
        address = max((a for a in contents.addresses() if a[0].endswith("up/kernel")), key=lambda a: a[1])
        index = tuple(size // 2 for size in contents.shape(*address))
        changed = Changed(contents, address, index, 0.5)
        write(changed, make_plan(changed, "maxkit", name, scan_layers=not contents.scan_layers), work / "changed")
        (difference,) = compare(path, work / "changed", config_a=config, values=True, atol=0, rtol=0).differences
        assert (difference.path, difference.layer, difference.index, difference.count) == (*address, index, 1)
        return f"{difference.path} {difference.layer} {list(map(int, difference.index))}"

    def pairs(self) -> list[str]:
        """All pairs, and which of them are equal."""
        from maxkit.checkpoint.compare import compare

        wanted = {frozenset(pair): step for *pair, step in SAME}
        lines, others = [], 0
        for one, two in itertools.combinations(self.names, 2):
            step = wanted.get(frozenset((one, two)), 0.0)
            (a, config_a), (b, config_b) = self.source(one), self.source(two)
            found = compare(a, b, config_a=config_a, config_b=config_b, values=True, atol=step * 1e-3, rtol=step)
            equal = frozenset((one, two)) in wanted
            self.failed |= found.equal != equal
            others += not equal and not found.equal
            if equal or found.equal:
                bits = "every bit" if not step else "rounded to bfloat16"
                lines.append(f"| {one} | {two} | {bits if found.equal == equal else '**not as wanted**'} |")
        return ["| | | equal |", "| --- | --- | --- |", *lines, "", f"The {others} other pairs differ, as they must."]


def main() -> int:
    """Print the tables."""
    table = Table(Path(sys.argv[1]).absolute())
    columns = ("inspected", "refused", "logits", "there_and_back", "through_hf", "one_value")
    print("| checkpoint | inspected | without config | logits | there and back | through HF | one value |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in table.names:
        with tempfile.TemporaryDirectory() as work:
            cells = [table.tried(name, column, *([Path(work)] if column in columns[3:] else [])) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print("", *table.pairs(), sep="\n")
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main())

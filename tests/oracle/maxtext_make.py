# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as `maxkit convert --to maxtext-linen` writes them, with the logits that MaxText should find.

    PYTHONPATH=.:tests .venv/bin/python tests/oracle/maxtext_make.py FOLDER [NAME...]
    MAXTEXT_VENV/bin/python tests/oracle/maxtext_check.py FOLDER      # Python 3.12 with maxtext 0.2.5 and what it needs

The second loads each by MaxText's own reader and prints the largest difference of the logits as a part of their spread.
NAME: some of the cases only.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from golden import families
from golden.test_maxtext_families import OTHERS
from tiny_models import weights

from maxkit.checkpoint import load
from maxkit.checkpoint.contents import Plain, TreeContents
from maxkit.errors import UserError
from maxkit.formats import maxtext
from maxkit.formats.huggingface import HuggingFaceReader
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition

FIXTURES = Path(__file__).parents[1] / "fixtures" / "maxtext"
FROM_MAXTEXT = (
    "axis0_scanned_025",
    "sgd_unscanned_025",
    "deepseek_nnx_scanned_025",
    "deepseek_linen_unscanned_024",
    "gemma3_nnx_scanned_025",
)
FROM_HF = (
    *("mistral-full", "qwen2-full", "qwen3-full", "qwen3_moe-all", "mixtral-full", "gemma-mqa", "deepseek_v3-groups"),
    *("deepseek_v2-lite", "gpt_oss-yarn", "olmo3-remainder", "llama-yarn", "gpt2-tied", "gpt2-untied"),
)
IN_MEMORY = ("qwen3_next", "llama4", "gpt3", "olmo2", "gemma2", "llama3.1")


def put(folder: Path, contents, scan_layers: bool) -> None:
    """One checkpoint and `want.npz` beside it."""
    maxtext.write(folder, contents, scan_layers=scan_layers)
    definition = ModelDefinition(contents.config, Execution())
    params = load.read_params(contents, definition, None, report=[])
    tokens = np.random.default_rng(0).integers(3, 48, (2, 24), dtype=np.int32)
    logits = jax.jit(lambda params, ids: definition.merge(params)(ids)[0])(params, tokens)
    np.savez(folder / "want.npz", tokens=tokens, logits=np.asarray(logits))


def in_memory(name: str) -> TreeContents:
    """Random weights of a model."""
    definition = ModelDefinition(OTHERS[name], Execution())
    params = {path: np.asarray(x) for path, x in definition.flat(weights(definition, 3)).items()}
    return TreeContents(OTHERS[name], params, scan_layers=True)


def main(out: Path, only: list[str]) -> None:
    """Every case, scanned and unrolled."""
    wanted = set(only or (*FROM_MAXTEXT, *FROM_HF, *IN_MEMORY))
    for scan_layers in (True, False):
        for name in filter(wanted.__contains__, IN_MEMORY):
            put(out / f"{name}-{scan_layers}", in_memory(name), scan_layers)
        for name in filter(wanted.__contains__, FROM_MAXTEXT):
            contents = maxtext.open(FIXTURES / name, FIXTURES / name / "config_resolved.txt")
            put(out / f"{name}-{scan_layers}", contents, scan_layers)
        for name in filter(wanted.__contains__, FROM_HF):
            with tempfile.TemporaryDirectory() as folder:
                families.write_folder(Path(folder) / "hf", name)
                try:
                    put(out / f"{name}-{scan_layers}", Plain(HuggingFaceReader(Path(folder) / "hf")), scan_layers)
                except UserError as error:
                    print(f"{name}, scan_layers={scan_layers}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])

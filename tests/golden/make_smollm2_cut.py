# SPDX-License-Identifier: Apache-2.0
"""Make tests/fixtures/smollm2/logits_cut.npz out of the full reference logits (8.3 MB):

    python tests/golden/make_smollm2_cut.py /path/to/reference_logits.npz

The reference was computed in float32 by transformers on the dequantised weights of SmolLM2-135M-Instruct.Q4_1.gguf.
"""

import sys
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parent.parent / "fixtures" / "smollm2" / "logits_cut.npz"
TOP, RANDOM = 64, 2048  # vocabulary columns: the likeliest of each position, and a fixed sample
ROWS = (0, 21, 44)  # positions whose whole row is kept
HIDDEN = (0, 1, 22, 44)  # positions whose hidden states are kept


def main(source: str) -> None:
    full = np.load(source)
    logits = full["logits"]
    likely = np.unique(np.argsort(-logits, axis=1)[:, :TOP])
    sample = np.random.default_rng(0).choice(logits.shape[1], RANDOM, replace=False)
    columns = np.union1d(likely, sample)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        TARGET,
        prompt=full["prompt"],
        input_ids=full["input_ids"],
        columns=columns.astype(np.int32),
        logits=logits[:, columns],
        rows=np.asarray(ROWS, np.int32),
        row_logits=logits[list(ROWS)],
        hidden_positions=np.asarray(HIDDEN, np.int32),
        **{name: full[name][list(HIDDEN)] for name in ("hidden_l0", "hidden_l1", "hidden_l15", "hidden_last")},
    )
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes, {len(columns)} columns")


if __name__ == "__main__":
    main(sys.argv[1])

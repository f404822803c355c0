# SPDX-License-Identifier: Apache-2.0
"""MaxText's own reader and forward pass on what `maxtext_make.py` wrote; one process for each checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

RUN = {
    "run_name": "check",
    "hardware": "cpu",
    "skip_jax_distributed_system": "true",
    "per_device_batch_size": 2,
    "max_target_length": 24,
    "dtype": "float32",
    "weight_dtype": "float32",
    "attention": "dot_product",
    "enable_goodput_recording": "false",
    "log_config": "false",
    "sparse_matmul": "false",
    "megablox": "false",
    "capacity_factor": -1.0,
}


def check(folder: Path) -> None:
    """Print the largest difference of the logits."""
    os.environ.update(JAX_PLATFORMS="cpu", DECOUPLE_GCLOUD="TRUE")
    import maxtext
    import numpy as np
    import yaml
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

    settings = yaml.safe_load((folder / "maxtext.yml").read_text())
    given = {**RUN, "base_output_directory": str(folder / "out"), "load_parameters_path": str(folder / "0" / "items")}
    file = folder / "maxtext.yml"
    if "model_name" in settings:  # whose own file MaxText prefers to ours: as arguments then
        file = Path(maxtext.__file__).parent / "configs" / "base.yml"
        settings.pop("base_config")
        given = {name: value for name, value in settings.items() if value not in (None, "")} | given
    config = pyconfig.initialize(["check", str(file), *(f"{name}={value}" for name, value in given.items())])
    found = model_creation_utils.from_pretrained(config)
    model = found[0] if isinstance(found, tuple) else found
    want = np.load(folder / "want.npz")
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), want["tokens"].shape)
    segments = np.ones_like(want["tokens"])
    logits = model(want["tokens"], positions, decoder_segment_ids=segments, enable_dropout=False)
    difference = np.abs(np.asarray(logits, np.float32) - want["logits"]).max() / np.ptp(want["logits"])
    print(f"{folder.name}: {difference:.1e}{' (tied: bfloat16 table)' if settings.get('logits_via_embedding') else ''}")


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    if (place / "want.npz").exists():
        check(place)
    else:
        for each in sorted(path.parent for path in place.glob("*/want.npz")):
            subprocess.run([sys.executable, __file__, str(each)], check=True, stderr=subprocess.DEVNULL)

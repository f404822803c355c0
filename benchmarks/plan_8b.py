# SPDX-License-Identifier: Apache-2.0
"""HBM of a training step of a model with the sizes of Llama 3.1 8B, from the TPU compiler; one JSON line.

    python benchmarks/plan_8b.py [TOPOLOGY] [NAME=VALUE ...]

Sequence 2048, 2 rows per device, bfloat16 activations, float32 weights, AdamW, full rematerialisation,
scanned layers, everything on fsdp. Runs on any machine that has the environment which `make plan` makes;
nothing is executed on a TPU.
"""

import json
import sys
import tempfile
from pathlib import Path

from maxkit.plan import plan

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
SETTINGS = {
    "batch_size": 16,
    "seq_len": 2048,
    "dtype": "bfloat16",
    "remat_policy": "full",
    "num_vocab_tiling": 8,
    "optimizer": "adamw",
    "scan_layers": True,
}


def main(argv: list[str]) -> None:
    topology = argv[0] if argv else "v5p:2x2x2"
    given = SETTINGS | dict(pair.split("=", 1) for pair in argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_3_1_8B), encoding="utf-8")
        found = plan("sft", topology, given | {"model": folder})
    print("\n".join(found.lines()), file=sys.stderr)
    gib = {name: round(size / 2**30, 2) for name, size in vars(found.memory).items() if size is not None}
    record = {
        "benchmark": "plan_8b",
        "topology": topology,
        "settings": given,
        "fits": found.fits,
        "gib_per_device": gib,
        "collectives": [vars(one) for one in found.collectives],
        "seconds": found.seconds,
        "versions": found.versions,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])

# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of a small model with random weights; prints one JSON line.

Embed 512, 8 layers, 8 heads, 4 kv heads, head_dim 64, mlp 1408, vocab 8192, untied, float32; batch 4, prompt 64, 64 new
tokens. A call is timed whole, from lists of ids to lists of ids.
"""

import argparse
import json
import os
import resource
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from maxkit.infer import Engine
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition

CONFIG = ModelConfig(
    vocab_size=8192,
    num_layers=8,
    embed_dim=512,
    mlp_dim=1408,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_seq_len=2048,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scan-layers", choices=["true", "false"], default="true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=None)
    parser.add_argument("--calls", type=int, default=6, help="timed calls after the one that compiles")
    args = parser.parse_args()
    definition = ModelDefinition(CONFIG, Execution(scan_layers=args.scan_layers == "true"))
    engine = Engine(definition, definition.init(0), batch_size=args.batch)
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (args.batch, args.prompt)).tolist()
    how = {"max_new_tokens": args.new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    seconds = []
    for _ in range(1 + args.calls):
        start = time.perf_counter()
        out = engine.generate_batch(ids, **how)
        seconds.append(time.perf_counter() - start)
    first, timed, tokens = seconds[0], seconds[1:], int(out.lengths.sum())
    record = {
        "benchmark": "decode",
        "scan_layers": args.scan_layers == "true",
        "num_params": definition.num_params,
        "batch": args.batch,
        "prompt": args.prompt,
        "new_tokens": tokens,
        "temperature": args.temperature,
        "compile_s": round(first - min(timed), 2),
        "best_s": round(min(timed), 4),
        "median_s": round(statistics.median(timed), 4),
        "tokens_per_s": round(tokens / min(timed), 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "jax": jax.__version__,
        "devices": f"{len(jax.devices())} {jax.devices()[0].platform}",
        "cores": os.cpu_count(),
        "load1": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()

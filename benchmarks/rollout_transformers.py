# SPDX-License-Identifier: Apache-2.0
"""The rollouts of `post_training.py` by `transformers.generate`, in the environment of `make oracle`; one JSON line.

    .venv-oracle/bin/python benchmarks/rollout_transformers.py

The same architecture with random weights, prompts, lengths and temperature, from ids to ids. Nothing of maxkit is used.
"""

import argparse
import json
import os
import statistics
import time

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, PROMPT, NEW, PAD = 8, 32, 64, 4095
CONFIG = LlamaConfig(
    vocab_size=4096,
    num_hidden_layers=4,
    hidden_size=256,
    intermediate_size=704,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    eos_token_id=0,
    pad_token_id=PAD,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=6, help="calls that are timed, after one that is not")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    prompts = torch.as_tensor(np.random.default_rng(0).integers(3, 4000, (ROWS, PROMPT)))
    rates = []
    for _ in range(args.count + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            rows = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=True, top_k=0, top_p=1.0
            )
        seconds = time.perf_counter() - start
        answers = rows[:, PROMPT:]
        rates.append(int((answers != PAD).sum()) / seconds)
    record = {"benchmark": "rollout", "library": "transformers", "tokens_per_s": round(statistics.median(rates[1:]), 4)}
    record |= {"num_params": sum(p.numel() for p in model.parameters()), "transformers": transformers.__version__}
    record |= {"torch": torch.__version__, "cores": os.cpu_count(), "load1": round(os.getloadavg()[0], 2)}
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Make tests/fixtures/llama_tiny_*: two random Llama models written by transformers, with their logits.

Needs torch and transformers (the oracle environment): `python tests/golden/make_llama_tiny.py`.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).parent.parent / "fixtures"
SHAPE = dict(vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MODELS = {
    # Everything that a Llama config can switch on; head_dim is not hidden_size / num_attention_heads.
    "llama_tiny_full": (
        dict(num_key_value_heads=2, head_dim=8, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
        torch.float32,
        "1GB",
    ),
    # Tied, stored in bfloat16, in several files.
    "llama_tiny_tied": (dict(num_key_value_heads=1, tie_word_embeddings=True), torch.bfloat16, "20KB"),
}


def main() -> None:
    for name, (options, dtype, shard) in MODELS.items():
        torch.manual_seed(7)
        config = LlamaConfig(**SHAPE, **options, max_position_embeddings=128, initializer_range=0.3)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too: at 0 and 1 they would prove nothing
                parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter == 1).float())
        model = model.to(dtype)
        model.save_pretrained(FIXTURES / name, max_shard_size=shard)
        tokens = torch.randint(0, SHAPE["vocab_size"], (2, 40))
        # Loaded again, because `.to(bfloat16)` rounded the RoPE frequencies as well.
        model = LlamaForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32)
        with torch.no_grad():
            logits = model(tokens).logits
        np.savez_compressed(FIXTURES / name / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Make tests/fixtures/families: what transformers computes with the tiny random models of `families.py`.

Needs torch and transformers (the oracle environment): `python tests/golden/make_families.py [NAME ...]`.
Each folder gets config.json and keys.json as `save_pretrained` wrote them, and golden.npz: tokens [2, T], float32
logits [2, T, V], `rounding` (how far the same model in float64 is from that, over the spread), `checksum` of the
weights. Gradients for the cases in `GRADIENTS`.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))
from families import (
    CASES,
    DOCUMENTS,
    FIXTURES,
    GRADIENTS,
    GREEDY,
    NUM_TOKENS,
    checksum,
    pack_keys,
    projections,
    write_folder,
)  # fmt: skip


def describe(name: str) -> None:
    """config.json and keys.json."""
    case = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**case.options)
    model = getattr(transformers, case.model)(config).to(getattr(torch, case.dtype))
    shapes = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        (FIXTURES / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "config.json", FIXTURES / name)
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in pack_keys(shapes))
    (FIXTURES / name / "keys.json").write_text(f"[{rows}]\n")


def open_model(folder: str | Path, name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a folder, refused if a key is missing or left over."""
    loader = getattr(transformers, CASES[name].model)
    model, info = loader.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    wrong = {what: info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[what]}
    assert not wrong, wrong
    return model.eval()


def golden(name: str) -> dict[str, np.ndarray]:
    """Tokens and logits."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tensors = write_folder(Path(folder), name)
        model = open_model(folder, name)
        rng = np.random.default_rng(len(name))
        tokens = torch.from_numpy(rng.integers(3, model.config.vocab_size, (2, GREEDY)))
        while tokens.shape[1] < NUM_TOKENS:
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        logits = model(tokens, use_cache=False).logits
        spread = logits.std()
        rounding = (open_model(folder, name, torch.float64)(tokens, use_cache=False).logits - logits).abs().max()
        if CASES[name].prefix_stable:
            for row, length in enumerate(DOCUMENTS):
                alone = model(tokens[row : row + 1, :length], use_cache=False).logits[0]
                assert (alone - logits[row, :length]).abs().max() < 2e-5 * spread, "a document alone differs"
            assert (logits[:, GREEDY - 1 : -1].argmax(-1) == tokens[:, GREEDY:]).all()
    print(f"{name:22} spread {spread:6.2f}  float64 differs by {rounding / spread:.1e}", flush=True)
    assert rounding < 3e-5 * spread, "too ill-conditioned to compare"
    return dict(
        tokens=tokens.numpy().astype(np.int32), logits=logits.numpy(), rounding=(rounding / spread).numpy(),
        checksum=np.int64(checksum(tensors)),
    )  # fmt: skip


def gradients(name: str) -> dict[str, np.ndarray]:
    """Of the mean negative log-likelihood of the next token: what `projections` keeps of each tensor, and the loss."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), name)
        model = open_model(folder, name)
        model.get_input_embeddings().padding_idx = None  # torch would give the padding token's row no gradient
        tokens = torch.from_numpy(np.load(FIXTURES / name / "golden.npz")["tokens"]).long()
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.zero_()
            for parameter in model.parameters():
                parameter.copy_(parameter.grad)
        model.save_pretrained(Path(folder) / "gradients")  # as the file has them, not as the modules do
        found = projections(load_file(Path(folder) / "gradients/model.safetensors"))
        return {"loss": loss.detach().numpy(), "projections": np.stack([found[key] for key in sorted(found)])}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        describe(name)
        np.savez_compressed(FIXTURES / name / "golden.npz", **golden(name))
        if name in GRADIENTS:
            np.savez_compressed(FIXTURES / name / "gradients.npz", **gradients(name))


if __name__ == "__main__":
    main()

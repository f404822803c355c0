# SPDX-License-Identifier: Apache-2.0
"""Make tests/fixtures/config_effects.json: what transformers computes when one key of config.json is changed.

Needs torch and transformers (the oracle environment): `python tests/golden/make_config_effects.py [FAMILY ...]`. For
each change of `config_effects.py`: "tensors" where other tensors are asked for (a checksum of names and shapes), else
a few logits, their spread and how far they are from those before the change.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from golden.config_effects import (
    CASES,
    EFFECTS_FILE,
    KEPT_POSITIONS,
    KEPT_TOKENS,
    TOKENS,
    base,
    both_files,
    effects,
    label,
    tensors_checksum,
    without_effect,
)
from golden.families import CASES as MODELS
from golden.families import weight


def compute(case: str, raw: dict) -> tuple[dict[str, tuple[int, ...]], np.ndarray]:
    """(names and shapes of the tensors of the file, logits [T, V]) of a config.json with the weights of a case."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    kind = getattr(transformers, MODELS[case].model)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        with safe_open(file, framework="pt") as found:
            shapes = {key: tuple(found.get_slice(key).get_shape()) for key in sorted(found.keys())}
        save_file({key: weight(case, key, shape) for key, shape in shapes.items()}, file, metadata={"format": "pt"})
        model, info = kind.from_pretrained(
            folder, config=transformers.AutoConfig.for_model(**copy.deepcopy(raw)), attn_implementation="eager",
            experts_implementation="eager", dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        with torch.no_grad():
            return shapes, model.eval()(torch.tensor(TOKENS)).logits[0].numpy()


def check_without_effect(family: str, case: str) -> list[str]:
    """The family's own keys that are listed as without effect; an error if one has."""
    raw = base(family)
    default = transformers.AutoConfig.for_model(raw["model_type"]).to_dict()
    shapes, logits = compute(case, raw)
    for key, value in without_effect(family, default).items():
        found_shapes, found = compute(case, raw | {key: value})
        same = np.abs(found - logits).max() < 1e-5 * logits.std()  # one key changes the order of the same sums
        assert found_shapes == shapes and same, (family, key, value)
    return sorted(without_effect(family, default))


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made: dict[str, dict] = {}
    for family, case in CASES.items():
        if len(sys.argv) > 1 and family not in sys.argv[1:]:
            made[family] = json.loads(EFFECTS_FILE.read_text())[family]
            continue
        made[family] = {}
        made[family]["without effect"] = check_without_effect(family, case)
        known: dict[str, tuple] = {}
        for effect in effects(family):
            before, after = both_files(family, effect)
            print(family, effect.key, end=" ", flush=True)
            if (text := json.dumps(before, sort_keys=True)) not in known:
                known[text] = compute(case, before)
            (old_shapes, old), (shapes, new) = known[text], compute(case, after)
            if shapes != old_shapes:
                made[family][label(effect)] = {"tensors": tensors_checksum(shapes)}
                print("tensors")
                continue
            spread = float(new.std())
            kept = new[list(KEPT_POSITIONS), :KEPT_TOKENS]
            made[family][label(effect)] = {
                "logits": np.round(kept, 6).tolist(),
                "spread": spread,
                "moved": float(np.abs(new - old).max() / spread),
            }
            print(f"{made[family][label(effect)]['moved']:.3g}", flush=True)
    EFFECTS_FILE.write_text(json.dumps(made, indent=0) + "\n")


if __name__ == "__main__":
    main()

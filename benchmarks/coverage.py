# SPDX-License-Identifier: Apache-2.0
"""Which models load: write the tables of docs/families.md.

    python benchmarks/coverage.py maxtext-0.2.5-py3-none-any.whl

Needs the environment of the oracle, for the list of models that transformers knows, and MaxText's wheel, of which only
the table of hub ids is read. A model counts as loading when its architecture is read from config.json; that it computes
the same is what `tests/golden` shows, family by family.
"""

import ast
import json
import math
import sys
import zipfile
from pathlib import Path

from maxkit.formats.hf_config.reader import FAMILIES, MODEL_TYPES, read_config_dict
from maxkit.formats.presets import NOT_SUPPORTED, PRESETS, preset_config
from maxkit.formats.tables import find_table
from maxkit.models.config import ModelConfig

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
# Fields that are sizes, not kinds of computation.
_SIZES = {"family", "vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim"}
_SIZES |= {"max_seq_len", "norm_eps", "rope_theta", "leading_blocks", "pattern", "tie_embeddings", "embedding_scale"}
# What a configuration class has no (possible) default for.
_ASKED = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2},
    "glm4_moe": {"head_dim": 128},
}


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def default_config(name: str) -> ModelConfig:
    return read_config_dict({"architectures": [FAMILIES[name].architecture], **_ASKED.get(name, {})}, name)


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def beyond_llama(config: ModelConfig) -> str:
    """The fields that a Llama does not need, as the class's defaults set them."""
    found = []
    for name, value in config:
        default = ModelConfig.model_fields[name].default
        if name in _SIZES or value == default:
            continue
        nested = name in ("moe", "mla", "gated_delta", "rope_scaling", "attention_temperature")
        found.append(name if nested else f"{name}={_value(value)}")
    blocks = set(config.blocks)
    found += ["sliding windows"] * any(block.sliding_window for block in blocks)
    found += ["chunks"] * any(block.chunk_size for block in blocks)
    found += ["layers without RoPE"] * any(not block.rope for block in blocks)
    found += ["embedding_scale"] * (config.embedding_scale is not None)
    return ", ".join(found) or "-"


def family_table() -> str:
    rows = []
    for name, family in FAMILIES.items():
        config = default_config(name)
        groups = " + ".join(f"{len(g.pattern)} x {g.repeats}" for g in config.layer_groups())
        rows.append([f"`{name}`", f"`{family.architecture}`", beyond_llama(config), groups])
    return table(["family", "class in transformers", "beyond Llama, by default", "layer groups of the default"], rows)


def count_parameters(config: ModelConfig) -> int:
    return sum(math.prod(place.canonical_shape) for place in find_table(config, "hf").entries.values())


def preset_table() -> str:
    rows = []
    for name, preset in PRESETS.items():
        published = preset.published + (f", with {preset.besides}" if preset.besides else "")
        count = f"{count_parameters(preset_config(name)):,}"
        rows.append([f"`{name}`", f"`{preset.family}`", count, published, preset.source])
    return table(["preset", "family", "parameters", "published", "dimensions from"], rows)


def maxtext_hub_ids(wheel: str) -> dict[str, str]:
    """MaxText's table from model name to hub id, without its entry that is a local path."""
    source = zipfile.ZipFile(wheel).read("maxtext/utils/globals.py").decode()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "HF_IDS":
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {key.value: value.value for key, value in pairs if isinstance(value, ast.Constant)}
    raise SystemExit(f"{wheel}: no HF_IDS in maxtext/utils/globals.py")


def maxtext_part(wheel: str) -> str:
    ids = maxtext_hub_ids(wheel)
    presets = {hub_id: name for name, preset in PRESETS.items() for hub_id in preset.hub_ids}
    distinct = list(dict.fromkeys(ids.values()))
    rows = [[f"`{hub_id}`", f"`{presets[hub_id]}`" if hub_id in presets else f"no: {NOT_SUPPORTED[hub_id]}"]
            for hub_id in distinct]  # fmt: skip
    loading = sum(hub_id in presets for hub_id in distinct)
    return (
        f"MaxText 0.2.5 maps {len(ids)} model names to {len(distinct)} hub ids (`utils/globals.py`). "
        f"**{loading} of {len(distinct)}** ({loading / len(distinct):.0%}) load.\n\n"
        + table(["hub id", "preset"], rows)
    )


def transformers_part() -> str:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    loading = names.keys() & MODEL_TYPES.keys()
    others = ", ".join(sorted(names.keys() - loading))
    return (
        f"`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` of transformers {transformers.__version__} lists {len(names)} model "
        f"types. It holds everything with a language head: encoders such as BERT, recurrent and multimodal models too. "
        f"**{len(loading)} of {len(names)}** ({len(loading) / len(names):.0%}) load: "
        f"{', '.join(sorted(loading))}.\n\nThe others are refused by name: {others}."
    )


def main() -> None:
    parts = [
        "# Families and presets",
        "<!-- Written by benchmarks/coverage.py; do not edit. -->",
        f"One decoder computes every family; a family is a reading of config.json ({len(FAMILIES)} of them, "
        "`formats/hf_config/`)\n"
        "and a table of tensor names (`formats/tables.py`). `maxkit inspect DIR` shows which one "
        "a folder is, and\n`maxkit inspect PRESET` what a published size is made of.",
        family_table(),
        "Every key of a family's config.json is in one of three lists beside its reader: it changes the maths, it has "
        "no effect on the\nforward pass (with the reason), or it is refused unless at a given value. An unlisted key "
        "is refused. The tests change every\nkey of the first list in transformers and in maxkit and compare.",
        "## Presets",
        "An architecture by name, without weights: `maxkit run pretrain -p model=smollm2-135m` trains it from scratch. "
        "The number\nof parameters is counted from the shapes; a test compares it with the published one.",
        preset_table(),
        "## How many models load",
        transformers_part(),
        maxtext_part(sys.argv[1]),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(json.dumps({"families": len(FAMILIES), "presets": len(PRESETS)}))


if __name__ == "__main__":
    main()

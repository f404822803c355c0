# SPDX-License-Identifier: Apache-2.0
"""`maxkit.save`: the weights of a model in memory as a checkpoint. Training saves its state with `store.py` instead.

It is a conversion whose source is in memory (`convert.py`), with the same guarantees: nothing is overwritten, and a
folder of that name exists only when it is whole and was read back.
"""

from pathlib import Path
from typing import Any

import jax

from maxkit.checkpoint.contents import TreeContents
from maxkit.checkpoint.conversion_plan import make_plan
from maxkit.checkpoint.convert import Conversion, write
from maxkit.checkpoint.load import Loaded
from maxkit.checkpoint.merge import Merged
from maxkit.errors import UserError
from maxkit.models.decoder import Decoder
from maxkit.models.definition import ModelDefinition
from maxkit.types import Tree

Model = Loaded | Decoder | tuple[ModelDefinition, Tree]


def save(
    loaded_or_model: Model,
    path: str | Path,
    *,
    format: str = "maxkit",
    scan_layers: bool | None = None,
    dtype: str | None = None,
    merge_lora: bool | None = None,
) -> Conversion:
    """Write weights, architecture and tokenizer to the new folder `path`.

    Args:
        loaded_or_model: what `maxkit.load` gave (with its tokenizer), an NNX model, or (definition, params).
        format: "maxkit"; "hf": a folder that transformers loads; "peft": the adapters alone, as peft loads them;
            "maxtext-linen" or "maxtext-nnx": what MaxText loads.
        scan_layers: the layout to write; None keeps the model's. A format without layouts takes no other.
        dtype: cast the weights to "float32", "bfloat16" or "float16".
        merge_lora: add adapters to the weights beside them; None does where the format has no adapters.

    Raises:
        UserError: the folder exists, the format cannot hold the model, the disk is full; nothing is left then that
            looks like a checkpoint.
    """
    contents = contents_of(loaded_or_model)
    if merge_lora and contents.lora is not None:
        contents = Merged(contents)
    elif merge_lora is False and contents.lora is not None and format not in ("maxkit", "peft"):
        raise UserError(
            f"merge_lora=False: a checkpoint of format {format!r} has no adapters; 'maxkit' and 'peft' keep them apart"
        )
    plan = make_plan(contents, format, "memory", scan_layers=scan_layers, origin="keyword", dtype=dtype)
    return write(contents, plan, path)


def contents_of(loaded_or_model: Model) -> Any:
    """The weights of a model in memory as `Contents`.

    Raises:
        UserError: not a model of maxkit, or one that this process holds only a part of.
    """
    tokenizer = source = None
    if isinstance(loaded_or_model, Loaded):
        definition, params = loaded_or_model.definition, loaded_or_model.params
        tokenizer, source = loaded_or_model.tokenizer, loaded_or_model.source
        config, scan_layers, lora = definition.config, definition.execution.scan_layers, definition.lora
    elif isinstance(loaded_or_model, Decoder):
        params = ModelDefinition.values(loaded_or_model)
        config, scan_layers = loaded_or_model.config, loaded_or_model.execution.scan_layers
        lora = loaded_or_model.lora
    elif isinstance(loaded_or_model, tuple) and isinstance(loaded_or_model[0], ModelDefinition):
        definition, params = loaded_or_model
        config, scan_layers, lora = definition.config, definition.execution.scan_layers, definition.lora
    else:
        kind = type(loaded_or_model).__name__
        raise UserError(f"maxkit.save takes what maxkit.load gave, a model, or (definition, params), not a {kind}")
    leaves = ModelDefinition.flat(params)
    elsewhere = [path for path, x in leaves.items() if isinstance(x, jax.Array) and not x.is_fully_addressable]
    if elsewhere:
        raise UserError(
            f"maxkit.save writes from one process, which holds only a part of {elsewhere[0]} and {len(elsewhere) - 1} "
            "more: save with the run's checkpoints, then convert one of them"
        )
    return TreeContents(config, leaves, scan_layers=scan_layers, lora=lora, tokenizer=tokenizer, source=source)

# SPDX-License-Identifier: Apache-2.0
"""What a key of config.json may hold, what it feeds, and the keys that every file has.

A family lists each of its keys once: `Key` (changes the maths), a reason (no effect on the forward pass) or `Only`
(supported at some values). A key in none of the lists is refused: nobody knows what it would have meant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maxkit.errors import nearest

MAX_COUNT = 2**31 - 1
MAX_LAYERS = 1024
MAX_EXPERTS = 100_000  # in all layers together; published models have up to 61 x 384
MAX_NUMBER = 1e12

Kind = Callable[[Any], Any]


def count(value: Any) -> int:
    """A positive size."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_COUNT:
        raise ValueError(f"must be a positive int up to {MAX_COUNT}")
    return value


def layer_count(value: Any) -> int:
    """How many layers: every layer becomes an entry, so that a wrong file must not ask for billions."""
    if count(value) > MAX_LAYERS:
        raise ValueError(f"must be a positive int up to {MAX_LAYERS}")
    return value


def whole(value: Any) -> int:
    """A size that may be 0."""
    return 0 if value == 0 and isinstance(value, int) and not isinstance(value, bool) else count(value)


def number(value: Any) -> float:
    """A positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_NUMBER:
        raise ValueError(f"must be a positive number up to {MAX_NUMBER:g}")
    return float(value)


def flag(value: Any) -> bool:
    """True or false; 0 and 1 are not."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def text(value: Any) -> str:
    """A word."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A list of words."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of strings")
    return tuple(value)


def indices(value: Any) -> tuple[int, ...]:
    """A list of layer numbers or of zeros and ones."""
    whole_numbers = isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < MAX_LAYERS for item in value
    )
    if not whole_numbers:
        raise ValueError(f"must be a list of ints from 0 to {MAX_LAYERS - 1}")
    return tuple(value)


def table(value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


# transformers' ACT2FN, as far as the functions are equal to ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def activation(value: Any) -> str:
    """An activation by the name that transformers gives it."""
    if text(value) not in ACTIVATIONS:
        raise ValueError(f"is not supported: {nearest(value[:60], ACTIVATIONS)}")
    return ACTIVATIONS[value]


def gemma_activation(value: Any) -> str:
    """As `activation`; the first Gemma files say gelu and mean its tanh form, as the class knows."""
    found = activation(value)
    return "gelu_tanh" if found == "gelu" else found


def write_activation(name: str) -> str:
    """Our name of an activation in transformers' spelling."""
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else name


REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """A key that changes the maths.

    feeds: the field of `ModelConfig` that it is (`direct`), or the fields that are computed from it.
    default: what transformers takes where the key is absent. nullable: whether null is a value of its own (None).
    """

    feeds: str
    kind: Kind
    default: Any = None
    nullable: bool = False
    direct: bool = True


@dataclass(frozen=True)
class Only:
    """A key that would change the maths and is supported at these values only."""

    values: tuple[Any, ...]
    why: str

    def allows(self, value: Any) -> bool:
        """Whether `value` is one of them; true is not 1 here."""
        return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.values)


def finite(value: Any) -> bool:
    """Whether a number is neither NaN nor infinite."""
    return math.isfinite(value)


_DESCRIPTION = "describes the file, not the model"
_IDS = "a token id: says what a token is for, not what is computed from it"
_TRAINING = "only training uses it"
_OUTPUTS = "chooses which intermediate results are returned"
_GENERATION = "how tokens are chosen from the logits"
_CLASSIFIER = "labels and dropout of classification heads, which a causal language model lacks"

# Keys that every configuration class of transformers 4 or 5 writes or takes.
NO_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        "architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path tokenizer_class "
        "_commit_hash task_specific_params finetuning_task prefix unsloth_fixed unsloth_version auto_map".split(),
        _DESCRIPTION,
    ),
    **dict.fromkeys(
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id "
        "forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens".split(),
        _IDS,
    ),
    **dict.fromkeys(
        "initializer_range attention_dropout hidden_dropout dropout embd_pdrop resid_pdrop attn_pdrop "
        "pretraining_tp gradient_checkpointing use_bfloat16".split(),
        _TRAINING,
    ),
    **dict.fromkeys(
        "output_attentions output_hidden_states return_dict return_dict_in_generate output_scores "
        "tie_last_hidden_states".split(),
        _OUTPUTS,
    ),
    **dict.fromkeys(
        "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
        "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "num_return_sequences remove_invalid_values exponential_decay_length_penalty cache_implementation".split(),
        _GENERATION,
    ),
    **dict.fromkeys(
        "id2label label2id num_labels problem_type classifier_dropout classifier_activation".split(), _CLASSIFIER
    ),
    **dict.fromkeys("use_cache torchscript tf_legacy_loss is_decoder chunk_size_feed_forward".split(), _OUTPUTS),
    **dict.fromkeys(
        "_attn_implementation attn_implementation _attn_implementation_autoset _experts_implementation".split(),
        "which kernel computes the same function",
    ),
    "cross_attention_hidden_size": "of cross-attention, which a causal language model lacks",
    "tie_encoder_decoder": "of encoder-decoder models",
}
REFUSED: dict[str, Only] = {
    "quantization_config": Only((None,), "weights in this form are not decoded"),
    "compression_config": Only((None,), "weights in this form are not decoded"),
    "per_layer_config": Only((None, {}), "layers with settings of their own"),
    "pruned_heads": Only((None, {}), "heads would be missing"),
    "is_encoder_decoder": Only((None, False), "only decoders are built"),
    "add_cross_attention": Only((None, False), "only decoders are built"),
}

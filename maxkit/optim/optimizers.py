# SPDX-License-Identifier: Apache-2.0
"""From a config to an `optax.GradientTransformation` on pure trees.

Whatever the weights' dtype, gradients, moments and the update are float32; under an Explicit mesh the moments
have the weights' sharding. The state depends on the optimizer alone: clipping, decay and the shape of the
schedule add nothing to it, so that a run can be continued with others. Next to read: `adam_pax.py`.
"""

import jax
import jax.numpy as jnp
import optax

from maxkit.errors import UserError
from maxkit.optim.adam_pax import adam_pax
from maxkit.optim.config import OptimizerConfig
from maxkit.optim.schedules import make_schedule
from maxkit.types import Tree

WEIGHT_LETTERS = frozenset("DFNKHVERQZLSW")  # of the alphabet in types.py, those a parameter can have
MATRICES = ("kernel", "table", "lora_a", "lora_b")
VECTORS = ("scale", "bias", "sinks", "correction", "dt_bias", "log_decay")


def make_optimizer(
    cfg: OptimizerConfig, total_steps: int, letters: Tree, *, inject: bool = False
) -> optax.GradientTransformation:
    """Clipping, then the optimizer of `cfg` with its schedule over `total_steps`; updates are to be added.

    letters: a tree parallel to the parameters, of their dimension letters ("LDNH", "D", ...); it decides what
        is decayed.
    inject: keep the schedule's highest rate in the state, where `set_learning_rate` changes it without
        compiling again.

    Raises:
        UserError: a parameter has no known role, or the letters do not describe the parameters.
    """
    mask = decay_mask(letters)

    def build(learning_rate: float | jax.Array) -> optax.GradientTransformation:
        return _rule(cfg, make_schedule(cfg, total_steps, learning_rate), mask)

    if inject:
        rule = optax.inject_hyperparams(build, hyperparam_dtype=jnp.float32)(learning_rate=cfg.learning_rate)
    else:
        rule = build(cfg.learning_rate)
    return _in_float32(rule, cfg.gradient_clipping_threshold, letters)


def decay_mask(letters: Tree) -> Tree:
    """A tree of booleans: which parameters weight decay applies to, by role.

    A matrix (kernel, embedding table, LoRA factor) with two or more dimensions besides L is decayed; norm
    scales and biases never are, though a query bias "NH" has two dimensions.

    Raises:
        UserError: the last part of a path, or a letter, is unknown.
    """
    return jax.tree.map_with_path(_is_decayed, letters)


def set_learning_rate(opt_state: optax.OptState, learning_rate: float) -> optax.OptState:
    """The state with another highest learning rate; the schedule's shape still multiplies it.

    Raises:
        UserError: the optimizer was not made with `inject=True`.
    """
    old = read_learning_rate(opt_state)
    new = jax.device_put(jnp.asarray(learning_rate, old.dtype), old.sharding)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": new})


def read_learning_rate(opt_state: optax.OptState) -> jax.Array:
    """The highest learning rate in the state of an optimizer made with `inject=True`.

    Raises:
        UserError: the optimizer was not made so.
    """
    if not isinstance(opt_state, optax.InjectStatefulHyperparamsState):
        raise UserError("the learning rate is not in this state: make the optimizer with inject=True")
    return opt_state.hyperparams["learning_rate"]


def _rule(cfg: OptimizerConfig, schedule: optax.Schedule, mask: Tree) -> optax.GradientTransformation:
    """The optimizer alone. State as in MaxText: a chain for adamw, flat for adam_pax; sgd only counts."""
    if cfg.optimizer == "adam_pax":
        return adam_pax(schedule, cfg.adam_b1, cfg.adam_b2, cfg.adam_eps, cfg.weight_decay, mask)
    rest = (_add_decayed_weights(cfg.weight_decay, mask), optax.scale_by_learning_rate(schedule))
    if cfg.optimizer == "sgd":
        return optax.chain(*rest)
    return optax.chain(optax.scale_by_adam(cfg.adam_b1, cfg.adam_b2, cfg.adam_eps), *rest)


def _in_float32(rule: optax.GradientTransformation, threshold: float, letters: Tree) -> optax.GradientTransformation:
    """`rule` on float32 copies of gradients and weights, the gradients clipped to the norm `threshold` first.

    The updates stay float32: `optax.apply_updates` adds them before it rounds to the weights' dtype.
    """

    def float32(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Tree) -> optax.OptState:
        return rule.init(float32(params))

    def update(gradients: Tree, state: optax.OptState, params: Tree | None = None) -> tuple[Tree, optax.OptState]:
        if params is None:
            raise ValueError("this optimizer needs the parameters: weight decay is part of it")
        _check_letters(letters, params)
        gradients = float32(gradients)
        if threshold:
            gradients, _ = optax.clip_by_global_norm(threshold).update(gradients, optax.EmptyState())
        return rule.update(gradients, state, float32(params))

    return optax.GradientTransformation(init, update)


def _add_decayed_weights(weight_decay: float, mask: Tree) -> optax.GradientTransformation:
    """As `optax.add_decayed_weights(mask=...)`, without a wrapper in the state that depends on the mask."""

    def add(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda u, p, d: u + weight_decay * p if d else u, updates, params, mask)

    return optax.stateless(add)


def _is_decayed(path: tuple, letters: str) -> bool:
    name = _name(path)
    unknown = sorted(set(letters) - WEIGHT_LETTERS)
    if unknown:
        raise UserError(f"parameter {name}: unknown dimension letters {unknown} in {letters!r}")
    kind = name.rpartition("/")[2]
    if kind in VECTORS:
        return False
    if kind in MATRICES:
        return len(letters.replace("L", "")) >= 2
    allowed = ", ".join(MATRICES + VECTORS)
    raise UserError(f"parameter {name}: weight decay knows no role for {kind!r}; allowed: {allowed}")


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_letters(letters: Tree, params: Tree) -> None:
    described, present = (
        {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (letters, params)
    )
    if described.keys() != present.keys():
        differing = sorted(described.keys() ^ present.keys())
        raise UserError(f"letters and parameters differ: {differing[0]!r} is in only one of the two trees")
    for name, array in present.items():
        if len(described[name]) != array.ndim:
            raise UserError(f"parameter {name}: letters {described[name]!r}, but its shape is {array.shape}")

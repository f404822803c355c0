# SPDX-License-Identifier: Apache-2.0
"""Parameters and the small layers made of them: projection, norm, embedding, MLP.

A parameter is declared once, with shape, letters and initialiser; sharding, checkpoint address and optimizer role are
derived from that. Next to read: `attention.py`, `decoder.py`.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from maxkit import mesh
from maxkit.models import quantized
from maxkit.models.config import ModelConfig
from maxkit.models.lora import LoraConfig

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


@dataclasses.dataclass(frozen=True)
class Make:
    """Makes the parameters below `path`, for one layer, for a stack of layers (axis 0), or for none.

    The key of a value is folded from the canonical path (no block or layer number in it) and the layer number: one seed
    gives equal weights scanned and unrolled, and adding a parameter changes no other.
    """

    key: jax.Array
    dtype: jnp.dtype
    lora: LoraConfig | None = None
    path: str = ""
    layers: tuple[int, ...] | None = None
    stacked: bool = False

    def at(self, name: str) -> "Make":
        """One level further down."""
        return dataclasses.replace(self, path=f"{self.path}/{name}" if self.path else name)

    def for_layers(self, layers: tuple[int, ...], stacked: bool) -> "Make":
        """For the layers with these numbers in the whole model."""
        return dataclasses.replace(self, layers=layers, stacked=stacked)

    def __call__(
        self, name: str, shape: tuple[int, ...], letters: str, initializer: Initializer, kind: type = nnx.Param
    ) -> nnx.Param:
        """A parameter [*shape], or [L, *shape] in a stack, whose letters begin with L; they are kept as metadata."""
        key = jax.random.fold_in(self.key, zlib.crc32(f"{self.path}/{name}".encode()))
        if self.layers is None:
            return kind(initializer(key, shape, self.dtype), letters=letters)
        if not self.stacked:
            return kind(initializer(jax.random.fold_in(key, self.layers[0]), shape, self.dtype), letters=letters)
        draw = jax.vmap(lambda layer: initializer(jax.random.fold_in(key, layer), shape, self.dtype))
        return kind(draw(jnp.asarray(self.layers, jnp.uint32)), letters="L" + letters)


def normal(std: float) -> Initializer:
    """Normal with mean 0."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """All 0."""
    return jnp.zeros(shape, dtype)


def constant(value: float) -> Initializer:
    """All the same."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


class RowKeys(nnx.Variable):
    """PRNG keys of dropout, one for each row of the batch: [B], or [L, B] in a stack (`ModelDefinition.merge`)."""


class Matrix(nnx.Module):
    """A kernel whose inputs are contracted, with its bias and its low-rank adapter beside it.

    The adapter (Hu et al. 2021, arXiv 2106.09685) is lora_a [inputs, R], random, and lora_b [R, outputs], zero; what
    the kernel has one of for each expert (E), they have as well.
    """

    def __init__(self, letters: str, produced: str, sizes: dict[str, int], make: Make, *, bias: bool, scale: float):
        """`produced`: those of the kernel's letters that its product keeps; `scale` of the usual initial deviation."""
        shared = "".join(letter for letter in letters if letter == "E")
        self.path, self.letters, outputs = (
            make.path,
            letters,
            "".join(x for x in letters if x in produced and x not in shared),
        )
        inputs = "".join(x for x in letters if x not in shared + outputs)
        fan_in = math.prod(sizes[letter] for letter in inputs)
        self.kernel: nnx.Param | None = make("kernel", _shape(letters, sizes), letters, normal(scale * fan_in**-0.5))
        self.storage = make.lora.base_weight_dtype if make.lora is not None else ""
        if self.storage:
            self._store_small()
        self.bias = make("bias", _shape(shared + outputs, sizes), shared + outputs, zeros) if bias else None
        self.adapted = make.lora is not None and make.lora.covers(make.path)
        self.row_keys: RowKeys | None = None  # of dropout; None: there is none
        if make.lora is not None and self.adapted:
            self.down, self.up = f"{shared}{inputs}R", f"{shared}R{outputs}"
            self.lora_scale, self.dropout, sizes = make.lora.scale, make.lora.dropout, sizes | {"R": make.lora.rank}
            self.lora_a = make("lora_a", _shape(self.down, sizes), self.down, normal(fan_in**-0.5), nnx.LoRAParam)
            self.lora_b = make("lora_b", _shape(self.up, sizes), self.up, zeros, nnx.LoRAParam)

    def _store_small(self) -> None:
        """Replace the kernel by what `quantized` stores of it."""
        axis, kernel = quantized.tiled_axis(self.letters), self.kernel
        assert kernel is not None
        quantized.check(kernel.shape[axis], self.storage, self.path)
        values, scales = quantized.quantize(kernel[...], self.storage, axis, jnp)
        letters = kernel.get_metadata()["letters"]
        self.kernel_q, self.kernel_scale = nnx.Param(values, letters=letters), nnx.Param(scales, letters=letters)
        self.kernel = None

    def whole(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel as it multiplies, without its adapter. Small weights are gathered before they are widened."""
        if self.kernel is not None:
            return self.kernel[...].astype(dtype)
        values, scales = (mesh.constrain(p[...], self.letters) for p in (self.kernel_q, self.kernel_scale))

        def look_up(codes: jax.Array) -> jax.Array:
            return mesh.gather_rows(jnp.asarray(quantized.CODES), codes, self.letters, "R")

        axis = quantized.tiled_axis(self.letters)
        return quantized.dequantize(values, scales, self.storage, axis, jnp, look_up).astype(dtype)

    def matrix(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel with its adapter added, for products that are taken in another way; without dropout."""
        kernel = self.whole(dtype)
        if not self.adapted:
            return kernel
        assert self.row_keys is None, "a kernel is no place for dropout, which differs from token to token"
        low, high = self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)
        product = mesh.einsum(f"{self.down},{self.up}->{self.letters}", low, high, like=mesh.layout(kernel))
        return kernel + self.lora_scale * product


class Projection(Matrix):
    """A matrix product written as an einsum, with optional bias; adapted, x A B (alpha / rank) is added to it.

    `subscripts` such as "BTD,DNH->BTNH"; weights are cast to the type of the input, products of bfloat16 accumulate in
    float32.
    """

    def __init__(self, subscripts: str, sizes: dict[str, int], make: Make, *, bias: bool = False, scale: float = 1.0):
        """`sizes` gives every letter's size; `scale` multiplies the initial standard deviation fan_in ** -0.5."""
        inputs, self.outputs = subscripts.split("->")
        self.inputs, letters = inputs.split(",")
        super().__init__(letters, self.outputs, sizes, make, bias=bias, scale=scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product over the contracted letters, plus bias and adapter."""
        y = self._product(x) if self.kernel is not None else widened_again(self, Projection._product, x)
        if self.bias is not None:
            y = y + mesh.replicate(self.bias[...].astype(x.dtype))
        if self.adapted:
            dropped = x if self.row_keys is None else self._drop(x, self.row_keys[...])
            low = mesh.einsum(f"{self.inputs},{self.down}->BTR", dropped, self.lora_a[...].astype(x.dtype))
            high = mesh.einsum(f"BTR,{self.up}->{self.outputs}", low, self.lora_b[...].astype(x.dtype))
            y = y + self.lora_scale * high
        return y

    def _product(self, x: jax.Array) -> jax.Array:
        return mesh.einsum(f"{self.inputs},{self.letters}->{self.outputs}", x, self.whole(x.dtype))

    def _drop(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """Set a fraction `dropout` of x [B, ...] to 0 and divide the rest by 1 - `dropout`, each row by its key."""
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, x.shape[1:]))(mesh.constrain(keys, "B"))
        return jnp.where(mesh.constrain(keep, self.inputs), x / (1 - self.dropout), 0).astype(x.dtype)


def widened_again(module: nnx.Module, method: Callable[..., jax.Array], *arguments: jax.Array) -> jax.Array:
    """method(module, *arguments), whose wide weights are made again in the backward pass instead of being kept."""
    graphdef, state = nnx.split(module)
    return jax.checkpoint(lambda state, *given: method(nnx.merge(graphdef, state), *given))(state, *arguments)


def _shape(letters: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[letter] for letter in letters)


class Norm(nnx.Module):
    """A learned normalisation of the last dimensions, in float32: by root mean square, or by mean and variance.

    rms:   x / sqrt(mean(x^2) + eps) * (offset + scale)      (Zhang and Sennrich 2019, arXiv 1910.07467)
    layer: (x - mean(x)) / sqrt(var(x) + eps) * (offset + scale) + bias    (Ba et al. 2016, arXiv 1607.06450)
    """

    def __init__(
        self, config: ModelConfig, sizes: tuple[int, ...], letters: str, make: Make, *, eps: float | None = None
    ):
        """Over the dimensions written with `letters`, of these `sizes`; `eps` where it is not the model's."""
        self.offset, self.kind = config.norm_scale_offset, config.norm
        self.eps = config.norm_eps if eps is None else eps
        # Drawn so that the effective scale is 1.
        self.scale = make("scale", sizes, letters, constant(1.0 - self.offset))
        self.bias = make("bias", sizes, letters, zeros) if config.norm_bias else None
        self.axes = tuple(range(-len(sizes), 0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last dimensions of x."""
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=self.axes, keepdims=True)
        wide = unit_rms(wide, self.eps, self.axes)
        wide = wide * (mesh.replicate(self.scale[...]).astype(jnp.float32) + self.offset)
        if self.bias is not None:
            wide = wide + mesh.replicate(self.bias[...]).astype(jnp.float32)
        return wide.astype(x.dtype)


def unit_rms(x: jax.Array, eps: float, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps) over `axes`, in float32, returned in the type of x."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table [V, D] read by token id."""

    def __init__(self, vocab_size: int, dim: int, make: Make):
        self.table = make("table", (vocab_size, dim), "VD", normal(0.02))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows [B, T, D] of the tokens [B, T], in `dtype`."""
        return mesh.gather_rows(self.table[...], tokens, "BTD").astype(dtype)


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), or down(activation(up(x))) without a gate."""

    def __init__(self, config: ModelConfig, make: Make, width: int | None = None):
        """`width` of the hidden layer, config.mlp_dim by default."""
        sizes = {"D": config.embed_dim, "F": width or config.mlp_dim}
        self.config, bias = config, config.mlp_bias
        self.gate = Projection("BTD,DF->BTF", sizes, make.at("gate"), bias=bias) if config.mlp_gated else None
        self.up = Projection("BTD,DF->BTF", sizes, make.at("up"), bias=bias)
        scale = (2 * config.num_layers) ** -0.5  # residual branches start small (GPT-2)
        self.down = Projection("BTF,FD->BTD", sizes, make.at("down"), bias=bias, scale=scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]."""
        return self.down(gated(self.config, self.gate(x) if self.gate is not None else None, self.up(x)))


def gated(config: ModelConfig, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """The hidden layer of an MLP or expert from its two projections; `gate` is None in an MLP without one."""
    if gate is None:
        return ACTIVATION[config.activation](up)
    if config.activation == "clamped_swiglu":  # gpt-oss: a steeper sigmoid, and 1 is added to what is gated
        limit = config.activation_limit or jnp.inf
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
    return ACTIVATION[config.activation](gate) * up


ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

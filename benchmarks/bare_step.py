# SPDX-License-Identifier: Apache-2.0
"""The training step of the benchmark shape, written by hand in plain JAX: the thing maxkit must not be slower than.

Same maths (RMS norm, RoPE, GQA, gated MLP, untied head, mean cross entropy, AdamW with clipping), no library of ours:
one function, logits of all tokens at once, layers unrolled or scanned.
"""

import jax
import jax.numpy as jnp
import optax


def init(shape: dict, seed: int = 0) -> dict:
    """Weights as a dict; the layers' are stacked on axis 0."""
    D, F, N, K, H, V, L = (shape[k] for k in ("embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "layers"))
    keys = iter(jax.random.split(jax.random.key(seed), 9))

    def draw(*dims, fan_in):
        return jax.random.normal(next(keys), dims) * fan_in**-0.5

    return {
        "embed": draw(V, D, fan_in=2500),
        "head": draw(D, V, fan_in=D),
        "norm": jnp.ones(D),
        "layers": {
            "q": draw(L, D, N * H, fan_in=D),
            "k": draw(L, D, K * H, fan_in=D),
            "v": draw(L, D, K * H, fan_in=D),
            "o": draw(L, N * H, D, fan_in=N * H),
            "gate": draw(L, D, F, fan_in=D),
            "up": draw(L, D, F, fan_in=D),
            "down": draw(L, F, D, fan_in=F),
            "norm1": jnp.ones((L, D)),
            "norm2": jnp.ones((L, D)),
        },
    }


def make_step(shape: dict, optimizer: optax.GradientTransformation, scan: bool):
    """A jitted, donating (params, opt_state, tokens, targets) -> (params, opt_state, loss)."""
    N, K, H, L, T = shape["heads"], shape["kv_heads"], shape["head_dim"], shape["layers"], shape["seq"]
    angles = jnp.arange(T)[:, None] / 10000.0 ** (jnp.arange(0, H, 2) / H)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    causal = jnp.tril(jnp.ones((T, T), bool))

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def rope(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def layer(x, w):
        B = x.shape[0]
        h = norm(x, w["norm1"])
        q = rope((h @ w["q"]).reshape(B, T, N, H)).reshape(B, T, K, N // K, H)
        k, v = rope((h @ w["k"]).reshape(B, T, K, H)), (h @ w["v"]).reshape(B, T, K, H)
        p = jnp.einsum("btkgh,bskh->bkgts", q, k) * H**-0.5
        p = jax.nn.softmax(jnp.where(causal, p, -1e30), -1)
        x = x + jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(B, T, N * H) @ w["o"]
        h = norm(x, w["norm2"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    def loss_of(params, tokens, targets):
        x = params["embed"][tokens]
        if scan:
            x, _ = jax.lax.scan(layer, x, params["layers"])
        else:
            for i in range(L):
                x, _ = layer(x, jax.tree.map(lambda w: w[i], params["layers"]))  # noqa: B023
        logits = norm(x, params["norm"]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(params, opt_state, tokens, targets):
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens, targets)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))

# SPDX-License-Identifier: Apache-2.0
"""The setup cell that every notebook holds word for word: it runs before maxkit can be imported.

Where maxkit is missing, `MAXKIT__INSTALL_FROM` says where it is: anything that pip takes, such as
`maxkit[notebooks] @ git+https://github.com/OWNER/maxkit`, or the path of a checkout with `[notebooks]` behind it. There
is no default: the `maxkit` of the package index is a project of other people. docs/colab.md tells users.

What the kernel has imported is frozen too, not only JAX and numpy: a package that is replaced while it is in use is
half old and half new until the kernel restarts.
"""

SETUP_CELL = """\
# Setup: import maxkit, or install it where it is missing (Colab, Kaggle). Nothing that is in use is replaced.
try:
    import maxkit
except ModuleNotFoundError:
    import os, subprocess, sys, tempfile  # noqa: E401
    from importlib import metadata

    source = os.environ.get("MAXKIT__INSTALL_FROM")
    if not source:
        raise RuntimeError("say where maxkit is: %env MAXKIT__INSTALL_FROM=... (docs/colab.md)") from None
    loaded = {name for name, module in sys.modules.items() if getattr(module, "__file__", None)}
    used = {dist for name, dists in metadata.packages_distributions().items() if name in loaded for dist in dists}
    used |= {"jax", "jaxlib", "libtpu", "numpy"}
    installed = {d.name: d.version for d in [*metadata.distributions()][::-1]}  # the first on the path counts
    frozen = [f"{name}=={installed[name]}" for name in sorted(used & installed.keys())]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        print(*frozen, sep="\\n", file=constraints, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--constraint", constraints.name, source]
        done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        print(*done.stdout.splitlines()[-12:], done.stderr, sep="\\n")
        raise RuntimeError("nothing was installed: pip says above what does not fit (docs/colab.md)") from None
    del os, subprocess, sys, tempfile, metadata, source, loaded, used, installed, frozen, constraints, pip, done
    import maxkit
print(f"maxkit {maxkit.__version__}")"""

# SPDX-License-Identifier: Apache-2.0
"""Public names that are imported when first used (PEP 562), so that light commands stay light."""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any


def attach(package: str, names: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for `package`.

    `names` maps a public name to `module:attribute`, or to `module` for a submodule itself.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = names[name].partition(":")
        value: Any = importlib.import_module(module)
        if attribute:
            value = getattr(value, attribute)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: sorted(names)


class _CallableModule(types.ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return vars(self)["__called__"](*arguments, **named)


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Calling the module calls `function`: for a module of formulas that also stands for the object they make up."""
    sys.modules[module].__class__ = _CallableModule
    vars(sys.modules[module])["__called__"] = function

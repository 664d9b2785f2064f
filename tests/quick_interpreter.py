"""Triton's interpreter without its needless work."""

from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """Put the interpreter's functions into `triton.language` per launch, not per function called.

    Triton does so again for every function that a kernel calls, which takes a third of the time,
    and puts in what is there already. It does take the functions out when the launch ends.
    """
    patch = interpreter._patch_lang

    def patch_unless_patched(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if isinstance(value, ModuleType)]
        languages = [tl, *(module for module in modules if module is tl.core)]
        if not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = patch_unless_patched

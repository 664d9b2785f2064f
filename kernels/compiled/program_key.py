"""A key of what Triton's compiler is given: kernels of equal keys need equal resources.

The key is taken from the program that Triton's front end makes of a kernel and of all that it
calls, with the values of constants in it and without names of files and numbers of lines. So
comments, and a function's place in its file, do not matter, and whatever the compiler sees does.
Making that program takes a fiftieth of the time of compiling it.
"""

import hashlib

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.compiler.compiler import make_backend

from kernels.compiled.variant import Variant


def program_key(variant: Variant) -> str:
    """One for all architectures, for which the front end makes the same program."""
    target = variant.target("sm_90")
    backend = make_backend(target)
    options = backend.parse_options(dict(variant.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    program = variant.source().make_ir(target, options, functions, modules, context)
    tools = triton.__version__, knobs.nvidia.ptxas.version, knobs.nvidia.ptxas_blackwell.version
    settings = sorted(variant.options.items()), sorted(get_cache_invalidating_env_vars().items())
    given = program.str_nodebug(), *tools, *settings
    return hashlib.sha256("\n".join(map(str, given)).encode()).hexdigest()[:16]

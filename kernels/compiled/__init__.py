"""Every Triton kernel, compiled without a GPU: the registers, spills and shared memory it needs.

    variant.py      a kernel as it is launched
    variants.py     those that the shipped configurations launch, and some more
    program_key.py  tells whether a kernel has changed
    check.py        compiles them, and compares with the table
    resources.json  the table

Nothing that runs a kernel imports this package. `python -m kernels.compiled` makes the table.
"""

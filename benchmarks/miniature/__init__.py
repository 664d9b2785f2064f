"""The paper in miniature: its comparisons on the sample set, in an hour on two CPU cores.

`python -m benchmarks.miniature` (or `make miniature`) trains what models.py lists, at equal cost
(budget.py), measures it (measuring.py), and writes a table, a picture and a verdict on each of the
paper's conclusions (verdicts.py). It says what holds at this scale and no more than that.
"""

"""What the operators and the training step cost: `pytest benchmarks/ --benchmark`.

Start with conftest.py, which says how to run it; report.py writes the tables.
"""

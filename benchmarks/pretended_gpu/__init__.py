"""A GPU that computes nothing, for checking on a CPU what the host does; start with run.py."""

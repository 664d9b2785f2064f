"""A job of many GPUs, rehearsed by one process without any; start with rehearse.py."""

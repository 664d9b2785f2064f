"""What is measured first where there is a GPU; start with __main__.py."""

"""What every test starts from."""

import os

# Before torch is imported: workers that each take every core only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before matplotlib is imported: there is no display.
os.environ.setdefault("MPLBACKEND", "Agg")

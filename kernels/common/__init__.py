"""What several operators need: memory layout, launch grids, ranks, libraries, large batches."""

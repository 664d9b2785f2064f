"""What a training run will cost, counted on the meta device before anything is paid for."""

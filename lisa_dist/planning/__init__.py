"""What a configuration needs on a cluster, found by running the real training step without weights and without GPUs."""

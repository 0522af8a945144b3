"""What a configuration needs on a cluster, found by running the real training step under fake tensors.

No weights, no GPUs and no formula of a step of its own.
"""

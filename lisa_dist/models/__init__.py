"""From a Hugging Face configuration to a model on meta and its weights; the map of its blocks; what its parts need.

Only architectures are looked at here: no optimizer, no sampler, no sharding.
"""

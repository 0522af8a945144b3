"""lisa_dist: layerwise-sampled fine-tuning of large language models on FSDP2."""

__version__ = "0.1.0"

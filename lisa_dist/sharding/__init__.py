"""Where every byte lives: FSDP2 groups, storage dtypes, offload, masters, activation checkpointing.

Neither samplers nor updates are known here; the private APIs of FSDP2 are called in ``fsdp2.py`` alone.
"""

"""Data: sources, formats, chat templates and loss masks, packing, and resumable batches that ranks share."""

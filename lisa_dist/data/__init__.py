"""Data: sources, formats, chat templates and loss masks, packing, and resumable batches that ranks share.

Of a model only its tokenizer is known here; what is computed with a batch is not.
"""

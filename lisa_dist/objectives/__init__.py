"""From a micro-batch to a sum of losses: the head that never holds all logits.

What the loss is divided by is decided once a step, over all ranks, by the loop.
"""

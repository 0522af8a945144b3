"""``lisa-dist bench``: targets that make steps, in turns, and the figures drawn from their times.

A target calls what training calls; nothing here is called by training.
"""

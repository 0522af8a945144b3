"""``lisa-dist bench``: targets that make steps, in turns, and what their times come to.

A target calls what training calls; nothing here is called by training.
"""

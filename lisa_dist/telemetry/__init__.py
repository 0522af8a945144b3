"""Records, logs, the progress bar and memory figures of a run, and the pages that show them.

It is told what happened and decides nothing.
"""

"""Records, logs, the progress bar and the memory of a run, and the pages that show them.

It is told what happened and decides nothing.
"""

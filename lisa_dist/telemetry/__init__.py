"""Records, logs, the lock, the progress bar and the memory of a run, and the pages that show them.

It is told what happened; of training it decides nothing.
"""

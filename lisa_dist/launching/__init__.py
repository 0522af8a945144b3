"""Starting ranks: on this machine, under Slurm, and for many configurations.

Nothing here imports torch before it must, and nothing here trains.
"""

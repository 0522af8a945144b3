"""Sweeps: the jobs of ``--multirun``, how they are started side by side, and the table and page that compare them.

A job is a run of its own in a process of its own: nothing here trains, and no job knows of the others.
"""

"""From a run to files and back: what a checkpoint holds, how it is written, restored and exported.

A checkpoint is complete when its manifest is there; the loop is not known here.
"""

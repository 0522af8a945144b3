"""The commands beside training and launching, a file or folder each: what the command line calls and what it prints.

What a command measures or predicts is done by the functions that training calls, never by a copy of them.
"""

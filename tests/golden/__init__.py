"""Golden runs: small trainings whose losses and final weights change only in a commit that says so.

``python -m tests.golden`` writes golden.json anew; test_golden.py compares with it.
"""

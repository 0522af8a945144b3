"""The loop, what prepares it, what it does about bad steps, and what it evaluates.

How a step changes the model is asked of ``method``; nothing here knows a sampler or an update by name.
"""

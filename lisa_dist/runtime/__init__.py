"""The ground under everything: the process group, its environment, signals, heartbeat, files, units.

It imports only the configuration.
"""

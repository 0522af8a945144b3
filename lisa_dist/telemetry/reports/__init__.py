"""HTML pages without a server: their frame, tables and plots.

What is shown is handed in.
"""

"""The demonstration's questions, and the script that wrote them.

They are read as a user's file is; nothing else of the package lies here.
"""

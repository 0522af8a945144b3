"""The method inside other trainers: transformers' Trainer and TRL.

Nothing in this project imports it.
"""

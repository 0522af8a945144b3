"""What makes it LISA: the model with its sampler, update and optimizer, the switch between periods, and the probes.

It receives micro-batches and knows neither files nor the loop.
"""

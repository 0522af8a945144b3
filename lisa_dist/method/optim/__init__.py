"""The optimizer over the active parameters, its schedule and its clipping.

It sees parameters by name and knows neither the sampler nor the model.
"""

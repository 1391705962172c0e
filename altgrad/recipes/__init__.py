"""Recipes: ways to store weights, as opposed to predictions about a way.

`storage` is the only file: `WeightStorage` stores the weights of an optimizer in a number format.
Read `altgrad.quantization` first.
"""

"""Recipes: store weights in a number format during training, rather than predict the effect.

`storage` is the only file: `WeightStorage` stores the weights of an optimizer in a number format.
Read `altgrad.quantization` first.
"""

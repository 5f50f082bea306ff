"""Models written before transformers' attention interface: how each hands its attention to ours, for one pass.

A file a family, named after it, with what stands in for the narrowest part of its attention module that has queries,
keys and values: `_attn` where there is one, else `forward`. `in_place.adapted` finds who is in a model and puts it on
the instances, never on their classes.
"""

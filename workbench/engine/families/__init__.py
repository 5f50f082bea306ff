"""Models that do not do as transformers' attention interface wants it, and what stands in their modules for one pass.

A file a family, named after it, with what stands in for the narrowest part of its attention module that has queries,
keys and values: `_attn` where there is one, else `forward`. `in_place.adapted` finds who is in a model and puts it on
the instances, never on their classes.
"""

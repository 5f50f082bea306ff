"""Compressed models as folders that the workbench or servers load.

In the packed format of compressed-tensors where every layer has a place in it; else as tensors and a description of
the modules that stand in for the model's own, which is plain data: only classes of torch, the workbench and packages
that bring weight methods are built again. `Session(path)` opens both, with layers as small as they were.
"""

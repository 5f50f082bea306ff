"""Compressed models as files that the workbench or servers load."""

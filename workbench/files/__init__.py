"""Files from outside, and folders that are written whole or not at all.

Files are opened by `paths.regular`, so that what never ends is refused, and JSON is parsed by `strict_json.read` in
bounds of size and depth.
"""

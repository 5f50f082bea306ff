"""Getting between a model of transformers and its attention: the hook, and the masks it hands on."""

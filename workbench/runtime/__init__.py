"""How a model is run: prefill, chunked prefill, decoding, CUDA graphs, conversations, evaluation."""

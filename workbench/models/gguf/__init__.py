"""GGUF files: header, tensors, tokenizer, architectures."""

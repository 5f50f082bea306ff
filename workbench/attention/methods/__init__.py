"""Attention methods: softmax attention computed otherwise."""

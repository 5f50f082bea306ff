"""Calibration texts, and what is learnt of a model from them.

Texts run through the model block after block, so that one block's statistics are in memory at a time: means, largest
magnitudes and Hessians (E[x xᵀ]) of what enters each linear layer, similarity of blocks, gradients. They are written
to the cache folder under fingerprints of model and texts; all methods and budgets read them there. With the Hessian H,
the mean square of what a change ΔW does to the outputs is the diagonal of ΔW H ΔWᵀ, so no activations are kept. First
tokens of texts, which all later ones attend to, count more in H (default model, GPTQ at 4 bits: KL 0.30 without that,
0.18 with). Statistics are the uncompressed model's, also for later layers.
"""

"""How a model is run: prefill, chunked prefill, planning, decoding, CUDA graph, conversation, evaluation.

A prompt is read once and recorded (`prefill`), or, by methods that read in bounded memory, chunk by chunk on stores
that begin empty and never outgrow the limit (`chunked_prefill`). `planning` turns a trace and KV methods into a plan;
a `conversation` fills the plan's stores, `decode` feeds tokens through them, `greedy` chooses the next ones,
`cuda_graph` captures a step where the stores allow it, and `evaluate` holds a run against the uncompressed one by
teacher forcing. `exactness` refuses a model that would be run otherwise than by itself.
"""

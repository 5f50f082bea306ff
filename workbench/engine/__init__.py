"""Getting between a model of transformers and its attention: the hook, and the masks it hands on.

`attention_hook.forward` registers one attention and one mask function with transformers, switches the model to them
for one pass, and makes a handler known to the thread of the pass (a context variable: some layers hand no keywords
on). On modules older than that interface a function of their family stands meanwhile (`families`). A module of a
compressed model that remembers something of a run keeps it with that handler. Nothing stays on modules, a lock per
model covers a single pass, and an exception leaves the model as it was.
"""

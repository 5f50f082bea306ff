"""What a session shows of a prompt under a recipe: attention, heads, channels, operators.

The n x n matrix never exists: rows of the softmax are streamed and pooled into maps of any window. Under KV methods
every query sees what the plan holds. Under an attention method maps, sums and figures of heads are of what it really
adds up (`implied`): it runs once for each block of columns, on values that are one in a single position.
"""

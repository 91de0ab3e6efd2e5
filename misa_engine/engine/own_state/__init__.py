"""``shard_state``: replicas each of which keeps moments and residual bits of a part of every matrix (ZeRO-1).

step            gradients are averaged as ever, and so is everything that is decided by them; a process then updates its
                part of each matrix, and all send each other their parts of the new weights
switch          a part never changes hands, so nothing is sent but the weights that rounding or line 16 has changed
checkpoint      whole matrices, put together from all processes: the state that replicas without the option write
"""

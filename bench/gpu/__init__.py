"""`make gpu-bench`: checks every operation on a GPU, times it, and tunes its kernels.

`python -m bench.gpu` checks and times; `python -m bench.gpu --tune` tunes. Both write down every
result as soon as it is known. `--device cpu --shapes tiny` rehearses the same steps without a GPU:
its figures mean nothing, and its file says so.
"""

"""Proofs about the GPU kernels on machines without a GPU: `python -m bench.audit`, `make audit`.

Three things are looked at. The machine code: every kernel is compiled for every architecture as it
would be launched, and its registers, spills, shared memory, tensor-core opcodes and loads are held
against budgets. The bytes: real runs in Triton's interpreter are metered, against the formula of
each operation and against the edges of every tensor. The bound: bytes and FLOPs give the time that
no kernel on a card can beat.
"""

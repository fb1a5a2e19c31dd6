"""How many blocks of a kernel a multiprocessor holds at once, from its registers and memory."""

from __future__ import annotations

# Shared memory of a multiprocessor; each block takes 1 KB more than it asks for.
_SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
_RESERVED = 1024
_REGISTERS = 65536 // 4  # a quarter of a multiprocessor schedules its own warps
_WARPS = 64
_BLOCKS = 32
_TENSOR_COLUMNS = 512  # of sm_100's tensor memory

_LDS = 64 * 1024  # of a compute unit, CDNA 2 and 3
_VECTOR_REGISTERS = 512  # of each lane of a SIMD, accumulators included
_WAVES = 8  # of a SIMD, four of which make a compute unit


def _up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def blocks_per_multiprocessor(
    arch: str,
    warps: int,
    registers: int,
    shared: int,
    *,
    scalar_registers: int = 0,
    tensor_columns: int = 0,
) -> int:
    """Return the blocks (workgroups) that fit on one multiprocessor (compute unit).

    Args:
        arch: sm_80, sm_90, sm_100, gfx90a or gfx942.
        warps: of a block; wavefronts of 64 lanes on gfx.
        registers: of a thread; on gfx vector registers, accumulators included.
        shared: bytes of a block.
        scalar_registers: of a wavefront.
        tensor_columns: of tensor memory, of a block.

    Source:
        CUDA C++ Programming Guide, table of technical specifications by compute capability;
        LLVM AMDGPUUsage and its occupancy by registers.
    """
    if arch.startswith("gfx"):
        waves = min(_WAVES, _VECTOR_REGISTERS // _up(max(registers, 1), 8))
        if scalar_registers > 100:
            waves = min(waves, 7)
        fit = [_BLOCKS if warps > 1 else 4 * _WAVES, 4 * waves // warps]
        fit += [_LDS // _up(shared, 512)] if shared else []
        return min(fit)
    a_warp = _up(32 * registers, 256)
    fit = [
        _BLOCKS,
        _WARPS // warps,
        4 * (_REGISTERS // a_warp) // warps,
        _SHARED[arch] // (_up(shared, 128) + _RESERVED),
    ]
    fit += [_TENSOR_COLUMNS // tensor_columns] if tensor_columns else []
    return min(fit)

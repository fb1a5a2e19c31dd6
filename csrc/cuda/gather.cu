// The gather kernels: gather_index.h holds what they do, this file what only a GPU has.
#include "gather.h"

namespace prunekit::gather {
namespace {

// One block on a GPU: each thread is there already, and keeps only what is its own.
struct Team {
  template <typename V>
  struct Private {
    V value;
    __device__ __forceinline__ V& operator[](int) { return value; }
  };

  template <typename Phase>
  __device__ __forceinline__ void phase(const Phase& run) {
    run(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

// Unaligned rows keep 64 registers a thread: asked for fewer, as it likes best, the compiler spills.
template <int WORD>
__global__ void __launch_bounds__(THREADS, WORD == VECTOR ? 0 : 8)
    gather_rows_kernel(const __grid_constant__ RowJob job) {
  Team team;
  rows_block<WORD>(team, job, blockIdx.x);
}

template <int WORD>
__global__ void __launch_bounds__(STRIP_THREADS)
    compact_rows_kernel(const __grid_constant__ RowJob job) {
  Team team;
  rows_in_place_block<WORD>(team, job, blockIdx.x);
}

// In place or not: the job says how many tiles a block has.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    gather_cols_kernel(const __grid_constant__ ColumnJob job) {
  __shared__ ColumnShared<T> shared;
  Team team;
  columns_block<T>(team, job, blockIdx.x, shared);
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    compact_mlp_kernel(const __grid_constant__ MlpJob job) {
  __shared__ ColumnShared<T> shared;
  Team team;
  mlp_block<T>(team, job, blockIdx.x, shared);
}

template <typename Job>
cudaError_t launch(
    void (*kernel)(Job), const Job& job, int64_t blocks, int threads, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(job);
  return cudaGetLastError();
}

cudaError_t launch_columns(const ColumnJob& job, int element_size, cudaStream_t stream) {
  if (job.columns > INT32_MAX) return cudaErrorInvalidValue;
  switch (element_size) {
    case 1: return launch(gather_cols_kernel<uint8_t>, job, job.blocks, THREADS, stream);
    case 2: return launch(gather_cols_kernel<uint16_t>, job, job.blocks, THREADS, stream);
    case 4: return launch(gather_cols_kernel<uint32_t>, job, job.blocks, THREADS, stream);
    case 8: return launch(gather_cols_kernel<uint64_t>, job, job.blocks, THREADS, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_rows(
    const Matrix& to, const Matrix& from, const Index& index, int element_size,
    cudaStream_t stream) {
  const RowJob job = plan_rows(to, from, index, element_size);
  switch (job.word) {
    case 1: return launch(gather_rows_kernel<1>, job, job.blocks, THREADS, stream);
    case 2: return launch(gather_rows_kernel<2>, job, job.blocks, THREADS, stream);
    case 4: return launch(gather_rows_kernel<4>, job, job.blocks, THREADS, stream);
    case 8: return launch(gather_rows_kernel<8>, job, job.blocks, THREADS, stream);
    default: return launch(gather_rows_kernel<16>, job, job.blocks, THREADS, stream);
  }
}

cudaError_t launch_rows_in_place(
    const Matrix& matrix, const Index& index, int element_size, cudaStream_t stream) {
  const RowJob job = plan_rows_in_place(matrix, index, element_size);
  switch (job.word) {
    case 1: return launch(compact_rows_kernel<1>, job, job.blocks, STRIP_THREADS, stream);
    case 2: return launch(compact_rows_kernel<2>, job, job.blocks, STRIP_THREADS, stream);
    case 4: return launch(compact_rows_kernel<4>, job, job.blocks, STRIP_THREADS, stream);
    case 8: return launch(compact_rows_kernel<8>, job, job.blocks, STRIP_THREADS, stream);
    default: return launch(compact_rows_kernel<16>, job, job.blocks, STRIP_THREADS, stream);
  }
}

cudaError_t launch_columns(
    const Matrix& to, const Matrix& from, const Index& index, int element_size,
    cudaStream_t stream) {
  return launch_columns(plan_columns(to, from, index, element_size, false), element_size, stream);
}

cudaError_t launch_columns_in_place(
    const Matrix& matrix, const Index& index, int element_size, cudaStream_t stream) {
  return launch_columns(
      plan_columns(matrix, matrix, index, element_size, true), element_size, stream);
}

cudaError_t launch_mlp(
    const Projection& gate, const Projection& up, const Projection& down, const Index& index,
    int element_size, cudaStream_t stream) {
  const MlpJob job = plan_mlp(
      gate.to, gate.from, up.to, up.from, down.to, down.from, index, element_size);
  if (job.down.columns > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t blocks = job.down.blocks + job.gate.blocks + job.up.blocks;
  switch (element_size) {
    case 1: return launch(compact_mlp_kernel<uint8_t>, job, blocks, THREADS, stream);
    case 2: return launch(compact_mlp_kernel<uint16_t>, job, blocks, THREADS, stream);
    case 4: return launch(compact_mlp_kernel<uint32_t>, job, blocks, THREADS, stream);
    case 8: return launch(compact_mlp_kernel<uint64_t>, job, blocks, THREADS, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace prunekit::gather

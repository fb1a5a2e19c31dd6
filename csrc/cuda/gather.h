// What the gather kernels are launched with. No torch headers: any program can launch them.
//
// Elements have 1, 2, 4 or 8 bytes; those of a row are neighbours. Entries of an index are not
// checked. Each launcher returns what the launch itself reported and waits for nothing; where
// nothing is to be moved, nothing is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gather_index.h"

namespace prunekit::gather {

// Row k of to becomes row index[k] of from.
cudaError_t launch_rows(
    const Matrix& to, const Matrix& from, const Index& index, int element_size,
    cudaStream_t stream);

// Column k of to becomes column index[k] of from.
cudaError_t launch_columns(
    const Matrix& to, const Matrix& from, const Index& index, int element_size,
    cudaStream_t stream);

// The same within one matrix, index[0] < index[1] < ...; the first rows or columns are the result.
cudaError_t launch_rows_in_place(
    const Matrix& matrix, const Index& index, int element_size, cudaStream_t stream);
cudaError_t launch_columns_in_place(
    const Matrix& matrix, const Index& index, int element_size, cudaStream_t stream);

// Rows of gate and of up (whose data may be null: no up) and columns of down in one launch.
struct Projection {
  Matrix to, from;
};
cudaError_t launch_mlp(
    const Projection& gate, const Projection& up, const Projection& down, const Index& index,
    int element_size, cudaStream_t stream);

}  // namespace prunekit::gather

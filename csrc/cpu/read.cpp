// read_floats: what bench/decode.py measures reading by, a loop that does nothing else.
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../ops.h"
#include "isa.h"

#if PRUNEKIT_X86_KERNELS
#include <immintrin.h>
#endif

#define PRUNEKIT_KERNELS "read.inl"
#include "foreach_isa.h"

namespace prunekit {

double read_floats(const Tensor& x) {
  check(x.is_cpu() && x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous(),
        "read_floats: x must be contiguous fp32 on the CPU");
  const auto kernel = PRUNEKIT_BEST(sum_streams);
  const float* from = x.const_data_ptr<float>();
  const int64_t threads = torch::stable::get_num_threads(), words = x.numel();
  std::vector<double> sums(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t t, int64_t end) {
    for (; t < end; ++t) {
      const int64_t first = t * words / threads, last = (t + 1) * words / threads;
      sums[t] = kernel(from + first, last - first);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace prunekit

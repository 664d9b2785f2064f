// csrc/power_iteration.cu on the CPU, callable from Python through ctypes.

#include "power_iteration.cu"

// Returns the number of launches, or -1 after an error.
extern "C" int power_iteration(const void* const tables[5], float* workspace, float* sigma,
                               const uint32_t counts[4]) {
  using namespace sswgan;
  const PowerIteration work = {
      .addresses = static_cast<const Addresses*>(tables[0]),
      .sizes = static_cast<const Sizes*>(tables[1]),
      .column_sums = static_cast<const Tile*>(tables[2]),
      .merge_columns = static_cast<const ColumnBlock*>(tables[3]),
      .row_sums = static_cast<const Tile*>(tables[4]),
      .workspace = workspace,
      .sigma = sigma,
      .num_matrices = counts[0],
      .num_column_sums = counts[1],
      .num_merge_columns = counts[2],
      .num_row_sums = counts[3],
  };
  cuda_on_cpu::num_launches = 0;
  return launch(work, nullptr) == cudaSuccess ? cuda_on_cpu::num_launches : -1;
}

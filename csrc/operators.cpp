// The operators as torch sees them, through libtorch's stable ABI: arguments are checked here and
// handed on. One binary serves every torch from 2.10 on and every Python.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "power_iteration.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& tensor, const char* name, ScalarType dtype, int32_t device) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device() == device,
                  name, " is not on the device of the addresses");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

void check_table(const Tensor& table, const char* name, ScalarType dtype, int64_t num_columns,
                 int32_t device) {
  check(table, name, dtype, device);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) > 0 && table.size(1) == num_columns,
                  name, " is not a table of ", num_columns, " columns");
}

// `stream` is a cudaStream_t: the stable ABI gives no access to the current one before torch 2.13.
void power_iteration(Tensor addresses, Tensor sizes, Tensor column_sums, Tensor merge_columns,
                     Tensor row_sums, Tensor workspace, Tensor sigma, std::vector<int64_t> tiles,
                     int64_t num_iterations, int64_t stream) {
  using namespace sswgan;
  const int32_t device = addresses.get_device();
  check_table(addresses, "addresses", ScalarType::Long, kAddressColumns, device);
  check_table(sizes, "sizes", ScalarType::Long, kSizeColumns, device);
  check_table(column_sums, "column_sums", ScalarType::Int, sizeof(Tile) / 4, device);
  check_table(merge_columns, "merge_columns", ScalarType::Int, sizeof(ColumnBlock) / 4, device);
  check_table(row_sums, "row_sums", ScalarType::Int, sizeof(Tile) / 4, device);
  check(workspace, "workspace", ScalarType::Float, device);
  check(sigma, "sigma", ScalarType::Float, device);
  STD_TORCH_CHECK(sizes.size(0) == addresses.size(0) && sigma.numel() == addresses.size(0),
                  "addresses, sizes and sigma are of different numbers of matrices");
  const std::vector<int64_t> own = {kSplitRows, kBlockColumns, kBlockRows, kSplitColumns};
  STD_TORCH_CHECK(tiles == own, "the work was cut for other tiles: build csrc/ again");

  const PowerIteration work = {
      .addresses = static_cast<const Addresses*>(addresses.const_data_ptr()),
      .sizes = static_cast<const Sizes*>(sizes.const_data_ptr()),
      .column_sums = static_cast<const Tile*>(column_sums.const_data_ptr()),
      .merge_columns = static_cast<const ColumnBlock*>(merge_columns.const_data_ptr()),
      .row_sums = static_cast<const Tile*>(row_sums.const_data_ptr()),
      .workspace = static_cast<float*>(workspace.mutable_data_ptr()),
      .sigma = static_cast<float*>(sigma.mutable_data_ptr()),
      .num_matrices = static_cast<uint32_t>(addresses.size(0)),
      .num_column_sums = static_cast<uint32_t>(column_sums.size(0)),
      .num_merge_columns = static_cast<uint32_t>(merge_columns.size(0)),
      .num_row_sums = static_cast<uint32_t>(row_sums.size(0)),
  };
  const torch::stable::accelerator::DeviceGuard guard(device);
  for (int64_t i = 0; i < num_iterations; ++i) {
    const cudaError_t error = launch(work, reinterpret_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == cudaSuccess, "power_iteration: ", cudaGetErrorString(error));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(sswgan_csrc, m) {
  // What is written through the addresses is declared by the operator in Python that calls this one.
  m.def(
      "power_iteration(Tensor addresses, Tensor sizes, Tensor column_sums, Tensor merge_columns, "
      "Tensor row_sums, Tensor(a!) workspace, Tensor(b!) sigma, int[] tiles, int num_iterations, "
      "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sswgan_csrc, CUDA, m) {
  m.impl("power_iteration", TORCH_BOX(&power_iteration));
}

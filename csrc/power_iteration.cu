// The kernels of one power iteration over a list of matrices. Every sum has one order, which depends
// on the shapes alone: the same weights give the same bits.

#include "power_iteration.h"

namespace sswgan {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kFinishThreads = 1024;
// As torch.nn.functional.normalize: a vector shorter than this is not blown up to length one.
constexpr float kShortest = 1e-12f;

__device__ float at_least_shortest(float length) {
  return length < kShortest ? kShortest : length;  // not fmaxf, which drops NaN
}

// Four neighbouring values of a row, zero past its end.
template <bool kAligned>
__device__ float4 load4(const float* row, int64_t column, int64_t num_columns) {
  if constexpr (kAligned) {  // the row's length is then a multiple of four
    return column < num_columns ? __ldg(reinterpret_cast<const float4*>(row + column))
                                : make_float4(0.f, 0.f, 0.f, 0.f);
  } else {
    auto value = [&](int64_t at) { return at < num_columns ? __ldg(row + at) : 0.f; };
    return make_float4(value(column), value(column + 1), value(column + 2), value(column + 3));
  }
}

__device__ float sum_of_warp(float value) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, lane);
  }
  return value;
}

// The sum over the block, in every thread of it.
template <int kNumThreads>
__device__ float sum_of_block(float value) {
  constexpr int kWarps = kNumThreads / kWarp;
  __shared__ float sums[kWarps];
  value = sum_of_warp(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp];
  __syncthreads();  // the next call writes sums again
  return total;
}

// Four rows at a time go down the tile, each read by two warps, four columns per thread.
constexpr int kLanes = kBlockColumns / 4;
constexpr int kGroups = kThreads / kLanes;

template <bool kAligned>
__device__ float4 add_rows(const float* w, const float* u, const Sizes& size, int64_t first_row,
                           int64_t column) {
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int i = 0; i < kSplitRows; i += kGroups) {
    const int64_t row = first_row + i;
    if (row >= size.num_rows) break;
    const float4 value = load4<kAligned>(w + row * size.num_columns, column, size.num_columns);
    const float scale = __ldg(u + row);
    total.x = fmaf(scale, value.x, total.x);
    total.y = fmaf(scale, value.y, total.y);
    total.z = fmaf(scale, value.z, total.z);
    total.w = fmaf(scale, value.w, total.w);
  }
  return total;
}

// W^T u over one split of rows, for one block of columns.
__global__ void __launch_bounds__(kThreads) column_sums(PowerIteration work) {
  const Tile tile = work.column_sums[blockIdx.x];
  const Addresses& address = work.addresses[tile.matrix];
  const Sizes& size = work.sizes[tile.matrix];
  const auto* w = reinterpret_cast<const float*>(address.w);
  const auto* u = reinterpret_cast<const float*>(address.u);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t first_row = int64_t{tile.row} * kSplitRows + group;
  const int64_t column = int64_t{tile.column} * kBlockColumns;

  __shared__ float4 sums[kGroups][kLanes];
  sums[group][lane] = address.aligned ? add_rows<true>(w, u, size, first_row, column + 4 * lane)
                                      : add_rows<false>(w, u, size, first_row, column + 4 * lane);
  __syncthreads();
  static_assert(kBlockColumns == kThreads, "one column per thread is written");
  if (column + threadIdx.x >= size.num_columns) return;
  float total = 0.f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    total += reinterpret_cast<const float*>(sums[g])[threadIdx.x];
  }
  float* partial = work.workspace + size.columns_at + tile.row * size.num_columns;
  partial[column + threadIdx.x] = total;
}

// v' of one block of columns, and the sum of its squares.
__global__ void __launch_bounds__(kThreads) merge_columns(PowerIteration work) {
  const ColumnBlock block = work.merge_columns[blockIdx.x];
  const Sizes& size = work.sizes[block.matrix];
  const int64_t column = int64_t{block.column} * kBlockColumns + threadIdx.x;
  const float* partial = work.workspace + size.columns_at + column;
  float total = 0.f;
  if (column < size.num_columns) {
#pragma unroll 8
    for (int64_t split = 0; split < size.row_splits; ++split) {
      total += partial[split * size.num_columns];
    }
    reinterpret_cast<float*>(work.addresses[block.matrix].v)[column] = total;
  }
  const float square = sum_of_block<kThreads>(total * total);
  if (threadIdx.x == 0) work.workspace[size.squares_at + block.column] = square;
}

// A warp has its rows side by side, so that v' is read once for all of them.
constexpr int kWarpRows = kBlockRows / (kThreads / kWarp);

template <bool kAligned>
__device__ void add_columns(const float* w, const float* v, const Sizes& size, int64_t first_row,
                            int64_t first_column, float (&totals)[kWarpRows]) {
  const int64_t end = min(first_column + kSplitColumns, size.num_columns);
#pragma unroll 4
  for (int64_t column = first_column + 4 * (threadIdx.x % kWarp); column < end;
       column += 4 * kWarp) {
    // Where it is not aligned, v may not be either; v is small and read from cache.
    const float4 scale = load4<false>(v, column, size.num_columns);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (first_row + i >= size.num_rows) break;
      const float* row = w + (first_row + i) * size.num_columns;
      const float4 value = load4<kAligned>(row, column, size.num_columns);
      totals[i] = fmaf(scale.x, value.x, totals[i]);
      totals[i] = fmaf(scale.y, value.y, totals[i]);
      totals[i] = fmaf(scale.z, value.z, totals[i]);
      totals[i] = fmaf(scale.w, value.w, totals[i]);
    }
  }
}

// W v' over one split of columns, for one block of rows.
__global__ void __launch_bounds__(kThreads) row_sums(PowerIteration work) {
  const Tile tile = work.row_sums[blockIdx.x];
  const Addresses& address = work.addresses[tile.matrix];
  const Sizes& size = work.sizes[tile.matrix];
  const auto* w = reinterpret_cast<const float*>(address.w);
  const auto* v = reinterpret_cast<const float*>(address.v);
  const int64_t first_row = int64_t{tile.row} * kBlockRows + threadIdx.x / kWarp * kWarpRows;
  const int64_t first_column = int64_t{tile.column} * kSplitColumns;

  float totals[kWarpRows] = {};
  if (address.aligned) {
    add_columns<true>(w, v, size, first_row, first_column, totals);
  } else {
    add_columns<false>(w, v, size, first_row, first_column, totals);
  }
  float* partial = work.workspace + size.rows_at + tile.column * size.num_rows;
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const float total = sum_of_warp(totals[i]);
    if (threadIdx.x % kWarp == 0 && first_row + i < size.num_rows) partial[first_row + i] = total;
  }
}

// v, u and sigma of one matrix, from v', |v'|^2 by blocks and W v' by splits.
__global__ void __launch_bounds__(kFinishThreads) finish(PowerIteration work) {
  const Sizes& size = work.sizes[blockIdx.x];
  auto* u = reinterpret_cast<float*>(work.addresses[blockIdx.x].u);
  auto* v = reinterpret_cast<float*>(work.addresses[blockIdx.x].v);

  const float* squares = work.workspace + size.squares_at;
  const int64_t num_blocks = (size.num_columns + kBlockColumns - 1) / kBlockColumns;
  float square = 0.f;
  for (int64_t i = threadIdx.x; i < num_blocks; i += kFinishThreads) square += squares[i];
  const float v_scale = 1.f / at_least_shortest(sqrtf(sum_of_block<kFinishThreads>(square)));
  for (int64_t i = threadIdx.x; i < size.num_columns; i += kFinishThreads) v[i] *= v_scale;

  const float* partial = work.workspace + size.rows_at;
  square = 0.f;
  for (int64_t row = threadIdx.x; row < size.num_rows; row += kFinishThreads) {
    float total = 0.f;
    for (int64_t split = 0; split < size.column_splits; ++split) {
      total += partial[split * size.num_rows + row];
    }
    total *= v_scale;
    u[row] = total;
    square = fmaf(total, total, square);
  }
  square = sum_of_block<kFinishThreads>(square);
  const float length = at_least_shortest(sqrtf(square));
  for (int64_t row = threadIdx.x; row < size.num_rows; row += kFinishThreads) u[row] /= length;
  if (threadIdx.x == 0) work.sigma[blockIdx.x] = square / length;  // u . Wv with u = Wv / length
}

template <typename... Arguments>
cudaError_t enqueue(void (*kernel)(Arguments...), uint32_t num_blocks, int num_threads,
                    cudaStream_t stream, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(kernel, dim3(num_blocks), dim3(num_threads), pointers, 0, stream);
}

}  // namespace

cudaError_t launch(const PowerIteration& work, cudaStream_t stream) {
  cudaError_t error = enqueue(column_sums, work.num_column_sums, kThreads, stream, work);
  if (error == cudaSuccess) {
    error = enqueue(merge_columns, work.num_merge_columns, kThreads, stream, work);
  }
  if (error == cudaSuccess) error = enqueue(row_sums, work.num_row_sums, kThreads, stream, work);
  if (error == cudaSuccess) error = enqueue(finish, work.num_matrices, kFinishThreads, stream, work);
  return error;
}

}  // namespace sswgan

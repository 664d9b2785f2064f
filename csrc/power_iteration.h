// One power iteration over a list of matrices W [R, K]: what Python hands over.
//
// kernels/spectral_norm/power_iteration_tables.py makes the tables and says what each of the four
// launches does.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sswgan {

// Tiles of W per block: rows and columns of the column sums, and of the row sums. The lists of work
// are made for exactly these.
inline constexpr int kSplitRows = 128;
inline constexpr int kBlockColumns = 256;
inline constexpr int kBlockRows = 16;
inline constexpr int kSplitColumns = 2048;

// A row of the table of addresses.
struct Addresses {
  int64_t w, u, v;
  int64_t aligned;  // every row of W begins at a multiple of 16 bytes
};
inline constexpr int kAddressColumns = sizeof(Addresses) / sizeof(int64_t);

// A row of the table of sizes; *_at are offsets in the workspace.
struct Sizes {
  int64_t num_rows, num_columns;      // R, K
  int64_t row_splits, column_splits;  // of the column sums, of the row sums
  int64_t columns_at;                 // [row_splits, K]: W^T u of every split
  int64_t squares_at;                 // |v'|^2 of every block of columns
  int64_t rows_at;                    // [column_splits, R]: W v' of every split
};
inline constexpr int kSizeColumns = sizeof(Sizes) / sizeof(int64_t);

// Rows of the lists of work.
struct Tile {
  int32_t matrix, row, column;  // in splits or blocks, not in values
};
struct ColumnBlock {
  int32_t matrix, column;
};

struct PowerIteration {
  const Addresses* addresses;
  const Sizes* sizes;
  const Tile* column_sums;
  const ColumnBlock* merge_columns;
  const Tile* row_sums;
  float* workspace;
  float* sigma;  // [num_matrices]
  uint32_t num_matrices, num_column_sums, num_merge_columns, num_row_sums;
};

// Enqueues one iteration, four launches; returns the first error.
cudaError_t launch(const PowerIteration& work, cudaStream_t stream);

}  // namespace sswgan

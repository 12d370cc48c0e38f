// Codes on the CPU that no kernel multiplies (fp8 in blocks; int8 and int4 whose x is not to be
// rounded), held as they are stored.
#pragma once

#include "lacuna/model/weight.h"

namespace lacuna::model {

/// Weight::read_rows of a matrix as it is stored.
/// @param out  [count, matrix.columns] of matrix.values_dtype
void read_stored_rows(const format::CompactMatrix& matrix, const int32_t* ids, int64_t count,
                      void* out, const Executor& executor);

/// y = x W^T + b, W expanded into the scratch for each product.
class StoredWeight final : public Weight {
 public:
  /// @param matrix  quantised
  StoredWeight(format::CompactMatrix matrix, const Compute& compute)
      : Weight(matrix.rows, matrix.columns, compute), matrix_(std::move(matrix)) {}
  at::Tensor expanded() const override;
  void read_rows(const int32_t* ids, int64_t count, void* out,
                 const Executor& executor) const override;
  size_t bytes() const override { return matrix_.size_bytes(); }
  bool is_coded() const override { return true; }

 private:
  format::CompactMatrix matrix_;
};

}  // namespace lacuna::model

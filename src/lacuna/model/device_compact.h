// A compact weight on a GPU, held as it is stored.
#pragma once

#include "lacuna/format/compact.h"
#include "lacuna/model/weight.h"

namespace lacuna::model {

/// The parts of a compact matrix on a GPU; of a quantised one, with codes of one byte, the codes as
/// numbers. A bitmap is expanded by liblacuna_cuda.so;
/// blocks, and everything where that library is missing, by torch's own operations, whose
/// temporaries take about ten bytes a weight of the one matrix.
class DeviceCompact final : public Weight {
 public:
  DeviceCompact(const format::CompactMatrix& matrix, const Compute& compute);
  at::Tensor expanded() const override;
  /// Where one kernel expands it: nothing is allocated once the scratch is large enough.
  bool recordable() const override;
  size_t bytes() const override;

 private:
  at::Tensor expand_blocks(const at::Tensor& values) const;
  at::Tensor expand_bitmap(const at::Tensor& values) const;

  format::Pattern pattern_;
  at::Tensor values_, bitmap_, block_rows_, block_columns_;
  at::Tensor row_values_;  // for the library, unstructured: values before each row
  at::Tensor bits_;        // without it: the bits of a byte
};

}  // namespace lacuna::model

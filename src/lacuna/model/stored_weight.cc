#include "lacuna/model/stored_weight.h"

#include "lacuna/model/scratch.h"

namespace lacuna::model {

at::Tensor StoredWeight::expanded() const {
  at::Tensor out = scratch(rows(), columns(), compute());
  expand_into(matrix_, out);
  return out;
}

void read_stored_rows(const format::CompactMatrix& matrix, const int32_t* ids, int64_t count,
                      void* out, const Executor& executor) {
  const auto row_bytes = matrix.columns * static_cast<int64_t>(size_bytes(matrix.values_dtype));
  executor.parallel_for(count, [&](int64_t i) {
    format::expand_rows(matrix, ids[i], ids[i] + 1, static_cast<std::byte*>(out) + i * row_bytes);
  });
}

void StoredWeight::read_rows(const int32_t* ids, int64_t count, void* out,
                             const Executor& executor) const {
  read_stored_rows(matrix_, ids, count, out, executor);
}

}  // namespace lacuna::model

// A matrix in csr or coo from anywhere: refused, or it becomes the compact matrix that it says, and
// comes back from there, from the other form and from blocks. Input: kind, value type, rows,
// columns and entries (16 bits each), then row offsets or rows, columns, values.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "lacuna/format/exchange.h"

namespace {

using lacuna::Bytes;
using lacuna::DType;
using lacuna::Tensor;
using lacuna::format::CompactMatrix;
using lacuna::format::ExchangeKind;
using lacuna::format::IndexedMatrix;
using lacuna::format::Pattern;

void require(bool holds) {
  if (!holds) std::abort();
}

bool same(const Bytes& a, const Bytes& b) { return std::ranges::equal(a.span(), b.span()); }
bool same(const IndexedMatrix& a, const IndexedMatrix& b) {
  return a.kind == b.kind && same(a.row_offsets, b.row_offsets) &&
         same(a.row_indices, b.row_indices) && same(a.column_indices, b.column_indices) &&
         same(a.values, b.values);
}

/// Takes the input apart; what is missing at its end is left out.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : left_(data, size) {}
  Bytes bytes(size_t wanted) {
    const auto part = left_.first(std::min(wanted, left_.size()));
    left_ = left_.subspan(part.size());
    return Bytes::take(std::vector<uint8_t>(part.begin(), part.end()));
  }
  template <class T>
  T number() {
    const Bytes taken = bytes(sizeof(T));
    return taken.size() == sizeof(T) ? lacuna::read_unaligned<T>(taken.data()) : T{0};
  }
  size_t left() const { return left_.size(); }

 private:
  std::span<const uint8_t> left_;
};

IndexedMatrix matrix_of(Input input) {
  constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kI32};
  const bool csr = input.number<uint8_t>() % 2 == 0;
  IndexedMatrix matrix{.kind = csr ? ExchangeKind::kCsr : ExchangeKind::kCoo};
  matrix.values_dtype = kTypes[input.number<uint8_t>() % 4];
  matrix.rows = input.number<int16_t>();
  matrix.columns = input.number<int16_t>();
  const size_t entries = input.number<uint16_t>();
  const auto rows = static_cast<size_t>(std::max<int64_t>(matrix.rows, 0));
  if (csr) {
    matrix.row_offsets = input.bytes((rows + 1) * sizeof(int64_t));
  } else {
    matrix.row_indices = input.bytes(entries * sizeof(int32_t));
  }
  matrix.column_indices = input.bytes(entries * sizeof(int32_t));
  matrix.values = input.bytes(input.left());
  return matrix;
}

void exercise(const IndexedMatrix& matrix) {
  const CompactMatrix compact = lacuna::format::from_indexed(matrix);
  require(lacuna::format::validate(compact).empty());
  require(lacuna::format::count_kept(compact) == matrix.kept());
  require(same(lacuna::format::to_indexed(compact, matrix.kind), matrix));
  for (const ExchangeKind kind : {ExchangeKind::kCsr, ExchangeKind::kCoo}) {
    const IndexedMatrix other = lacuna::format::to_indexed(compact, kind);
    require(lacuna::format::validate(other).empty());
    const CompactMatrix back = lacuna::format::from_indexed(other);
    require(same(back.bitmap, compact.bitmap) && same(back.offsets, compact.offsets) &&
            same(back.values, compact.values));
  }
  if (matrix.rows * matrix.columns > 1 << 16) return;
  const auto blocks = lacuna::format::with_pattern(compact, Pattern::block(3, 5));
  require(blocks.ok() && lacuna::format::validate(*blocks).empty());
  const auto again = lacuna::format::with_pattern(*blocks, Pattern::unstructured());
  require(again.ok() && lacuna::format::validate(*again).empty());
  require(lacuna::format::count_zeros(*again) == lacuna::format::count_zeros(compact));
  const Tensor dense = lacuna::format::expand(*again);
  require(same(dense.bytes, lacuna::format::expand(*blocks).bytes));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const IndexedMatrix matrix = matrix_of(Input(data, size));
  const auto violations = lacuna::format::validate(matrix, 3);
  require(violations.size() <= 3);
  if (violations.empty()) exercise(matrix);
  return 0;
}

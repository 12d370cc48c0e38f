#include "lacuna/format/exchange.h"

#include <bit>
#include <numeric>

#include "lacuna/format/element.h"
#include "lacuna/format/faults.h"

namespace lacuna::format {
namespace {

constexpr std::string_view kCsr = "csr", kCoo = "coo", kBsr = "bsr:";

int64_t index_at(const Bytes& indices, int64_t i) {
  return read_unaligned<int32_t>(indices.as<int32_t>() + i);
}

/// Calls f(entry, row) for the kept values in their order. Needs sound sizes and offsets.
template <class F>
void for_each_entry(const IndexedMatrix& m, F&& f) {
  if (m.kind == ExchangeKind::kCoo) {
    for (int64_t entry = 0; entry < m.kept(); ++entry) f(entry, index_at(m.row_indices, entry));
    return;
  }
  int64_t entry = 0;
  for (int64_t row = 0; row < m.rows; ++row)
    for (const auto end = read_unaligned<int64_t>(m.row_offsets.as<int64_t>() + row + 1);
         entry < end; ++entry)
      f(entry, row);
}

}  // namespace

Result<ExchangeForm> ExchangeForm::parse(std::string_view text) {
  if (text == kCsr) return ExchangeForm{ExchangeKind::kCsr};
  if (text == kCoo) return ExchangeForm{ExchangeKind::kCoo};
  if (text.starts_with(kBsr)) {
    const auto block = Pattern::parse(fmt::format("block:{}", text.substr(kBsr.size())));
    if (block.ok()) return bsr(*block);
  }
  return usage_error("format: unknown exchange format (got \"{}\"; need csr, coo or bsr:RxC).",
                     text);
}

std::string ExchangeForm::text() const {
  switch (kind) {
    case ExchangeKind::kNone:
      break;
    case ExchangeKind::kCsr:
      return std::string(kCsr);
    case ExchangeKind::kCoo:
      return std::string(kCoo);
    case ExchangeKind::kBsr:
      return fmt::format("{}{}x{}", kBsr, block_rows, block_columns);
  }
  return "none";
}

std::vector<Violation> validate(const IndexedMatrix& m, size_t limit) {
  Faults faults(limit);
  if (!faults.header(m.rows, m.columns, m.values_dtype)) return faults.take();
  const bool csr = m.kind == ExchangeKind::kCsr;
  if (!csr && m.kind != ExchangeKind::kCoo) {
    faults.add(-1, -1, "neither csr nor coo");
    return faults.take();
  }
  constexpr int64_t kIndexBytes = sizeof(int32_t);
  faults.size("columns", m.column_indices.size(), m.kept() * kIndexBytes);
  faults.size("values", m.values.size(),
              m.kept() * static_cast<int64_t>(size_bytes(m.values_dtype)));
  faults.size("row_offsets", m.row_offsets.size(), csr ? (m.rows + 1) * 8 : 0);
  faults.size("rows", m.row_indices.size(), csr ? 0 : m.kept() * kIndexBytes);
  if (!faults.none() || (csr && !faults.offsets("row offset", m.row_offsets, m.rows, 1, m.kept())))
    return faults.take();
  std::pair<int64_t, int64_t> previous{-1, -1};
  for_each_entry(m, [&](int64_t entry, int64_t row) {
    if (faults.full()) return;
    const std::pair place{row, index_at(m.column_indices, entry)};
    if (row < 0 || row >= m.rows || place.second < 0 || place.second >= m.columns) {
      faults.add(row, place.second,
                 fmt::format("entry {} lies in row {}, column {} (need rows 0..{}, columns 0..{})",
                             entry, row, place.second, m.rows - 1, m.columns - 1));
    } else if (place <= previous) {
      faults.add(row, place.second,
                 fmt::format("entry {} follows row {}, column {} (need rows in order, columns "
                             "ascending, none twice)",
                             entry, previous.first, previous.second));
    }
    previous = place;
  });
  return faults.take();
}

IndexedMatrix to_indexed(const CompactMatrix& matrix, ExchangeKind kind) {
  IndexedMatrix out{.kind = kind,
                    .rows = matrix.rows,
                    .columns = matrix.columns,
                    .values_dtype = matrix.values_dtype,
                    .values = matrix.values};
  const bool csr = kind == ExchangeKind::kCsr;
  const auto kept = matrix.values.size() / size_bytes(matrix.values_dtype);
  std::vector<int32_t> columns, rows;
  std::vector<int64_t> offsets;
  columns.reserve(kept);
  (csr ? offsets.reserve(static_cast<size_t>(matrix.rows) + 1) : rows.reserve(kept));
  const int64_t stride = matrix.bitmap_stride_bytes();
  for (int64_t row = 0; row < matrix.rows; ++row) {
    if (csr) offsets.push_back(static_cast<int64_t>(columns.size()));
    const uint8_t* bits = matrix.bitmap.as<uint8_t>() + row * stride;
    for (int64_t byte = 0; byte < stride; ++byte)
      for (unsigned left = bits[byte]; left; left &= left - 1)
        columns.push_back(static_cast<int32_t>(byte * 8 + std::countr_zero(left)));
    if (!csr) rows.resize(columns.size(), static_cast<int32_t>(row));
  }
  if (csr) {
    offsets.push_back(static_cast<int64_t>(columns.size()));
    out.row_offsets = Bytes::take(std::move(offsets));
  } else {
    out.row_indices = Bytes::take(std::move(rows));
  }
  out.column_indices = Bytes::take(std::move(columns));
  return out;
}

CompactMatrix from_indexed(const IndexedMatrix& matrix) {
  CompactMatrix out{.pattern = Pattern::unstructured(),
                    .rows = matrix.rows,
                    .columns = matrix.columns,
                    .values_dtype = matrix.values_dtype,
                    .values = matrix.values};
  const int64_t stride = out.bitmap_stride_bytes();
  std::vector<uint8_t> bitmap(static_cast<size_t>(out.rows * stride));
  std::vector<int64_t> offsets(static_cast<size_t>(ceil_div(out.rows, kRowGroup)) + 1);
  for_each_entry(matrix, [&](int64_t entry, int64_t row) {
    const int64_t column = index_at(matrix.column_indices, entry);
    bitmap[row * stride + column / 8] |= static_cast<uint8_t>(1u << (column % 8));
    ++offsets[row / kRowGroup + 1];
  });
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  out.bitmap = Bytes::take(std::move(bitmap));
  out.offsets = Bytes::take(std::move(offsets));
  return out;
}

Result<CompactMatrix> with_pattern(const CompactMatrix& matrix, const Pattern& pattern) {
  if (matrix.pattern == pattern) return matrix;
  return compress(expand(matrix), pattern);
}

}  // namespace lacuna::format

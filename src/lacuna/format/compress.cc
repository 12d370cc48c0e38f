// Dense to compact. Groups of kRowGroup rows (of blocks, rows of blocks) are worked on by
// themselves; where a group's values begin is known after all have been counted.
#include <algorithm>
#include <bit>
#include <numeric>
#include <vector>

#include "lacuna/format/compact.h"
#include "lacuna/format/element.h"

namespace lacuna::format {
namespace {

/// Calls f(group, first row, last row) for groups of `height` rows.
template <class F>
void for_each_rows(int64_t rows, int64_t height, const Executor& executor, F&& f) {
  executor.parallel_for(ceil_div(rows, height), [&](int64_t group) {
    f(group, group * height, std::min(rows, (group + 1) * height));
  });
}

/// Counts [n] -> what comes before each, and all [n + 1].
std::vector<int64_t> before_each(const std::vector<int64_t>& counts) {
  std::vector<int64_t> before(counts.size() + 1);
  std::partial_sum(counts.begin(), counts.end(), before.begin() + 1);
  return before;
}

/// The bits of a row's non-zeros; `bitmap` is 0. No branches: half of them would be mispredicted.
template <class U>
void mark_row(const Dense<U>& dense, int64_t row, uint8_t* bitmap) {
  for (int64_t first = 0; first < dense.columns; first += 8) {
    const int64_t width = std::min<int64_t>(8, dense.columns - first);
    unsigned bits = 0;
    for (int64_t i = 0; i < width; ++i) bits |= unsigned{!is_zero(dense.at(row, first + i))} << i;
    bitmap[first / 8] = static_cast<uint8_t>(bits);
  }
}

template <class U>
Result<CompactMatrix> compress_bitmap(const Dense<U>& dense, CompactMatrix out,
                                      const Executor& executor) {
  const int64_t stride = out.bitmap_stride_bytes();
  std::vector<uint8_t> bitmap(static_cast<size_t>(dense.rows * stride));
  std::vector<int64_t> counts(static_cast<size_t>(ceil_div(dense.rows, kRowGroup)));
  for_each_rows(dense.rows, kRowGroup, executor, [&](int64_t group, int64_t first, int64_t last) {
    uint8_t* const bits = bitmap.data() + first * stride;
    for (int64_t row = first; row < last; ++row)
      mark_row(dense, row, bits + (row - first) * stride);
    counts[static_cast<size_t>(group)] = count_bits(bits, (last - first) * stride);
  });
  std::vector<int64_t> offsets = before_each(counts);
  std::vector<U> values(static_cast<size_t>(offsets.back()));
  for_each_rows(dense.rows, kRowGroup, executor, [&](int64_t group, int64_t first, int64_t last) {
    std::vector<U> of_row(static_cast<size_t>(dense.columns));
    U* to = values.data() + offsets[static_cast<size_t>(group)];
    for (int64_t row = first; row < last; ++row) {
      size_t kept = 0;
      for (int64_t column = 0; column < dense.columns; ++column) {
        const U bits = dense.at(row, column);
        of_row[kept] = bits;
        kept += !is_zero(bits);
      }
      to = std::copy_n(of_row.data(), kept, to);
    }
  });
  out.bitmap = Bytes::take(std::move(bitmap));
  out.values = Bytes::take(std::move(values));
  out.offsets = Bytes::take(std::move(offsets));
  return out;
}

template <class U>
Result<CompactMatrix> compress_keep_of(const Dense<U>& dense, CompactMatrix out,
                                       const Executor& executor) {
  const int64_t stride = out.bitmap_stride_bytes(), of = out.pattern.of, keep = out.pattern.keep;
  std::vector<uint8_t> bitmap(static_cast<size_t>(dense.rows * stride));
  std::vector<U> values(static_cast<size_t>(dense.rows * out.values_per_row()));
  const auto one_row = [&](int64_t row) -> Status {
    U* next = values.data() + row * out.values_per_row();
    for (int64_t first = 0; first < dense.columns; first += of, next += keep) {
      const int64_t width = std::min(of, dense.columns - first);
      uint64_t kept = 0;
      for (int64_t i = 0; i < width; ++i) kept |= uint64_t{!is_zero(dense.at(row, first + i))} << i;
      const int64_t wanted = std::min(keep, width);
      if (std::popcount(kept) > wanted)
        return bad_input(
            "compress: row {}, columns {}..{} hold {} non-zeros (need at most {} for {}). Prune "
            "with this pattern first.",
            row, first, first + width - 1, std::popcount(kept), wanted, out.pattern.text());
      while (std::popcount(kept) < wanted) kept |= kept + 1;  // the lowest that is free
      int64_t slot = 0;
      for (uint64_t left = kept; left != 0; left &= left - 1) {
        const int64_t column = first + std::countr_zero(left);
        bitmap[row * stride + column / 8] |= static_cast<uint8_t>(1u << (column % 8));
        const U bits = dense.at(row, column);
        next[slot++] = is_zero(bits) ? U{0} : bits;
      }
    }
    return {};
  };
  std::vector<Status> done(static_cast<size_t>(ceil_div(dense.rows, kRowGroup)));
  for_each_rows(dense.rows, kRowGroup, executor, [&](int64_t group, int64_t first, int64_t last) {
    Status& status = done[static_cast<size_t>(group)];
    for (int64_t row = first; row < last && status.ok(); ++row) status = one_row(row);
  });
  for (Status& status : done) LACUNA_CHECK(std::move(status));
  out.bitmap = Bytes::take(std::move(bitmap));
  out.values = Bytes::take(std::move(values));
  return out;
}

template <class U>
Result<CompactMatrix> compress_block(const Dense<U>& dense, CompactMatrix out,
                                     const Executor& executor) {
  const int64_t height = out.pattern.block_rows, width = out.pattern.block_columns;
  const auto down = static_cast<size_t>(ceil_div(dense.rows, height));
  std::vector<std::vector<int32_t>> kept(down);  // of each row of blocks
  std::vector<int64_t> counts(down);
  for_each_rows(dense.rows, height, executor, [&](int64_t group, int64_t top, int64_t bottom) {
    auto& own = kept[static_cast<size_t>(group)];
    for (int64_t left = 0; left < dense.columns; left += width) {
      const int64_t right = std::min(dense.columns, left + width);
      bool any = false;
      for (int64_t row = top; row < bottom && !any; ++row)
        for (int64_t column = left; column < right && !any; ++column)
          any = !is_zero(dense.at(row, column));
      if (any) own.push_back(static_cast<int32_t>(left / width));
    }
    counts[static_cast<size_t>(group)] = static_cast<int64_t>(own.size());
  });
  std::vector<int64_t> offsets = before_each(counts);
  std::vector<int32_t> columns(static_cast<size_t>(offsets.back()));
  std::vector<U> values(columns.size() * static_cast<size_t>(height * width));
  for_each_rows(dense.rows, height, executor, [&](int64_t group, int64_t top, int64_t bottom) {
    int64_t block = offsets[static_cast<size_t>(group)];
    for (const int32_t place : kept[static_cast<size_t>(group)]) {
      const int64_t left = place * width, right = std::min(dense.columns, left + width);
      U* const to = values.data() + block * height * width;
      columns[static_cast<size_t>(block++)] = place;
      for (int64_t row = top; row < bottom; ++row)
        for (int64_t column = left; column < right; ++column) {
          const U bits = dense.at(row, column);
          to[(row - top) * width + (column - left)] = is_zero(bits) ? U{0} : bits;
        }
    }
  });
  out.values = Bytes::take(std::move(values));
  out.block_columns = Bytes::take(std::move(columns));
  out.block_offsets = Bytes::take(std::move(offsets));
  return out;
}

}  // namespace

Result<CompactMatrix> compress(const Tensor& dense, const Pattern& pattern,
                               const Executor& executor) {
  if (dense.shape.size() != 2 || !storable(dense.dtype))
    return bad_input("compress: needs a matrix of float32, bfloat16 or float16 (got {} {}).",
                     long_name(dense.dtype), shape_text(dense.shape));
  if (!element_count(dense.shape) || std::ranges::max(dense.shape) > kLargestExtent)
    return bad_input("compress: impossible shape (got {}; need extents of 0..2^31-1).",
                     shape_text(dense.shape));
  if (dense.bytes.size() != static_cast<size_t>(dense.elements()) * size_bytes(dense.dtype))
    return bad_input("compress: {} {} holds {} bytes (need {}).", long_name(dense.dtype),
                     shape_text(dense.shape), dense.bytes.size(),
                     static_cast<size_t>(dense.elements()) * size_bytes(dense.dtype));
  CompactMatrix out;
  out.pattern = pattern;
  out.rows = dense.shape[0];
  out.columns = dense.shape[1];
  out.values_dtype = dense.dtype;
  return with_bits(dense.dtype, [&](auto bits) -> Result<CompactMatrix> {
    const Dense<decltype(bits)> view{dense.bytes.data(), out.rows, out.columns};
    switch (pattern.kind) {
      case PatternKind::kUnstructured:
        return compress_bitmap(view, std::move(out), executor);
      case PatternKind::kKeepOf:
        return compress_keep_of(view, std::move(out), executor);
      case PatternKind::kBlock:
        return compress_block(view, std::move(out), executor);
      case PatternKind::kDense:
        break;
    }
    return bad_input("compress: a dense matrix has no compact form (need a sparse pattern).");
  });
}

}  // namespace lacuna::format

#include "lacuna/format/stack.h"

#include <algorithm>

#include "lacuna/core/large_block.h"

namespace lacuna::format {
namespace {

bool alike(const CompactMatrix& a, const CompactMatrix& b) {
  return a.pattern == b.pattern && a.columns == b.columns && a.values_dtype == b.values_dtype &&
         a.quantization == b.quantization;
}

/// Rows that must not be torn apart.
int64_t group_rows(const Pattern& pattern) {
  if (pattern.kind == PatternKind::kUnstructured) return kRowGroup;
  return pattern.kind == PatternKind::kBlock ? pattern.block_rows : 1;
}

/// One member of every part, one after the other.
Bytes joined(const std::vector<CompactMatrix>& parts, Bytes CompactMatrix::*member,
             const Executor& executor) {
  std::vector<Bytes> pieces;
  for (const CompactMatrix& part : parts) pieces.push_back(part.*member);
  return in_large_pages(pieces, executor);
}

/// Running totals (i64, one more than groups), each part's continuing where the last one's ended.
Bytes joined_offsets(const std::vector<CompactMatrix>& parts, Bytes CompactMatrix::*member) {
  std::vector<int64_t> all;
  int64_t before = 0;
  for (const CompactMatrix& part : parts) {
    const Bytes& offsets = part.*member;
    const auto count = static_cast<int64_t>(offsets.size() / sizeof(int64_t));
    if (count == 0) continue;
    if (!all.empty()) all.pop_back();
    for (int64_t i = 0; i < count; ++i)
      all.push_back(before + read_unaligned<int64_t>(offsets.data() + i * 8));
    before = all.back();
  }
  return Bytes::take(std::move(all));
}

}  // namespace

std::optional<CompactMatrix> stack_rows(const std::vector<CompactMatrix>& parts,
                                        const Executor& executor) {
  const CompactMatrix& first = parts.front();
  for (const CompactMatrix& part : parts)
    if (!alike(part, first) || (&part != &parts.back() && part.rows % group_rows(part.pattern)))
      return std::nullopt;
  CompactMatrix all{.pattern = first.pattern,
                    .columns = first.columns,
                    .values_dtype = first.values_dtype,
                    .quantization = first.quantization};
  for (const CompactMatrix& part : parts) all.rows += part.rows;
  for (Bytes CompactMatrix::*member :
       {&CompactMatrix::scales, &CompactMatrix::zero_points, &CompactMatrix::bitmap,
        &CompactMatrix::values, &CompactMatrix::block_columns})
    all.*member = joined(parts, member, executor);
  for (Bytes CompactMatrix::*member : {&CompactMatrix::offsets, &CompactMatrix::block_offsets})
    all.*member = joined_offsets(parts, member);
  return all;
}

}  // namespace lacuna::format

#include "lacuna/prune/stored_size.h"

#include <algorithm>
#include <set>

#include "lacuna/io/compact_store.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::prune {
namespace {

int64_t groups(int64_t extent, int64_t of) { return (extent + of - 1) / of; }

/// Adds a tensor of so many bytes, behind the last one.
void append(std::vector<io::SafetensorsFile::Entry>& entries, std::string name, DType dtype,
            uint64_t bytes) {
  const uint64_t begin = entries.empty() ? 0 : entries.back().end;
  const auto elements = static_cast<int64_t>(bytes / size_bytes(dtype));
  entries.push_back({std::move(name),
                     dtype,
                     {elements},
                     begin,
                     begin + static_cast<uint64_t>(elements) * size_bytes(dtype)});
}

}  // namespace

double compact_bytes(const format::Pattern& pattern, int64_t rows, int64_t columns, DType values,
                     int64_t kept) {
  const auto value = static_cast<double>(size_bytes(values));
  if (pattern.kind == format::PatternKind::kBlock) {
    const double block = static_cast<double>(pattern.block_rows) * pattern.block_columns;
    return static_cast<double>(kept) / block * (block * value + sizeof(int32_t)) +
           8 * static_cast<double>(groups(rows, pattern.block_rows) + 1);
  }
  return static_cast<double>(kept) * value + static_cast<double>(rows * groups(columns, 8)) +
         8 * static_cast<double>(groups(rows, format::kRowGroup) + 1);
}

Result<double> other_bytes(const io::Checkpoint& checkpoint, const std::vector<std::string>& pruned,
                           const format::Pattern& pattern) {
  const std::set<std::string> compact(pruned.begin(), pruned.end());
  std::vector<io::SafetensorsFile::Entry> entries;  // sizes as text, nearly as they will be
  double bytes = 0;
  for (const auto& [name, info] : checkpoint.weights()) {
    if (!compact.contains(name)) {
      bytes += static_cast<double>(info.bytes);
      for (const std::string& part : info.parts)
        append(entries, part, info.dtype, info.bytes / info.parts.size());
      continue;
    }
    const io::SparseDeclaration declared{pattern, info.shape[0], info.shape[1], info.dtype, {}, {}};
    const auto parts = io::compact_part_names(name, declared);
    const uint64_t dense = static_cast<uint64_t>(info.shape[0] * info.shape[1]);
    for (const std::string& part : parts)
      append(entries, part, info.dtype, dense / parts.size() * size_bytes(info.dtype));
  }
  LACUNA_TRY(const std::string header, io::safetensors_header("model.safetensors", entries));
  return bytes + static_cast<double>(header.size());
}

}  // namespace lacuna::prune

#include "lacuna/api/mask_delta.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "lacuna/api/layers.h"
#include "lacuna/io/checksums.h"
#include "lacuna/io/mask_file.h"
#include "lacuna/io/out_folder.h"

namespace lacuna::api {
namespace fs = std::filesystem;
namespace {

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.bytes.size() == b.bytes.size() &&
         std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()) == 0;
}

/// Whether an element is a zero of either sign: all but its sign bit. Little endian, so that bit is
/// in the last byte.
bool is_zero(const char* element, size_t width) {
  for (size_t i = 0; i + 1 < width; ++i)
    if (element[i] != 0) return false;
  return (element[width - 1] & 0x7f) == 0;
}

/// The bits of a matrix's non-zeros.
Bytes bitmap_of(const Tensor& matrix) {
  const int64_t rows = matrix.shape[0], columns = matrix.shape[1], stride = (columns + 7) / 8;
  const size_t width = size_bytes(matrix.dtype);
  std::vector<uint8_t> bits(static_cast<size_t>(rows * stride), 0);
  const char* element = matrix.bytes.as<char>();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column, element += width)
      if (!is_zero(element, width))
        bits[static_cast<size_t>(row * stride + column / 8)] |=
            static_cast<uint8_t>(1u << (column % 8));
  return Bytes::take(std::move(bits));
}

bool kept_at(const Bytes& bitmap, int64_t columns, int64_t row, int64_t column) {
  const int64_t stride = (columns + 7) / 8;
  return bitmap.as<uint8_t>()[row * stride + column / 8] >> (column % 8) & 1;
}

/// Calls f(kept, address offset) for every element.
template <class F>
void for_elements(const Bytes& bitmap, const Tensor& matrix, F&& f) {
  const size_t width = size_bytes(matrix.dtype);
  size_t offset = 0;
  for (int64_t row = 0; row < matrix.shape[0]; ++row)
    for (int64_t column = 0; column < matrix.shape[1]; ++column, offset += width)
      f(kept_at(bitmap, matrix.shape[1], row, column), offset);
}

/// Kept elements, and those of them that differ.
ChangedWeight compare(const std::string& name, const Bytes& bitmap, const Tensor& dense,
                      const Tensor& sparse) {
  ChangedWeight result{name};
  const size_t width = size_bytes(dense.dtype);
  for_elements(bitmap, dense, [&](bool kept, size_t offset) {
    if (!kept) return;
    ++result.kept;
    result.changed +=
        std::memcmp(dense.bytes.data() + offset, sparse.bytes.data() + offset, width) != 0;
  });
  return result;
}

/// A copy with +0 wherever the mask says so.
Tensor masked(const Tensor& dense, const Bytes& bitmap) {
  const char* from = dense.bytes.as<char>();
  std::vector<char> values(from, from + dense.bytes.size());
  const size_t width = size_bytes(dense.dtype);
  for_elements(bitmap, dense, [&](bool kept, size_t offset) {
    if (!kept) std::memset(values.data() + offset, 0, width);
  });
  return {dense.dtype, dense.shape, Bytes::take(std::move(values))};
}

/// "a.weight (12 of 34 kept), b.weight (...) and 5 more"
std::string list_of(const std::vector<ChangedWeight>& changed) {
  constexpr size_t kNamed = 3;
  std::string text;
  for (size_t i = 0; i < std::min(kNamed, changed.size()); ++i)
    text += fmt::format("{}{} ({} of {} kept)", i == 0 ? "" : ", ", changed[i].name,
                        changed[i].changed, changed[i].kept);
  if (changed.size() > kNamed) text += fmt::format(" and {} more", changed.size() - kNamed);
  return text;
}

/// Compares two models weight by weight.
class Differ {
 public:
  Differ(const io::Checkpoint& dense, const io::Checkpoint& sparse)
      : dense_(dense), sparse_(sparse) {}

  Status add(const std::string& name) {
    const io::WeightInfo& info = sparse_.weights().at(name);
    LACUNA_TRY(const Tensor dense, dense_.dense(name));
    LACUNA_TRY(const io::Weight stored, sparse_.weight(name));
    const auto* compact = std::get_if<format::CompactMatrix>(&stored);
    const Tensor sparse = compact ? format::expand(*compact) : std::get<Tensor>(stored);
    if (dense.shape != sparse.shape || dense.dtype != sparse.dtype)
      return bad_input(
          "{}: tensor \"{}\" is of another shape or type than in {} (got {} {}, need {} {}).",
          sparse_.folder().string(), name, dense_.folder().string(), shape_text(sparse.shape),
          long_name(sparse.dtype), shape_text(dense.shape), long_name(dense.dtype));
    file_.dense[name] = io::whole_checksum(dense.bytes);
    if (compact == nullptr && same_bytes(dense, sparse)) return {};
    const format::Pattern pattern = pattern_of(info, stored);
    if (dense.shape.size() != 2 || pattern.kind == format::PatternKind::kDense) {
      count_changed(name, dense, sparse);
      return {};
    }
    // Codes have a mask of their own: a kept one may stand for 0.
    const bool coded = compact && !compact->quantization.none() && compact->bitmap.size() > 0;
    io::WeightMask mask{pattern, dense.shape[0], dense.shape[1], dense.dtype,
                        coded ? compact->bitmap : bitmap_of(sparse)};
    if (auto found = compare(name, mask.bitmap, dense, sparse); found.changed > 0)
      changed_.push_back(std::move(found));
    elements_ += dense.elements();
    file_.weights.emplace(name, std::move(mask));
    return {};
  }

  const std::vector<ChangedWeight>& changed() const { return changed_; }
  int64_t elements() const { return elements_; }
  io::MaskFile& file() { return file_; }

 private:
  void count_changed(const std::string& name, const Tensor& dense, const Tensor& sparse) {
    ChangedWeight all{name, 0, dense.elements()};
    const size_t width = size_bytes(dense.dtype);
    for (size_t at = 0; at < dense.bytes.size(); at += width)
      all.changed += std::memcmp(dense.bytes.data() + at, sparse.bytes.data() + at, width) != 0;
    if (all.changed > 0) changed_.push_back(std::move(all));
  }

  const io::Checkpoint &dense_, &sparse_;
  io::MaskFile file_;
  std::vector<ChangedWeight> changed_;
  int64_t elements_ = 0;
};

/// @errors kBadInput: a weight that only one of them has
Status check_same_names(const io::Checkpoint& dense, const io::Checkpoint& sparse) {
  for (const auto& [one, other] : {std::pair(&dense, &sparse), std::pair(&sparse, &dense)})
    for (const auto& [name, info] : one->weights())
      if (!other->contains(name))
        return bad_input("{}: has no tensor \"{}\", which {} has. Is it the same model?",
                         other->folder().string(), name, one->folder().string());
  return {};
}

}  // namespace

Result<DiffReport> diff(const fs::path& dense_folder, const fs::path& sparse_folder,
                        const fs::path& out, bool mask_only, const JobProgress& progress) {
  LACUNA_TRY(const auto dense, io::Checkpoint::open(dense_folder));
  LACUNA_TRY(const auto sparse, io::Checkpoint::open(sparse_folder));
  LACUNA_CHECK(check_same_names(dense, sparse));
  std::error_code failure;
  const fs::path folder = fs::absolute(out).parent_path();
  for (const fs::path& given : {dense_folder, sparse_folder})
    if (fs::equivalent(folder, given, failure))
      return usage_error("{}: lies among the files of {}. Write the mask elsewhere.", out.string(),
                         given.string());
  Differ differ(dense, sparse);
  int64_t done = 0;
  const auto total = static_cast<int64_t>(dense.weights().size());
  for (const auto& [name, info] : dense.weights()) {
    LACUNA_CHECK(differ.add(name));
    dense.release(name);
    sparse.release(name);
    if (progress.step) progress.step("weights", ++done, total);
  }
  if (!mask_only && !differ.changed().empty())
    return bad_input(
        "{}: keeps other values than {}: {}. A mask can't give them back; write the mask alone by "
        "--mask-only.",
        sparse_folder.string(), dense_folder.string(), list_of(differ.changed()));
  io::MaskFile& file = differ.file();
  if (file.weights.empty())
    return bad_input("{}: no weight of it is sparse; there is no mask to write.",
                     sparse_folder.string());
  file.about = sparse.config().value("lacuna", nlohmann::json::object());
  // Of its store, and of its codes, which a mask doesn't give back.
  for (const char* key : {"format_version", "weights", "quantization", "coding"})
    file.about.erase(key);
  if (!differ.changed().empty()) file.about["mask_only"] = true;
  LACUNA_CHECK(io::write_mask_file(out, file));
  DiffReport report{.out = out.string(),
                    .bytes = fs::file_size(out, failure),
                    .bytes_sparse = sparse.total_bytes(),
                    .weights = static_cast<int64_t>(file.weights.size()),
                    .changed = differ.changed()};
  report.bits_per_weight =
      8 * static_cast<double>(report.bytes) / static_cast<double>(differ.elements());
  return report;
}

Result<ApplyReport> apply(const fs::path& dense_folder, const fs::path& mask_file,
                          const fs::path& out, io::Store store, const JobProgress& progress) {
  LACUNA_TRY(const io::MaskFile masks, io::read_mask_file(mask_file));
  LACUNA_TRY(const auto dense, io::Checkpoint::open(dense_folder));
  for (const auto& [name, checksum] : masks.dense)
    if (!dense.contains(name))
      return bad_input("{}: has no tensor \"{}\", which {} was made for.", dense_folder.string(),
                       name, mask_file.string());
  LACUNA_CHECK(io::check_not_source(out, dense_folder));
  LACUNA_TRY(auto writer, io::CheckpointWriter::create(out, {.store = store}));
  ApplyReport report{.out = out.string(), .bytes_dense = dense.total_bytes()};
  SparsityCount count;
  int64_t done = 0;
  const auto total = static_cast<int64_t>(dense.weights().size());
  for (const auto& [name, info] : dense.weights()) {
    LACUNA_TRY(const Tensor whole, dense.dense(name));
    const auto expected = masks.dense.find(name);
    if (expected == masks.dense.end() || expected->second != io::whole_checksum(whole.bytes))
      return bad_input(
          "{}: tensor \"{}\" is not the one that {} was made for. Give the dense model that the "
          "mask was taken from.",
          dense_folder.string(), name, mask_file.string());
    if (const auto found = masks.weights.find(name); found == masks.weights.end()) {
      LACUNA_TRY(const io::Weight kept, dense.weight(name));
      LACUNA_CHECK(std::visit([&](const auto& held) { return writer.add(name, held); }, kept));
    } else {
      const io::WeightMask& mask = found->second;
      if (whole.shape != Shape{mask.rows, mask.columns} || whole.dtype != mask.values)
        return bad_input("{}: tensor \"{}\" has another shape or type than its mask in {}.",
                         dense_folder.string(), name, mask_file.string());
      auto matrix =
          format::compress(masked(whole, mask.bitmap), mask.pattern, model::torch_executor());
      if (!matrix.ok())
        return bad_input("{}: mask of \"{}\": {}", mask_file.string(), name,
                         matrix.error().message);
      count.add({format::count_zeros(*matrix), whole.elements()});
      ++report.weights;
      LACUNA_CHECK(writer.add(name, *matrix));
    }
    dense.release(name);
    if (progress.step) progress.step("weights", ++done, total);
  }
  LACUNA_CHECK(io::copy_companion_files(dense_folder, writer));
  nlohmann::json config = dense.config();
  for (const char* key : {"quantization_config", "compression_config"}) config.erase(key);
  config["lacuna"] = masks.about;
  LACUNA_CHECK(writer.finish(config));
  LACUNA_TRY(const auto written, io::Checkpoint::open(out));
  report.bytes_out = written.total_bytes();
  report.sparsity = count.sparsity();
  return report;
}

}  // namespace lacuna::api

// The safetensors container: 8-byte header length, JSON header, raw little-endian row-major
// tensors.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/status.h"

namespace lacuna::io {

/// One safetensors file, mapped. Opening checks the header: size cap (100 MB), JSON, known dtypes,
/// shapes that multiply without overflow, offsets inside the file, in ascending order without
/// overlap or holes.
class SafetensorsFile {
 public:
  struct Entry {
    std::string name;
    DType dtype;
    Shape shape;
    uint64_t begin = 0, end = 0;  ///< relative to the end of the header
  };
  /// @errors kBadInput, naming file and tensor
  static Result<SafetensorsFile> open(const std::filesystem::path& path);
  /// The same over bytes that already lie in memory; `name` stands for the file in messages.
  static Result<SafetensorsFile> parse(Bytes bytes, std::string name);

  const std::vector<Entry>& entries() const { return entries_; }  ///< in file order
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool contains(std::string_view name) const { return index_.find(name) != index_.end(); }
  /// The tensor as a view of the mapping. @errors kBadInput: no such tensor
  Result<Tensor> tensor(std::string_view name) const;
  const std::string& path() const { return path_; }
  /// Whether the tensors lie in a mapping of the file: release_pages() may be called for them.
  bool mapped() const { return mapped_; }

 private:
  Status check_layout() const;

  std::string path_;
  Bytes data_;  ///< what follows the header
  bool mapped_ = false;
  std::vector<Entry> entries_;
  std::map<std::string, size_t, std::less<>> index_;
  std::map<std::string, std::string> metadata_;
};

/// The first bytes of a file whose tensors lie as `entries` say, from the length to the last byte
/// of the header, padded with spaces so that the data starts 64-byte aligned. Equal entries give
/// equal bytes; `file` is for messages. @errors kBadInput: a name given twice or not UTF-8; bytes
/// that don't fit a shape; too many tensors
Result<std::string> safetensors_header(const std::string& file,
                                       const std::vector<SafetensorsFile::Entry>& entries,
                                       const std::map<std::string, std::string>& metadata = {});

struct NamedTensor {
  std::string name;
  Tensor tensor;
};
/// Writes one file atomically; tensors in the order given.
/// @errors as safetensors_header(); kCheckFailed with the system's reason
Status write_safetensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors,
                         const std::map<std::string, std::string>& metadata = {});

}  // namespace lacuna::io

// safetensors from anywhere: refused, or every tensor lies in the file and the header can be
// written again.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "lacuna/io/safetensors.h"

namespace {

using lacuna::Bytes;
using lacuna::io::SafetensorsFile;

void require(bool holds) {
  if (!holds) std::abort();
}

Bytes copy(const void* data, size_t size) {
  const auto* bytes = static_cast<const char*>(data);
  return Bytes::take(std::vector<char>(bytes, bytes + size));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = SafetensorsFile::parse(copy(data, size), "fuzz");
  if (!file.ok()) return 0;
  std::string body;
  for (const auto& entry : file->entries()) {
    const auto tensor = file->tensor(entry.name);
    require(tensor.ok());
    require(tensor->bytes.size() ==
            static_cast<size_t>(tensor->elements()) * size_bytes(tensor->dtype));
    body.append(reinterpret_cast<const char*>(tensor->bytes.data()), tensor->bytes.size());
  }
  const auto header = lacuna::io::safetensors_header("fuzz", file->entries(), file->metadata());
  require(header.ok());
  const std::string whole = *header + body;
  const auto again = SafetensorsFile::parse(copy(whole.data(), whole.size()), "again");
  require(again.ok());
  require(again->metadata() == file->metadata());
  require(again->entries().size() == file->entries().size());
  for (const auto& entry : file->entries()) {
    const auto a = file->tensor(entry.name), b = again->tensor(entry.name);
    require(b.ok() && a->shape == b->shape && a->dtype == b->dtype);
    require(a->bytes.empty() ||
            std::memcmp(a->bytes.data(), b->bytes.data(), a->bytes.size()) == 0);
  }
  return 0;
}

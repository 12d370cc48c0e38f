#include "lacuna/io/shard_writer.h"

#include <nlohmann/json.hpp>

#include "lacuna/io/checkpoint.h"

namespace lacuna::io {
namespace fs = std::filesystem;
using nlohmann::json;

Status ShardWriter::add(const std::vector<NamedTensor>& tensors) {
  uint64_t bytes = 0;
  for (const auto& [name, tensor] : tensors) {
    bytes += tensor.bytes.size();
    if (!checksums_.try_emplace(name, chunk_checksums(tensor.bytes)).second)
      return bad_input("{}: tensor \"{}\" is given twice.", folder_.string(), name);
  }
  if (spool_ && spool_->size() > 0 && spool_->size() + bytes > shard_bytes_) LACUNA_CHECK(close());
  if (!spool_) {
    LACUNA_TRY(spool_, AtomicFile::create(folder_ / "shard"));
  }
  for (const auto& [name, tensor] : tensors) {
    const uint64_t begin = spool_->size();
    LACUNA_CHECK(spool_->write(tensor.bytes.data(), tensor.bytes.size()));
    entries_.push_back({name, tensor.dtype, tensor.shape, begin, spool_->size()});
  }
  total_bytes_ += bytes;
  return {};
}

Status ShardWriter::close() {
  if (!spool_) return {};
  const fs::path path = folder_ / fmt::format("shard-{:05}.safetensors", files_.size() + 1);
  LACUNA_TRY(const std::string header, safetensors_header(path.string(), entries_));
  LACUNA_TRY(auto file, AtomicFile::create(path));
  LACUNA_CHECK(file.write(header.data(), header.size()));
  LACUNA_CHECK(file.append(*spool_));
  LACUNA_CHECK(file.commit());
  files_.push_back(path);
  std::vector<std::string>& names = names_.emplace_back();
  for (auto& entry : entries_) names.push_back(std::move(entry.name));
  entries_.clear();
  spool_.reset();
  return {};
}

Status ShardWriter::finish() {
  if (!spool_ && files_.empty()) LACUNA_CHECK(add({}));  // a model without tensors is a file too
  LACUNA_CHECK(close());
  if (files_.size() == 1) return rename_durably(files_[0], folder_ / "model.safetensors");
  json map = json::object();
  for (size_t i = 0; i < files_.size(); ++i) {
    const auto name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, files_.size());
    LACUNA_CHECK(rename_durably(files_[i], folder_ / name));
    for (const std::string& tensor : names_[i]) map[tensor] = name;
  }
  const json index = {{"metadata", {{"total_size", total_bytes_}}}, {"weight_map", std::move(map)}};
  return write_text(folder_ / "model.safetensors.index.json", index.dump(2) + "\n");
}

}  // namespace lacuna::io

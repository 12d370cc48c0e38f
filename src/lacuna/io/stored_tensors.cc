#include "lacuna/io/stored_tensors.h"

#include <algorithm>

namespace lacuna::io {

Result<StoredTensors> collect_tensors(const std::vector<SafetensorsFile>& files) {
  StoredTensors tensors;
  for (const SafetensorsFile& file : files) {
    for (const auto& entry : file.entries()) {
      LACUNA_TRY(Tensor tensor, file.tensor(entry.name));
      const auto [at, fresh] = tensors.try_emplace(
          entry.name, StoredTensor{std::move(tensor), file.path(), file.mapped()});
      if (!fresh)
        return bad_input("{}: tensor \"{}\" lies in {} too. Remove one of the files.", file.path(),
                         entry.name, at->second.file);
    }
  }
  return tensors;
}

Result<StoredTensor> expect_tensor(const StoredTensors& tensors, const std::string& name,
                                   DType dtype, const Shape& shape) {
  const auto found = tensors.find(name);
  if (found == tensors.end())
    return bad_input("tensor \"{}\" is missing (need {} {}). Get the model again.", name,
                     safetensors_name(dtype), shape_text(shape));
  const auto& [tensor, file, mapped] = found->second;
  const bool fits = std::equal(tensor.shape.begin(), tensor.shape.end(), shape.begin(), shape.end(),
                               [](int64_t got, int64_t need) { return need < 0 || got == need; });
  if (tensor.dtype != dtype || !fits)
    return bad_input("{}: tensor \"{}\" has the wrong type or shape (got {} {}; need {} {}).", file,
                     name, safetensors_name(tensor.dtype), shape_text(tensor.shape),
                     safetensors_name(dtype), shape_text(shape));
  return found->second;
}

}  // namespace lacuna::io

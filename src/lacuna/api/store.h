// The same weights in another store, or as codes.
#pragma once

#include <filesystem>
#include <functional>

#include "lacuna/api/jobs.h"

namespace lacuna::api {

/// Copies a model folder into another store: kept values and patterns unchanged, dense tensors byte
/// for byte. A dense tensor becomes compact when config.json declares its pattern, or when it
/// belongs to a block's Linear and its zeros follow keep:of or make up at least a quarter of it
/// (below that a bitmap saves nothing worth having). Quantised weights stay as they are in the
/// compact store and become the values that their codes stand for in a dense one; with a
/// quantization those that are not become codes, and every mask is compared in what was written.
/// @errors as convert()
Result<ConvertReport> convert_store(const std::filesystem::path& model,
                                    const std::filesystem::path& out, const ConvertOptions& options,
                                    const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace lacuna::api

// The same weights in another store.
#pragma once

#include <filesystem>
#include <functional>

#include "lacuna/api/jobs.h"

namespace lacuna::api {

/// Copies a model folder into another store: kept values and patterns unchanged, dense tensors byte
/// for byte. A dense tensor becomes compact when config.json declares its pattern, or when it
/// belongs to a block's Linear and its zeros follow keep:of or make up at least a quarter of it
/// (below that a bitmap saves nothing worth having).
Result<ConvertReport> convert_store(const std::filesystem::path& model,
                                    const std::filesystem::path& out, io::Store store,
                                    const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace lacuna::api

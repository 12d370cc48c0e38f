// What a run writes down of itself: JSON of its journal, of statistics, and of the finished model.
#pragma once

#include <nlohmann/json.hpp>

#include "lacuna/prune/run.h"

namespace lacuna::prune {

nlohmann::json to_json(const LayerReport& layer);
/// Of a journal's notes, or of a finished model's config, which leaves the seconds out.
LayerReport layer_from(const nlohmann::json& layer);

/// Hashes of a tensor's first, middle and last 64 KiB; of a smaller one, of all of it.
std::vector<std::string> sampled_hashes(const Bytes& bytes);
/// Which weights these are, whatever their folder and times: for each file its size and a hash over
/// name, dtype, shape and sampled_hashes() of every tensor. A change shows when it touches one of
/// the samples, so any training does; a value changed by hand between them does not.
Result<nlohmann::json> about_model(const io::Checkpoint& checkpoint);
/// Of a folder of statistics: the model and what ran through it.
Result<nlohmann::json> about_statistics(const Run& run);
/// Everything that decides the bytes of the journal; of the weights, about_model() and the times of
/// their files.
Result<nlohmann::json> about_run(const Run& run);
/// What config.json says of the run, before its results.
nlohmann::json about_written(const Run& run);

}  // namespace lacuna::prune

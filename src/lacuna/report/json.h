// Reports as JSON: what `--json` prints and `lacuna report` reads. Absent means not measured.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "lacuna/eval/perplexity.h"
#include "lacuna/model/generate.h"
#include "lacuna/prune/pipeline.h"

namespace lacuna::report {

nlohmann::json to_json(const prune::PruneReport& report);
nlohmann::json to_json(const eval::PerplexityReport& report);
nlohmann::json to_json(const model::Generation& generation);

}  // namespace lacuna::report

// `bench model`: whole models, in turns.
#pragma once

#include "lacuna/cli/tool.h"

namespace lacuna::cli {

/// Declares it below the verb. Its flags are kept for the rest of the process.
CLI::App* add_bench_model(CLI::App* bench);
/// Refuses flags that have no say beside the others; after parsing.
Status check_bench_model();
Status run_bench_model(Tool& tool);

}  // namespace lacuna::cli

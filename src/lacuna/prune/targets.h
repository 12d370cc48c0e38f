// Which weights of a model are pruned.
#pragma once

#include <regex>

#include "lacuna/prune/pipeline.h"

namespace lacuna::prune {

/// Names of the Linears to prune, relative to their block, for every block.
using Targets = std::vector<std::vector<std::string>>;
/// @errors as target_names() (pipeline.h), which tells the same as full names
Result<Targets> find_targets(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                             const PruneOptions& options);

/// Names of the weights in the blocks.
std::vector<std::string> prunable_names(const io::DecoderSpec& spec);
/// Refuses an expression that matches none of the names, which is a slip of the pen. @errors kUsage
Status check_all_match(const std::vector<std::string>& texts, const std::vector<std::string>& names,
                       const char* flag);
/// @param flag  where the texts come from. @errors kUsage: no regular expression
Result<std::vector<std::regex>> compile(const std::vector<std::string>& texts, const char* flag);
bool any_matches(const std::vector<std::regex>& regexes, const std::string& name);

}  // namespace lacuna::prune

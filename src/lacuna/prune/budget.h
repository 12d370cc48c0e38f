// What a budget means for a model: costs by layer and what they may come to.
#pragma once

#include <filesystem>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/prune/allocation.h"

namespace lacuna::prune {

/// Refuses before any work what can't be shared out: a pattern that fixes the sparsity, bytes of a
/// store that isn't ours, a time that nobody can tell. @errors kUsage
Status check_allocation(const AllocationOptions& options, const Request& request, io::Store store);

/// allocate()'s last two arguments.
struct Target {
  LayerCost cost;
  double amount = 0;
};
/// Without a budget, and for a sparsity: the weights that stay. For bytes: those of the layers'
/// parts in the compact store. For a time: what the layers take, between sparsities in percent.
/// @param shares  kept alive by the caller as long as the cost is
/// @errors kUsage: less than what isn't pruned takes; why a time can't be told
Result<Target> target_of(const io::Checkpoint& checkpoint, const std::vector<LayerShare>& shares,
                         const AllocationOptions& options, const Request& request);

/// What a budget of bytes or sparsity came to in a finished model.
/// @param sparsity  of its pruned weights
double reached(const Budget& budget, const std::filesystem::path& out, double sparsity);

}  // namespace lacuna::prune

#include "lacuna/prune/budget.h"

#include <algorithm>
#include <cmath>

#include "lacuna/prune/selection.h"
#include "lacuna/prune/stored_size.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
namespace {

int64_t kept_of(const LayerShare& share, double sparsity) {
  return share.weights() - dropped_of(share.weights(), sparsity);
}

Target sparsity_target(const std::vector<LayerShare>& shares, double sparsity) {
  int64_t all = 0;
  for (const LayerShare& share : shares) all += share.weights();
  return {[&shares](size_t layer, double at) {
            return static_cast<double>(kept_of(shares[layer], at));
          },
          static_cast<double>(all - dropped_of(all, sparsity))};
}

Result<Target> bytes_target(const io::Checkpoint& checkpoint, const std::vector<LayerShare>& shares,
                            const Budget& budget, const format::Pattern& pattern) {
  std::vector<std::string> names;
  std::vector<DType> dtypes;
  for (const LayerShare& share : shares) {
    names.push_back(share.name);
    dtypes.push_back(checkpoint.weights().at(share.name).dtype);
  }
  LACUNA_TRY(const double others, other_bytes(checkpoint, names, pattern));
  if (budget.amount <= others)
    return usage_error(
        "--budget: out of reach (got {}; what is not pruned takes {} already). Ask for more.",
        budget.text(), budget.told(others));
  return Target{[&shares, dtypes, pattern](size_t layer, double at) {
                  const LayerShare& share = shares[layer];
                  return compact_bytes(pattern, share.rows, share.columns, dtypes[layer],
                                       kept_of(share, at));
                },
                budget.amount - others};
}

/// What a layer takes at sparsities in percent, asked once; in between on the line.
Result<Target> time_target(const std::vector<LayerShare>& shares,
                           const AllocationOptions& options) {
  const double amount = options.budget->amount - options.other_milliseconds;
  if (amount <= 0)
    return usage_error(
        "--budget: out of reach (got {}; what is not pruned takes {} already). Ask for more.",
        options.budget->text(), options.budget->told(options.other_milliseconds));
  std::vector<std::vector<double>> times;
  for (const LayerShare& share : shares) {
    auto& own = times.emplace_back();
    for (int percent = 0; percent <= 100; ++percent) {
      LACUNA_TRY(const double time, options.milliseconds(share.name, percent / 100.0));
      own.push_back(time);
    }
    // A denser layer that is faster would never be made sparser: the cost must fall.
    for (size_t i = own.size() - 1; i-- > 0;) own[i] = std::max(own[i], own[i + 1]);
  }
  return Target{[times](size_t layer, double at) {
                  const double place = std::clamp(at, 0.0, 1.0) * 100;
                  const auto below = std::min<size_t>(static_cast<size_t>(place), 99);
                  const double part = place - static_cast<double>(below);
                  return (1 - part) * times[layer][below] + part * times[layer][below + 1];
                },
                amount};
}

}  // namespace

Status check_allocation(const AllocationOptions& options, const Request& request, io::Store store) {
  if (options.none()) return {};
  if (request.pattern.kind == format::PatternKind::kKeepOf)
    return usage_error(
        "--allocate, --budget: {} fixes every layer's sparsity; nothing is left to share out. Use "
        "unstructured or block:RxC.",
        request.pattern.text());
  if (request.rest.kind != format::PatternKind::kDense)
    return usage_error("--allocate, --budget: not with dense columns. Give --sparsity.");
  if (request.keep_mask)
    return usage_error("--allocate, --budget: --keep-mask leaves nothing to share out.");
  if (!options.budget) return {};
  if (options.budget->kind != Budget::Kind::kSparsity && !request.quantization.none())
    return usage_error(
        "--budget {}: counts weights of 16 or 32 bits alone, no codes. Use --budget sparsity=, or "
        "prune first and `lacuna convert --quantize` then.",
        options.budget->text());
  if (options.budget->kind == Budget::Kind::kBytes && store != io::Store::kCompact)
    return usage_error("--budget bytes: is that of the compact store. Leave --store out.");
  if (options.budget->kind == Budget::Kind::kMilliseconds && !options.milliseconds)
    return usage_error("--budget tpot: no times were measured here. Run `lacuna tune` first.");
  return {};
}

Result<Target> target_of(const io::Checkpoint& checkpoint, const std::vector<LayerShare>& shares,
                         const AllocationOptions& options, const Request& request) {
  if (!options.budget) return sparsity_target(shares, request.sparsity);
  switch (options.budget->kind) {
    case Budget::Kind::kBytes:
      return bytes_target(checkpoint, shares, *options.budget, request.pattern);
    case Budget::Kind::kMilliseconds:
      return time_target(shares, options);
    case Budget::Kind::kSparsity:
      break;
  }
  return sparsity_target(shares, options.budget->amount);
}

double reached(const Budget& budget, const fs::path& out, double sparsity) {
  if (budget.kind == Budget::Kind::kSparsity) return sparsity;
  double bytes = 0;
  for (const auto& entry : fs::directory_iterator(out))
    if (entry.path().extension() == ".safetensors") bytes += static_cast<double>(entry.file_size());
  return bytes;
}

}  // namespace lacuna::prune

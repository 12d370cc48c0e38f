#include "lacuna/prune/selection.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

using format::Pattern;
using format::PatternKind;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// [rows, columns] -> multiples of r and c, filled up with `value`
at::Tensor padded(const at::Tensor& matrix, int64_t r, int64_t c, double value) {
  const int64_t below = ceil_div(matrix.size(0), r) * r - matrix.size(0);
  const int64_t right = ceil_div(matrix.size(1), c) * c - matrix.size(1);
  return below + right == 0 ? matrix : at::constant_pad_nd(matrix, {0, right, 0, below}, value);
}

/// Extents of the blocks along one side: the last one may be smaller.
at::Tensor block_extents(int64_t whole, int64_t block) {
  const at::Tensor extents = at::full({ceil_div(whole, block)}, block, at::kLong);
  extents[-1] = whole - (extents.size(0) - 1) * block;
  return extents;
}

/// Blocks that compete: what each of them is worth a weight, and how many weights it has.
struct Blocks {
  at::Tensor scores, sizes;  // [block rows, block columns]

  /// A block at the edge has fewer weights, so a sum would have it dropped first.
  Blocks(const at::Tensor& weights, const Pattern& pattern) {
    const int64_t r = pattern.block_rows, c = pattern.block_columns;
    const at::Tensor whole = padded(weights, r, c, 0).contiguous();
    sizes = (block_extents(weights.size(0), r).unsqueeze(1) * block_extents(weights.size(1), c))
                .to(weights.device());
    scores = whole.view({whole.size(0) / r, r, whole.size(1) / c, c}).sum({1, 3}).div_(sizes);
  }
};

/// Drops blocks in ascending order of their scores until the share's count of weights is met as
/// nearly as whole blocks can. @shape scores, sizes [...] -> bool [...]
at::Tensor keep_best_blocks(const at::Tensor& scores, const at::Tensor& sizes, Share& share) {
  const at::Tensor flat = sizes.reshape({-1});
  const double due = share.due(flat.sum().item<int64_t>());
  // Stable, so that of equal scores the last goes first.
  const at::Tensor order = std::get<1>(at::sort(scores.reshape({-1}), /*stable=*/true, /*dim=*/0,
                                                /*descending=*/true))
                               .flip(0);
  const at::Tensor gone = flat.index_select(0, order).cumsum(0);
  const at::Tensor counts = at::cat({at::zeros({1}, gone.options()), gone});
  const int64_t drop = (counts.to(at::kDouble) - due).abs_().argmin().item<int64_t>();
  at::Tensor mask = at::ones(flat.sizes(), flat.options().dtype(at::kBool));
  mask.index_fill_(0, order.narrow(0, 0, drop), false);
  share.dropped += counts[drop].item<int64_t>();
  return mask.view(scores.sizes());
}

/// The mask of blocks spread over their weights.
at::Tensor mask_of_weights(const at::Tensor& mask, const Pattern& pattern, const at::Tensor& like) {
  return mask.repeat_interleave(pattern.block_rows, 0)
      .narrow(0, 0, like.size(0))
      .repeat_interleave(pattern.block_columns, 1)
      .narrow(1, 0, like.size(1))
      .contiguous();
}

/// Drops `drop` units of a grid, all competing with all.
at::Tensor keep_all_but(const at::Tensor& units, int64_t drop) {
  return keep_largest(units.reshape({1, -1}), units.numel() - drop).view(units.sizes());
}

at::Tensor select_keep_of(const at::Tensor& scores, const Pattern& pattern) {
  const int64_t columns = scores.size(1);
  const at::Tensor whole = padded(scores, 1, pattern.of, -std::numeric_limits<double>::infinity());
  const at::Tensor groups = whole.reshape({-1, pattern.of});
  at::Tensor mask;
  if (groups.is_cpu()) {  // kthvalue spends ten times as long on millions of tiny rows
    mask = at::empty(groups.sizes(), at::kBool);
    const float* from = groups.const_data_ptr<float>();
    bool* to = mask.mutable_data_ptr<bool>();
    for (int64_t g = 0; g < groups.size(0); ++g, from += pattern.of, to += pattern.of)
      keep_largest(from, pattern.of, pattern.keep, to);
  } else {
    mask = keep_largest(groups, pattern.keep);
  }
  return mask.view(whole.sizes()).narrow(1, 0, columns).contiguous();
}

/// The value of the k-th smallest of each row. @shape [G, n] -> [G, 1]
at::Tensor kth_smallest(const at::Tensor& scores, int64_t k) {
  // One row of millions: a GPU gives kthvalue a single block of threads, topk all of them.
  if (!scores.is_cpu() && scores.size(0) == 1)
    return std::get<0>(at::topk(scores, k, 1, /*largest=*/false, /*sorted=*/false))
        .amax(1, /*keepdim=*/true);
  return std::get<0>(at::kthvalue(scores, k, 1, /*keepdim=*/true));
}

// Scores that a thread looks at in one go, and the bins that they are counted in.
constexpr int64_t kScoresAtOnce = int64_t{1} << 15;
constexpr int kBinShift = 20;
constexpr uint32_t kBins = uint32_t{1} << (32 - kBinShift);

/// Bits that are ordered as the numbers are; -0 is 0.
uint32_t ordered(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace

int64_t dropped_of(int64_t n, double sparsity) {
  return std::min(n, static_cast<int64_t>(std::floor(static_cast<double>(n) * sparsity + 1e-6)));
}

at::Tensor keep_largest(const at::Tensor& scores, int64_t keep) {
  const int64_t drop = scores.size(1) - keep;
  if (drop <= 0) return at::ones(scores.sizes(), scores.options().dtype(at::kBool));
  if (keep <= 0) return at::zeros(scores.sizes(), scores.options().dtype(at::kBool));
  const at::Tensor threshold = kth_smallest(scores, drop);
  const at::Tensor tied = scores == threshold;
  // Of those on the threshold as many are kept, from the left, as the larger ones leave room for.
  at::Tensor above = scores > threshold;
  const at::Tensor room = keep - above.sum(1, /*keepdim=*/true);
  return above.logical_or_(tied.logical_and(tied.cumsum(1, at::kInt) <= room));
}

void keep_largest(const float* scores, int n, int keep, bool* kept) {
  for (int i = 0; i < n; ++i) {
    int better = 0;
    for (int j = 0; j < i; ++j) better += scores[j] >= scores[i];
    for (int j = i + 1; j < n; ++j) better += scores[j] > scores[i];
    kept[i] = better < keep;
  }
}

at::Tensor keep_largest_of_all(const at::Tensor& given, int64_t keep, const Executor& executor) {
  const at::Tensor scores = given.contiguous();
  if (keep >= scores.numel()) return at::ones(scores.sizes(), at::kBool);
  at::Tensor mask = at::zeros(scores.sizes(), at::kBool);
  if (keep <= 0) return mask;
  const float* const from = scores.const_data_ptr<float>();
  bool* const to = mask.mutable_data_ptr<bool>();
  const int64_t chunks = ceil_div(scores.numel(), kScoresAtOnce);
  const auto extent = [&](int64_t chunk) {
    const int64_t begin = chunk * kScoresAtOnce;
    return std::pair{begin, std::min(begin + kScoresAtOnce, scores.numel())};
  };

  std::vector<std::array<int32_t, kBins>> counts(static_cast<size_t>(chunks));
  parallel_chunks(executor, chunks, [&](int64_t chunk) {
    auto& own = counts[static_cast<size_t>(chunk)];
    own.fill(0);
    const auto [begin, end] = extent(chunk);
    for (int64_t i = begin; i < end; ++i) ++own[ordered(from[i]) >> kBinShift];
  });
  uint32_t bin = kBins;
  int64_t above = 0, inside = 0;  // how many lie in higher bins, and in this one
  do {
    --bin;
    above += inside;
    inside = 0;
    for (const auto& own : counts) inside += own[bin];
  } while (above + inside < keep);

  std::vector<std::vector<uint32_t>> near(static_cast<size_t>(chunks));
  parallel_chunks(executor, chunks, [&](int64_t chunk) {
    auto& own = near[static_cast<size_t>(chunk)];
    own.reserve(static_cast<size_t>(counts[static_cast<size_t>(chunk)][bin]));
    const auto [begin, end] = extent(chunk);
    for (int64_t i = begin; i < end; ++i)
      if (const uint32_t key = ordered(from[i]); key >> kBinShift == bin) own.push_back(key);
  });
  std::vector<uint32_t> all;
  for (const auto& own : near) all.insert(all.end(), own.begin(), own.end());
  const auto last = all.begin() + (keep - above - 1);
  std::nth_element(all.begin(), last, all.end(), std::greater<>());
  const uint32_t threshold = *last;
  int64_t room = keep - above -
                 std::count_if(all.begin(), last, [&](uint32_t key) { return key > threshold; });
  std::vector<int64_t> rooms;  // for those on the threshold, from the left
  for (const auto& own : near) {
    rooms.push_back(room);
    room -= std::count(own.begin(), own.end(), threshold);
  }
  parallel_chunks(executor, chunks, [&](int64_t chunk) {
    const auto [begin, end] = extent(chunk);
    int64_t left = rooms[static_cast<size_t>(chunk)];
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t key = ordered(from[i]);
      to[i] = key > threshold || (key == threshold && left-- > 0);
    }
  });
  return mask;
}

int64_t stripe_columns(const Pattern& pattern) {
  const int64_t width = pattern.kind == PatternKind::kKeepOf  ? pattern.of
                        : pattern.kind == PatternKind::kBlock ? pattern.block_columns
                                                              : 1;
  return std::max<int64_t>(1, 128 / width) * width;
}

double Share::due(int64_t count) {
  seen += count;
  return static_cast<double>(seen) * sparsity - static_cast<double>(dropped);
}

at::Tensor select_stripe(const at::Tensor& scores, const Pattern& pattern, Share& share) {
  if (pattern.kind == PatternKind::kBlock) {
    const Blocks blocks(scores, pattern);
    return mask_of_weights(keep_best_blocks(blocks.scores, blocks.sizes, share), pattern, scores);
  }
  share.seen += scores.numel();
  const int64_t drop = dropped_of(share.seen, share.sparsity) - share.dropped;
  share.dropped += drop;
  return keep_all_but(scores, drop);
}

at::Tensor select(const at::Tensor& scores, const Pattern& pattern, double sparsity, Group group,
                  const Executor& executor) {
  if (pattern.kind == PatternKind::kKeepOf) return select_keep_of(scores, pattern);
  Share share{sparsity};
  if (group == Group::kLayer && pattern.kind == PatternKind::kUnstructured && scores.is_cpu()) {
    const int64_t all = scores.numel();
    return keep_largest_of_all(scores, all - dropped_of(all, sparsity), executor);
  }
  if (group == Group::kBlock128) {
    std::vector<at::Tensor> stripes;
    for (const at::Tensor& stripe : scores.split(stripe_columns(pattern), 1))
      stripes.push_back(select_stripe(stripe, pattern, share));
    return at::cat(stripes, 1);
  }
  if (group == Group::kLayer) return select_stripe(scores, pattern, share);
  if (pattern.kind != PatternKind::kBlock)
    return keep_largest(scores, scores.size(1) - dropped_of(scores.size(1), sparsity));
  const Blocks blocks(scores, pattern);
  std::vector<at::Tensor> rows;
  for (int64_t row = 0; row < blocks.scores.size(0); ++row)
    rows.push_back(keep_best_blocks(blocks.scores[row], blocks.sizes[row], share));
  return mask_of_weights(at::stack(rows), pattern, scores);
}

}  // namespace lacuna::prune

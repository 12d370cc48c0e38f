#include "lacuna/prune/statistics.h"

#include <algorithm>

#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

// Large enough for an efficient product, small enough that two threads share 384 columns fairly.
constexpr int64_t kTile = 256;

struct Tile {
  size_t sum;
  int64_t row, column;
};

at::Tensor squares(const at::Tensor& x) { return x.square().sum({0}, false, at::kDouble); }

}  // namespace

GramSum::GramSum(int64_t width, at::Device device)
    : gram_(at::zeros({width, width}, at::TensorOptions().device(device).dtype(at::kFloat))),
      square_sums_(at::zeros({width}, at::TensorOptions().device(device).dtype(at::kDouble))) {}

void GramSum::queue(const at::Tensor& inputs) {
  sequences_ += inputs.size(0);
  tokens_ += inputs.size(0) * inputs.size(1);
  queued_.push_back(inputs.reshape({-1, inputs.size(-1)}).to(at::kFloat));
}

void add_queued(std::vector<GramSum>& sums, const Executor& executor) {
  std::vector<Tile> tiles;
  for (size_t i = 0; i < sums.size(); ++i) {
    GramSum& sum = sums[i];
    if (!sum.gram_.is_cpu()) {
      for (const at::Tensor& x : sum.queued_) {
        sum.gram_.addmm_(x.t(), x);
        sum.square_sums_.add_(squares(x));
      }
      continue;
    }
    for (int64_t row = 0; row < sum.width(); row += kTile)
      for (int64_t column = row; column < sum.width(); column += kTile)
        tiles.push_back({i, row, column});
  }
  parallel_chunks(executor, static_cast<int64_t>(tiles.size()), [&](int64_t chunk) {
    const auto [i, row, column] = tiles[chunk];
    const GramSum& sum = sums[i];
    const int64_t down = std::min(kTile, sum.width() - row);
    const int64_t across = std::min(kTile, sum.width() - column);
    at::Tensor tile = sum.gram_.narrow(0, row, down).narrow(1, column, across);
    for (const at::Tensor& x : sum.queued_) {
      const at::Tensor left = x.narrow(1, row, down);
      tile.addmm_(left.t(), x.narrow(1, column, across));
      if (row == column) sum.square_sums_.narrow(0, row, down).add_(squares(left));
    }
  });
  for (GramSum& sum : sums) sum.queued_.clear();
}

InputStatistics GramSum::take() {
  InputStatistics statistics;
  statistics.sequences = sequences_;
  statistics.tokens = tokens_;
  if (gram_.is_cpu()) {  // mirror in place, a strip at a time
    for (int64_t row = 0; row < width(); row += kTile) {
      const int64_t down = std::min(kTile, width() - row);
      at::Tensor corner = gram_.narrow(0, row, down).narrow(1, row, down);
      corner.copy_(corner.triu() + corner.triu(1).t());
      const int64_t right = width() - row - down;
      if (right > 0)
        gram_.narrow(0, row + down, right)
            .narrow(1, row, down)
            .copy_(gram_.narrow(0, row, down).narrow(1, row + down, right).t());
    }
  }
  statistics.gram = std::move(gram_);
  statistics.square_sums = square_sums_.to(at::kFloat);
  return statistics;
}

}  // namespace lacuna::prune

#include "lacuna/prune/statistics.h"

#include <algorithm>

#include "lacuna/prune/chunks.h"
#include "lacuna/prune/rounded_products.h"

namespace lacuna::prune {
namespace {

// Large enough for an efficient product, small enough that two threads share 384 columns fairly.
constexpr int64_t kTile = 256;
// Rows of a Gram matrix that a GPU multiplies at a time, from the diagonal to the right.
constexpr int64_t kStrip = 2048;

struct Tile {
  size_t sum;
  int64_t row, column;
};

at::Tensor squares(const at::Tensor& x) {
  return x.to(at::kFloat).square().sum({0}, false, at::kDouble);
}

/// Adds those of x [tokens, width] on a CPU, rows of any distance apart, to `squares` and `sums`:
/// one walk over x, where torch's three take as long as the products do.
void add_sums(const at::Tensor& x, double* squares, double* sums) {
  const float* row = x.const_data_ptr<float>();
  const int64_t width = x.size(1), stride = x.stride(0);
  for (int64_t token = 0; token < x.size(0); ++token, row += stride)
    for (int64_t i = 0; i < width; ++i) {
      squares[i] += static_cast<double>(row[i] * row[i]);
      sums[i] += static_cast<double>(row[i]);
    }
}

/// On a GPU inputs stay in half precision: products of two of them are exact in float32, and its
/// matrix units take them as they are.
bool stays_half(const at::Tensor& x) {
  return !x.is_cpu() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf);
}

/// What x adds on and above the diagonal, in strips of rows.
void add_on_gpu(const at::Tensor& gram, const at::Tensor& x) {
  const int64_t width = gram.size(0);
  for (int64_t row = 0; row < width; row += kStrip) {
    const int64_t down = std::min(kStrip, width - row), right = width - row;
    at::Tensor strip = gram.narrow(0, row, down).narrow(1, row, right);
    const at::Tensor left = x.narrow(1, row, down).t(), all = x.narrow(1, row, right);
    if (stays_half(x))
      at::addmm_out(strip, strip, left, all, at::kFloat);
    else
      strip.addmm_(left, all);
  }
}

}  // namespace

GramSum::GramSum(int64_t width, at::Device device)
    : gram_(at::zeros({width, width}, at::TensorOptions().device(device).dtype(at::kFloat))),
      square_sums_(at::zeros({width}, at::TensorOptions().device(device).dtype(at::kDouble))),
      sums_(at::zeros_like(square_sums_)) {}

void GramSum::queue(const at::Tensor& inputs) {
  sequences_ += inputs.size(0);
  tokens_ += inputs.size(0) * inputs.size(1);
  all_bfloat16_ &= inputs.scalar_type() == at::kBFloat16;
  const at::Tensor flat = inputs.reshape({-1, inputs.size(-1)});
  queued_.push_back(stays_half(flat) ? flat : flat.to(at::kFloat).contiguous());
}

void add_queued(std::vector<GramSum>& sums, const Executor& executor) {
  std::vector<Tile> tiles;
  bool exact = true;  // when rounded to bfloat16
  for (size_t i = 0; i < sums.size(); ++i) {
    GramSum& sum = sums[i];
    exact &= sum.all_bfloat16_;
    if (!sum.gram_.is_cpu()) {
      for (const at::Tensor& x : sum.queued_) {
        add_on_gpu(sum.gram_, x);
        sum.square_sums_.add_(squares(x));
        sum.sums_.add_(x.sum({0}, false, at::kDouble));
      }
      continue;
    }
    for (int64_t row = 0; row < sum.width(); row += kTile)
      for (int64_t column = row; column < sum.width(); column += kTile)
        tiles.push_back({i, row, column});
  }
  const RoundedProducts rounded(exact && !tiles.empty(), "medium");
  parallel_chunks(executor, static_cast<int64_t>(tiles.size()), [&](int64_t chunk) {
    const auto [i, row, column] = tiles[chunk];
    const GramSum& sum = sums[i];
    const int64_t down = std::min(kTile, sum.width() - row);
    const int64_t across = std::min(kTile, sum.width() - column);
    at::Tensor tile = sum.gram_.narrow(0, row, down).narrow(1, column, across);
    for (const at::Tensor& x : sum.queued_) {
      const at::Tensor left = x.narrow(1, row, down);
      tile.addmm_(left.t(), x.narrow(1, column, across));
      if (row != column) continue;
      add_sums(left, sum.square_sums_.mutable_data_ptr<double>() + row,
               sum.sums_.mutable_data_ptr<double>() + row);
    }
  });
  for (GramSum& sum : sums) {
    sum.queued_.clear();
    sum.all_bfloat16_ = true;
  }
}

InputStatistics GramSum::take() {
  InputStatistics statistics;
  statistics.sequences = sequences_;
  statistics.tokens = tokens_;
  const int64_t step = gram_.is_cpu() ? kTile : kStrip;
  for (int64_t row = 0; row < width(); row += step) {  // mirror in place, a strip at a time
    const int64_t down = std::min(step, width() - row);
    at::Tensor corner = gram_.narrow(0, row, down).narrow(1, row, down);
    corner.copy_(corner.triu() + corner.triu(1).t());
    const int64_t right = width() - row - down;
    if (right > 0)
      gram_.narrow(0, row + down, right)
          .narrow(1, row, down)
          .copy_(gram_.narrow(0, row, down).narrow(1, row + down, right).t());
  }
  statistics.gram = std::move(gram_);
  statistics.square_sums = square_sums_.to(at::kFloat);
  statistics.sums = sums_.to(at::kFloat);
  return statistics;
}

}  // namespace lacuna::prune

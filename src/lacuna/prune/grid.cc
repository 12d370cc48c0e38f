#include "lacuna/prune/grid.h"

#include <algorithm>

#include "lacuna/format/quantize.h"
#include "lacuna/format/scale_chooser.h"
#include "lacuna/prune/chunks.h"

namespace lacuna::prune {

Grid::Grid(const Request& request, const at::Tensor& weight)
    : quantization_(request.quantization),
      values_(request.values),
      rows_(weight.size(0)),
      columns_(weight.size(1)),
      width_(quantization_.group > 0 ? quantization_.group : std::max<int64_t>(columns_, 1)),
      groups_(quantization_.groups(columns_)),
      scales_(static_cast<size_t>(rows_ * groups_), {quantization_.code, 0, 0}) {}

void Grid::choose(int64_t group, const at::Tensor& weight, const at::Tensor& mask,
                  const at::Tensor& importance, const Executor& executor) {
  constexpr int64_t kRowsAtOnce = 64;
  const at::Tensor values = weight.contiguous(), kept = mask.contiguous();
  const at::Tensor weights = importance.contiguous();
  const float* w = values.const_data_ptr<float>();
  const bool* k = kept.const_data_ptr<bool>();
  const float* cost = weights.const_data_ptr<float>();
  const int64_t width = values.size(1);
  const format::ScaleChooser chooser(quantization_, values_);
  parallel_chunks(executor, (rows_ + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t chunk) {
    std::vector<float> chosen, costs;
    for (int64_t row = chunk * kRowsAtOnce; row < std::min(rows_, (chunk + 1) * kRowsAtOnce);
         ++row) {
      chosen.clear(), costs.clear();
      for (int64_t i = row * width; i < (row + 1) * width; ++i)
        if (k[i]) chosen.push_back(w[i]), costs.push_back(cost[i - row * width]);
      scales_[static_cast<size_t>(row * groups_ + group)] = chooser.choose(chosen, costs);
    }
  });
}

at::Tensor Grid::nearest(int64_t column, const at::Tensor& w) const {
  const at::Tensor values = w.contiguous(), out = at::empty_like(values);
  for (int64_t row = 0; row < rows_; ++row)
    out.mutable_data_ptr<float>()[row] = nearest(row, column, values.const_data_ptr<float>()[row]);
  return out;
}

namespace {

/// A tensor's content, on the CPU, as ours.
Tensor held(const at::Tensor& values, DType dtype) {
  const auto owner = std::make_shared<at::Tensor>(values.cpu().contiguous());
  const auto* data = static_cast<const std::byte*>(owner->const_data_ptr());
  return {dtype, owner->sizes().vec(), Bytes(owner, data, owner->nbytes())};
}

}  // namespace

Result<format::CompactMatrix> coded_matrix(const Pruned& pruned, const format::Pattern& pattern,
                                           DType values, const Executor& executor) {
  if (pattern.kind == format::PatternKind::kDense) {  // every weight has a code
    const format::CompactMatrix all{.pattern = pattern,
                                    .rows = pruned.weight.size(0),
                                    .columns = pruned.weight.size(1),
                                    .values_dtype = values};
    return format::encode(all, pruned.grid->quantization(), held(pruned.weight, DType::kF32),
                          pruned.grid->scales(), executor);
  }
  // Ones under the mask: compressing keeps exactly those.
  LACUNA_TRY(format::CompactMatrix mask,
             format::compress(held(pruned.mask.to(at::kHalf), DType::kF16), pattern));
  mask.values_dtype = values;
  return format::encode(mask, pruned.grid->quantization(), held(pruned.weight, DType::kF32),
                        pruned.grid->scales(), executor);
}

}  // namespace lacuna::prune

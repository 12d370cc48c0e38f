#include "lacuna/kernels/linear_coded/linear_coded.h"

#include <algorithm>

#include "lacuna/format/element.h"
#include "lacuna/kernels/linear_coded/cpu.h"
#include "lacuna/kernels/tiled.h"

namespace lacuna::kernels::linear_coded {
namespace {

constexpr int64_t kAlignment = 64;

/// A line more than the columns need, for the reason that row_product.cc gives.
int64_t x_stride_bytes(int64_t columns) {
  return format::ceil_div(columns, kChunk) * kChunk + kAlignment;
}

}  // namespace

size_t workspace_bytes(const Problem& problem) {
  const auto of_tiles = static_cast<size_t>(
      problem.tokens * (x_stride_bytes(problem.inputs) + static_cast<int64_t>(sizeof(float))) +
      kAlignment);
  return std::max(of_tiles, tiled::coded_workspace_bytes(problem.tokens, problem.inputs));
}

CodedPlan plan_for(const CodedCandidate& candidate, const Problem& problem) {
  return {problem, &candidate, workspace_bytes(problem)};
}

Result<CodedPlan> plan(const Problem& problem, const Device& device) {
  LACUNA_TRY(const CodedCandidate* candidate, candidates().choose(problem, device));
  return plan_for(*candidate, problem);
}

std::vector<Explanation> explain(const Problem& problem, const Device& device) {
  return candidates().explain(problem, device);
}

void run(const CodedPlan& plan, const Stream& stream, const format::RowProduct& product,
         void* workspace, const Executor& executor) {
  if (plan.candidate->product != nullptr)
    return plan.candidate->product(stream, product, workspace, executor);
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  auto* x = static_cast<uint8_t*>(workspace) + (-address & (kAlignment - 1));
  const int64_t stride = x_stride_bytes(stream.columns()), tokens = product.tokens;
  auto* x_scales = reinterpret_cast<float*>(x + tokens * stride);
  const auto width = static_cast<int64_t>(size_bytes(product.dtype));
  for (int64_t t = 0; t < tokens; ++t) {
    uint8_t* row = x + t * stride;
    x_scales[t] = quantize_token(
        product.dtype, static_cast<const std::byte*>(product.x) + t * product.x_stride * width,
        stream.columns(), reinterpret_cast<int8_t*>(row));
    for (int64_t k = 0; k < stream.columns(); ++k) row[k] ^= 0x80;  // + 128
    std::fill(row + stream.columns(), row + stride, uint8_t{0x80});
  }
  // As few passes over a tile as there can be, with equally many tokens.
  const int64_t passes = format::ceil_div(tokens, kTokensAtOnce);
  const int64_t at_once = format::ceil_div(tokens, passes);
  const kernels::stream::Tasks tasks(stream.tiles(), executor.threads);
  const auto first_tile = [&](int64_t task) {
    return tasks.first_tile(task, [&](int64_t tile) { return stream.bytes_before(tile); });
  };
  executor.parallel_for(tasks.count(), [&](int64_t task) {
    const int64_t end = first_tile(task + 1);
    float sums[kTokensAtOnce * kTileRows];
    for (int64_t tile = first_tile(task); tile < end; ++tile) {
      const int64_t top = tile * kTileRows;
      const int64_t rows = std::min(kTileRows, stream.rows() - top);
      for (int64_t first = 0; first < tokens; first += at_once) {
        const int64_t count = std::min(at_once, tokens - first);
        plan.candidate->kernel(stream, tile, x + first * stride, stride, count, sums);
        for (int64_t t = 0; t < count; ++t)
          for (int64_t r = 0; r < rows; ++r) {
            const float scale = stream.scale_sets() ? 1.0f : stream.row_scale(tile, r);
            float sum = sums[t * kTileRows + r] * scale * x_scales[first + t];
            if (product.bias) sum += format::read_float(product.bias, product.dtype, top + r);
            format::write_float(product.y, product.dtype, (first + t) * product.y_stride + top + r,
                                sum);
          }
      }
    }
  });
}

}  // namespace lacuna::kernels::linear_coded

#include "lacuna/prune/column_loop.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <vector>

#include "lacuna/core/gpu.h"
#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/prune/chunks.h"
#include "lacuna/prune/grid.h"
#include "lacuna/prune/selection.h"

namespace lacuna::prune {
namespace {

// Rows that one chunk works on: enough for an efficient product, few enough to share out.
constexpr int64_t kRowsAtOnce = 64;
// Columns that the GPU kernel takes; wider stripes have their mask given and can be cut.
constexpr int64_t kGpuColumns = 128;

/// The stripe's own corner of U, small enough for the second-level cache.
struct Corner {
  std::vector<float> upper, diagonal;
  int64_t width;

  explicit Corner(const Stripe& stripe) : width(stripe.width) {
    const at::Tensor corner =
        stripe.upper.narrow(0, stripe.first, width).narrow(1, stripe.first, width).contiguous();
    const float* data = corner.const_data_ptr<float>();
    upper.assign(data, data + width * width);
    for (int64_t j = 0; j < width; ++j) diagonal.push_back(upper[j * width + j]);
  }
};

void choose_group(const float* weight, const float* diagonal, int n, int keep, bool* kept) {
  float scores[64];
  for (int i = 0; i < n; ++i) {
    const float scaled = weight[i] / diagonal[i];
    scores[i] = scaled * scaled;
  }
  keep_largest(scores, n, keep, kept);
}

/// One row inside the stripe; `error` receives e of every column.
void one_row(const Stripe& stripe, const Corner& corner, int64_t index, float* __restrict weight,
             bool* kept, float* error) {
  const int64_t width = corner.width;
  for (int64_t j = 0; j < width; ++j) {
    if (stripe.of != 0 && j % stripe.of == 0)
      choose_group(weight + j, corner.diagonal.data() + j,
                   static_cast<int>(std::min<int64_t>(stripe.of, width - j)), stripe.keep,
                   kept + j);
    if (kept[j] && stripe.grid == nullptr) {
      error[j] = 0;
      continue;
    }
    const float becomes = kept[j] ? stripe.grid->nearest(index, stripe.first + j, weight[j]) : 0.0F;
    const float e = error[j] = (weight[j] - becomes) / corner.diagonal[j];
    const float* __restrict row = corner.upper.data() + j * width;
    for (int64_t k = j + 1; k < width; ++k) weight[k] -= e * row[k];
    weight[j] = becomes;
  }
}

/// Columns past the stripe lose error * U.
void update_rest(const Stripe& stripe, const at::Tensor& weight, const at::Tensor& error) {
  const int64_t next = stripe.first + stripe.width, rest = weight.size(1) - next;
  if (rest == 0) return;
  weight.narrow(1, next, rest)
      .addmm_(error, stripe.upper.narrow(0, stripe.first, stripe.width).narrow(1, next, rest), 1,
              -1);
}

/// Whether column_loop_gpu() can run: the library is there, and the GPU is of its kind.
bool gpu_kernel_runs() {
  return kernels::gpu_library().ok() && !gpus().empty() && gpus().front().major >= 8;
}

/// torch's current stream.
kernels::GpuStream stream_of(at::Device device) {
  const auto* torch = c10::impl::getDeviceGuardImpl(device.type());
  return torch->getStreamNativeHandle(torch->getStream(device));
}

}  // namespace

void column_loop_rows(const Stripe& stripe, const Executor& executor) {
  const int64_t rows = stripe.weight.size(0), columns = stripe.weight.size(1);
  const Corner corner(stripe);
  float* weight = stripe.weight.mutable_data_ptr<float>() + stripe.first;
  bool* kept = stripe.mask.mutable_data_ptr<bool>() + stripe.first;
  parallel_chunks(executor, (rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t chunk) {
    const int64_t top = chunk * kRowsAtOnce, count = std::min(kRowsAtOnce, rows - top);
    const at::Tensor error = at::empty({count, stripe.width}, stripe.weight.options());
    float* e = error.mutable_data_ptr<float>();
    for (int64_t r = 0; r < count; ++r)
      one_row(stripe, corner, top + r, weight + (top + r) * columns, kept + (top + r) * columns,
              e + r * stripe.width);
    update_rest(stripe, stripe.weight.narrow(0, top, count), error);
  });
}

void column_loop_torch(const Stripe& stripe) {
  const at::Tensor weight = stripe.weight.narrow(1, stripe.first, stripe.width);
  const at::Tensor mask = stripe.mask.narrow(1, stripe.first, stripe.width);
  const at::Tensor corner =
      stripe.upper.narrow(0, stripe.first, stripe.width).narrow(1, stripe.first, stripe.width);
  const at::Tensor diagonal = corner.diagonal();
  const at::Tensor error = at::zeros_like(weight, at::MemoryFormat::Contiguous);
  for (int64_t j = 0; j < stripe.width; ++j) {
    if (stripe.of != 0 && j % stripe.of == 0) {
      const int64_t n = std::min<int64_t>(stripe.of, stripe.width - j);
      const at::Tensor scores = (weight.narrow(1, j, n) / diagonal.narrow(0, j, n)).square();
      mask.narrow(1, j, n).copy_(keep_largest(scores, std::min<int64_t>(stripe.keep, n)));
    }
    const at::Tensor w = weight.select(1, j);
    const at::Tensor e = (w / diagonal[j]).masked_fill_(mask.select(1, j), 0);
    error.select(1, j).copy_(e);
    const int64_t right = stripe.width - j - 1;
    if (right > 0)
      weight.narrow(1, j + 1, right).addr_(e, corner.select(0, j).narrow(0, j + 1, right), 1, -1);
    w.mul_(mask.select(1, j));
  }
  update_rest(stripe, stripe.weight, error);
}

void column_loop_gpu(const Stripe& stripe) {
  for (int64_t done = 0; done < stripe.width; done += kGpuColumns) {
    Stripe part = stripe;
    part.first += done;
    part.width = std::min(kGpuColumns, stripe.width - done);
    const at::Tensor error =
        at::empty({stripe.weight.size(0), part.width}, stripe.weight.options());
    const kernels::GpuColumnLoop loop{
        .rows = part.weight.size(0),
        .width = static_cast<int32_t>(part.width),
        .keep = part.keep,
        .of = part.of,
        .weight = part.weight.mutable_data_ptr<float>() + part.first,
        .weight_stride = part.weight.stride(0),
        .kept = reinterpret_cast<unsigned char*>(part.mask.mutable_data_ptr<bool>()) + part.first,
        .kept_stride = part.mask.stride(0),
        .upper = part.upper.const_data_ptr<float>() + part.first * (part.upper.stride(0) + 1),
        .upper_stride = part.upper.stride(0),
        .error = error.mutable_data_ptr<float>()};
    const kernels::GpuTable& library = **kernels::gpu_library();
    const int failure = library.column_loop(&loop, stream_of(part.weight.device()));
    TORCH_CHECK(failure == 0, "column loop: ", library.error_text(failure));
    update_rest(part, part.weight, error);
  }
}

void column_loop(const Stripe& stripe, const Executor& executor) {
  if (stripe.weight.is_cpu()) return column_loop_rows(stripe, executor);
  if (gpu_kernel_runs()) return column_loop_gpu(stripe);
  column_loop_torch(stripe);
}

}  // namespace lacuna::prune

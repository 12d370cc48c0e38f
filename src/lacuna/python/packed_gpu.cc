// A weight packed for a kernel of liblacuna_cuda.so: the kernel's own bytes, and its layout among
// the integers of the form.
#include <c10/core/DeviceGuard.h>

#include <cstring>
#include <string>

#include "lacuna/kernels/linear.h"
#include "lacuna/model/torch.h"
#include "lacuna/python/form.h"

namespace lacuna::python {
namespace {

using kernels::GpuLayout;
using kernels::GpuLinearKernel;

constexpr size_t kLayoutInts = sizeof(GpuLayout::storage) / sizeof(int64_t);
constexpr size_t kRest = 3 + kLayoutInts;  // interface, kernel, packed bytes, layout

/// A number for a kernel's name that doesn't depend on its place in the table (FNV-1a).
int64_t number_of(const GpuLinearKernel& kernel) {
  uint64_t hash = 14695981039346656037ull;
  for (const char c : std::string(kernel.operation) + ":" + kernel.name)
    hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return static_cast<int64_t>(hash >> 1);
}

const GpuLinearKernel& kernel_of(int64_t number) {
  const auto& library = kernels::gpu_library();
  TORCH_CHECK(library.ok(), library.error().message);
  for (int32_t i = 0; i < (*library)->linear_count; ++i)
    if (number_of(*(*library)->linear[i]) == number) return *(*library)->linear[i];
  TORCH_CHECK(false, "form: names a kernel that liblacuna_cuda.so doesn't have. Pack again.");
}

void check(int error, const GpuLinearKernel& kernel, const char* step) {
  TORCH_CHECK(error == 0, kernel.operation, ":", kernel.name, " can't ", step, ": ",
              (*kernels::gpu_library())->error_text(error));
}

struct Opened {
  const GpuLinearKernel* kernel;
  GpuLayout layout;
};

Opened open(const at::Tensor& packed, const Form& form) {
  TORCH_CHECK(form.packed_for == PackedFor::kGpu && form.rest.size() == kRest,
              "packed: the weight is packed for a CPU (need one packed from a CUDA tensor).");
  TORCH_CHECK(form.rest[0] == kernels::kGpuAbiVersion,
              "packed: by a library of another interface. Pack the weight again.");
  Opened opened{&kernel_of(form.rest[1]), {}};
  opened.layout.packed_bytes = static_cast<size_t>(form.rest[2]);
  std::memcpy(opened.layout.storage, form.rest.data() + 3, sizeof(opened.layout.storage));
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                  packed.numel() == form.rest[2] &&
                  reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 128 == 0,
              "packed: not what lacuna::pack made.");
  return opened;
}

at::Tensor device_bytes(size_t count, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(count)}, like.options().dtype(at::kByte));
}

std::string refusals(const kernels::LinearOperation& operation, const kernels::Problem& problem) {
  std::string all;
  for (const auto& line : operation.gpu_candidates().explain(problem, kernels::Device::this_gpu()))
    if (!line.support) all += " " + line.candidate + ": " + line.support.refusal() + ".";
  return all;
}

}  // namespace

Packed pack_gpu(const at::Tensor& weight, const format::Pattern& pattern) {
  const c10::DeviceGuard guard(weight.device());
  Packed packed;
  packed.form = {.rows = weight.size(0),
                 .columns = weight.size(1),
                 .dtype = model::dtype_of(weight.scalar_type()),
                 .pattern = pattern,
                 .packed_for = PackedFor::kGpu};
  packed.form.sparsity = 1.0 - static_cast<double>(weight.count_nonzero().item<int64_t>()) /
                                   static_cast<double>(weight.numel());
  const kernels::Problem problem = packed.form.problem(1, weight.scalar_type());
  const auto& operation = *kernels::linear_operation(pattern.kind);
  const auto chosen = kernels::choose_gpu_kernel(operation, problem, kernels::Device::this_gpu());
  TORCH_CHECK(chosen.ok(), chosen.error().message);
  TORCH_CHECK(*chosen != nullptr, "lacuna::pack: no GPU kernel takes ", problem.text(), ".",
              refusals(operation, problem));
  const GpuLinearKernel& kernel = **chosen;

  const at::Tensor dense = weight.contiguous();
  void* const stream = model::gpu_stream(weight.device());
  const at::Tensor scratch =
      device_bytes(kernel.scratch_bytes(weight.size(0), weight.size(1)), weight);
  GpuLayout layout = {};
  check(kernel.measure(dense.const_data_ptr(), weight.size(0), weight.size(1),
                       scratch.mutable_data_ptr(), &layout, stream),
        kernel, "measure");
  packed.bytes = device_bytes(layout.packed_bytes, weight);
  const at::Tensor report = device_bytes(sizeof(kernels::GpuPackReport), weight).zero_();
  check(kernel.pack(&layout, dense.const_data_ptr(), scratch.const_data_ptr(),
                    packed.bytes.mutable_data_ptr(),
                    static_cast<kernels::GpuPackReport*>(report.mutable_data_ptr()), stream),
        kernel, "pack");
  const at::Tensor copied = report.cpu();
  TORCH_CHECK(static_cast<const kernels::GpuPackReport*>(copied.const_data_ptr())->violations == 0,
              "lacuna::pack: the weight breaks ", pattern.text(), ". Prune it first.");

  packed.form.rest = {kernels::kGpuAbiVersion, number_of(kernel),
                      static_cast<int64_t>(layout.packed_bytes)};
  packed.form.rest.resize(kRest);
  std::memcpy(packed.form.rest.data() + 3, layout.storage, sizeof(layout.storage));
  return packed;
}

at::Tensor unpack_gpu(const at::Tensor& packed, const Form& form) {
  const c10::DeviceGuard guard(packed.device());
  const Opened weight = open(packed, form);
  at::Tensor dense =
      at::empty({form.rows, form.columns}, packed.options().dtype(model::scalar_type(form.dtype)));
  check(weight.kernel->unpack(&weight.layout, packed.const_data_ptr(), dense.mutable_data_ptr(),
                              model::gpu_stream(packed.device())),
        *weight.kernel, "unpack");
  return dense;
}

at::Tensor linear_gpu(const at::Tensor& x, const at::Tensor& packed, const Form& form,
                      const std::optional<at::Tensor>& bias) {
  const c10::DeviceGuard guard(packed.device());
  const Opened weight = open(packed, form);
  const GpuLinearKernel& kernel = *weight.kernel;
  const int64_t tokens = x.numel() / form.columns;
  const int64_t most = kernel.max_tokens(&weight.layout), many = kernel.many_tokens(&weight.layout);
  if (x.scalar_type() != model::scalar_type(form.dtype) ||
      (tokens > most && (many == 0 || tokens < many)))
    return at::linear(x, unpack_gpu(packed, form).to(x.scalar_type()), bias);
  at::Tensor aligned = x.contiguous();
  if (reinterpret_cast<uintptr_t>(aligned.const_data_ptr()) % 16 != 0) aligned = aligned.clone();
  kernels::GpuPlan plan;
  check(kernel.plan(&weight.layout, tokens, &plan), kernel, "plan");
  const at::Tensor workspace = device_bytes(kernel.workspace_bytes(&weight.layout, &plan), x);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = form.rows;
  at::Tensor y = at::empty(shape, x.options());
  check(kernel.run(&weight.layout, &plan, packed.const_data_ptr(), aligned.const_data_ptr(),
                   y.mutable_data_ptr(), workspace.mutable_data_ptr(), /*overlap_previous=*/0,
                   model::gpu_stream(x.device())),
        kernel, "run");
  return bias ? y.add_(*bias) : y;
}

}  // namespace lacuna::python

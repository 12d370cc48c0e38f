// A weight packed for the CPU: the parts of the compact matrix (format/compact.h) one behind the
// other, each at a multiple of 64 bytes, then for bitmaps the values before each row. So kernels
// walk the tensor's own bytes, and a call costs no preparation.
#include <algorithm>
#include <array>
#include <cstring>

#include "lacuna/format/compact.h"
#include "lacuna/format/rows.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/model/few_tokens.h"
#include "lacuna/model/scratch.h"
#include "lacuna/model/torch.h"
#include "lacuna/python/form.h"

namespace lacuna::python {
namespace {

using format::CompactMatrix;
using format::PatternKind;

constexpr int64_t kAlignment = 64;
constexpr size_t kParts = 6;  // values, bitmap, offsets, block columns, block offsets, row values

/// Ends of a part in the packed bytes, with room for a vector load that begins inside.
int64_t next_part(int64_t end) {
  return (end + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
}

std::array<Bytes*, kParts - 1> parts_of(CompactMatrix& matrix) {
  return {&matrix.values, &matrix.bitmap, &matrix.offsets, &matrix.block_columns,
          &matrix.block_offsets};
}

/// A packed weight as kernels and the format see it; it owns nothing.
struct Opened {
  CompactMatrix matrix;
  format::RowsView rows;
};

Opened open(const at::Tensor& packed, const Form& form) {
  TORCH_CHECK(form.packed_for == PackedFor::kCpu,
              "packed: the weight is packed for a GPU (need one packed from a CPU tensor).");
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.is_contiguous() &&
                  form.rest.size() == kParts,
              "packed: not what lacuna::pack made.");
  const auto* data = reinterpret_cast<const std::byte*>(packed.const_data_ptr<uint8_t>());
  TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % alignof(int64_t) == 0,
              "packed: must be aligned to 8 bytes.");
  Opened opened;
  CompactMatrix& m = opened.matrix;
  m.pattern = form.pattern;
  m.rows = form.rows;
  m.columns = form.columns;
  m.values_dtype = form.dtype;
  std::array<Bytes, kParts> parts;
  int64_t at = 0;
  for (size_t i = 0; i < kParts; ++i) {
    const int64_t size = form.rest[i];
    TORCH_CHECK(size >= 0 && size <= packed.numel() && at <= packed.numel() - size,
                "packed: shorter than its form says.");
    parts[i] = Bytes(nullptr, data + at, static_cast<size_t>(size));
    if (size > 0) at = next_part(at + size);
  }
  TORCH_CHECK(at <= packed.numel(), "packed: shorter than its form says.");
  for (size_t i = 0; i + 1 < kParts; ++i) *parts_of(m)[i] = parts[i];

  format::RowsView& rows = opened.rows;
  rows = {.dtype = m.values_dtype,
          .rows = m.rows,
          .columns = m.columns,
          .values = m.values.data(),
          .values_per_row = m.values_per_row(),
          .pattern = m.pattern,
          .tail_row = m.rows};  // there is room behind the values
  const auto holds = [](const Bytes& part, int64_t bytes) {
    return static_cast<int64_t>(part.size()) == bytes;
  };
  bool sound = true;
  if (form.pattern.kind == PatternKind::kBlock) {
    rows.block_columns = m.block_columns.data();
    rows.block_offsets = m.block_offsets.data();
    const int64_t block_rows = (m.rows + form.pattern.block_rows - 1) / form.pattern.block_rows;
    sound =
        holds(m.block_offsets, (block_rows + 1) * 8) && m.block_columns.size() % 4 == 0 &&
        holds(m.values, static_cast<int64_t>(m.block_columns.size() / 4) * form.pattern.block_rows *
                            form.pattern.block_columns * rows.width());
  } else {
    rows.bitmap = m.bitmap.as<uint8_t>();
    rows.bitmap_stride_bytes = m.bitmap_stride_bytes();
    sound = holds(m.bitmap, m.rows * rows.bitmap_stride_bytes);
    if (form.pattern.kind == PatternKind::kUnstructured) {
      rows.row_values = parts[kParts - 1].as<int64_t>();
      sound = sound && holds(parts[kParts - 1], (m.rows + 1) * 8) &&
              holds(m.values, rows.row_values[m.rows] * rows.width());
    } else {
      sound = sound && holds(m.values, m.rows * m.values_per_row() * rows.width());
    }
  }
  TORCH_CHECK(sound, "packed: its parts don't agree with its form.");
  return opened;
}

}  // namespace

Packed pack_cpu(const at::Tensor& weight, const format::Pattern& pattern) {
  auto compressed = format::compress(model::unwrap(weight), pattern, model::torch_executor());
  TORCH_CHECK(compressed.ok(), compressed.error().message);
  auto made = format::CompactRows::make(std::move(compressed).value());
  TORCH_CHECK(made.ok(), made.error().message);
  CompactMatrix matrix = made->matrix();

  Packed packed;
  packed.form = {.rows = matrix.rows,
                 .columns = matrix.columns,
                 .dtype = matrix.values_dtype,
                 .pattern = pattern};
  const auto kept = static_cast<double>(matrix.values.size() / size_bytes(matrix.values_dtype));
  packed.form.sparsity = std::max(0.0, 1.0 - kept / static_cast<double>(weight.numel()));
  std::array<Bytes, kParts> parts;
  for (size_t i = 0; i + 1 < kParts; ++i) parts[i] = *parts_of(matrix)[i];
  if (made->view().row_values != nullptr)
    parts[kParts - 1] = Bytes(nullptr, reinterpret_cast<const std::byte*>(made->view().row_values),
                              static_cast<size_t>(matrix.rows + 1) * sizeof(int64_t));
  int64_t end = 0;
  for (const Bytes& part : parts) {
    packed.form.rest.push_back(static_cast<int64_t>(part.size()));
    if (!part.empty()) end = next_part(end + static_cast<int64_t>(part.size()));
  }
  packed.bytes = at::zeros({end}, at::kByte);
  auto* to = packed.bytes.mutable_data_ptr<uint8_t>();
  int64_t at = 0;
  for (const Bytes& part : parts) {
    if (part.empty()) continue;
    std::memcpy(to + at, part.data(), part.size());
    at = next_part(at + static_cast<int64_t>(part.size()));
  }
  return packed;
}

at::Tensor unpack_cpu(const at::Tensor& packed, const Form& form) {
  const Opened weight = open(packed, form);
  at::Tensor dense = at::empty({form.rows, form.columns}, model::scalar_type(form.dtype));
  model::expand_into(weight.matrix, dense);
  return dense;
}

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& packed, const Form& form,
                      const std::optional<at::Tensor>& bias) {
  const Opened weight = open(packed, form);
  const auto* operation = kernels::linear_operation(form.pattern.kind);
  const auto plan = operation->plan(form.problem(x.numel() / form.columns, x.scalar_type()),
                                    kernels::Device::this_cpu());
  if (!plan.ok())  // more tokens than a kernel takes
    return at::linear(x, unpack_cpu(packed, form).to(x.scalar_type()), bias);
  return model::multiply_few_tokens(x, bias, form.rows, [&](const format::RowProduct& product) {
    model::run_planned(
        *plan, product,
        [&](const kernels::LinearPlan& of, const format::RowProduct& operands, void* workspace) {
          of.candidate->run(weight.rows, operands, workspace, model::torch_executor());
        });
  });
}

}  // namespace lacuna::python

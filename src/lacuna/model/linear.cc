#include "lacuna/model/linear.h"

#include <chrono>

namespace lacuna::model {
namespace {

LinearClock* linear_clock = nullptr;

/// f(), counted if a clock is set.
template <class F>
auto counted(F&& f) {
  struct Count {
    LinearClock* clock;
    std::chrono::steady_clock::time_point start;
    ~Count() {
      if (clock == nullptr) return;
      clock->nanoseconds +=
          std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
      ++clock->calls;
    }
  };
  const Count count{linear_clock, linear_clock == nullptr ? std::chrono::steady_clock::time_point()
                                                          : std::chrono::steady_clock::now()};
  return f();
}

/// All of the parts as one, or nothing: their forms differ, or not all have a bias.
std::optional<Linear::Stored> joined(const std::vector<Linear::Stored>& parts,
                                     const Compute& compute) {
  std::vector<StoredMatrix> weights;
  std::vector<at::Tensor> biases;
  for (const Linear::Stored& part : parts) {
    weights.push_back(part.weight);
    if (part.bias) biases.push_back(*part.bias);
  }
  if (!biases.empty() && biases.size() < parts.size()) return std::nullopt;
  auto weight = stacked(weights, compute);
  if (!weight) return std::nullopt;
  Linear::Stored all{.weight = std::move(*weight), .bias = {}};
  if (!biases.empty()) all.bias = biases.size() == 1 ? biases.front() : at::cat(biases);
  return all;
}

int64_t rows_of(const StoredMatrix& stored) {
  const auto* matrix = std::get_if<format::CompactMatrix>(&stored);
  return matrix != nullptr ? matrix->rows : std::get<at::Tensor>(stored).size(0);
}

}  // namespace

void set_linear_clock(LinearClock* clock) { linear_clock = clock; }

Result<Linear> Linear::make(Stored stored, const Compute& compute) {
  Linear linear;
  LACUNA_TRY(linear.weight_, weight_of(std::move(stored.weight), compute));
  linear.bias_ = std::move(stored.bias);
  return linear;
}

Linear Linear::dense(at::Tensor weight, std::optional<at::Tensor> bias) {
  Linear linear;
  linear.weight_ = dense_weight(std::move(weight));
  linear.bias_ = std::move(bias);
  return linear;
}

Result<Linear> Linear::compact(format::CompactMatrix weight, std::optional<at::Tensor> bias,
                               const Compute& compute) {
  return make({std::move(weight), std::move(bias)}, compute);
}

Result<std::vector<Linear>> Linear::together(std::vector<Stored> parts, const Compute& compute) {
  std::vector<Linear> linears;
  if (auto all = joined(parts, compute)) {
    LACUNA_TRY(Linear one, make(std::move(*all), compute));
    if (parts.size() == 1) {
      linears.push_back(std::move(one));
      return linears;
    }
    const auto whole = std::make_shared<const Linear>(std::move(one));
    int64_t first = 0;
    for (Stored& part : parts) {
      const int64_t rows = rows_of(part.weight);
      Linear slice;
      slice.weight_ = slice_of(whole->weight_, first, rows);
      slice.bias_ = std::move(part.bias);
      slice.whole_ = whole;
      slice.first_ = first;
      first += rows;
      linears.push_back(std::move(slice));
    }
    return linears;
  }
  for (Stored& part : parts) {
    LACUNA_TRY(std::vector<Linear> alone, together({std::move(part)}, compute));
    linears.push_back(std::move(alone.front()));
  }
  return linears;
}

const Linear* Linear::whole_of(const std::vector<const Linear*>& parts) {
  const Linear* whole = parts.front()->whole_.get();
  if (whole == nullptr) return nullptr;
  int64_t next = 0;
  for (const Linear* part : parts) {
    if (part->whole_.get() != whole || part->first_ != next) return nullptr;
    next += part->out_features();
  }
  return next == whole->out_features() ? whole : nullptr;
}

at::Tensor Linear::forward(const at::Tensor& x) const {
  return counted([&] { return weight_->multiply(x, bias_); });
}

at::Tensor Linear::multiply_expanded(const at::Tensor& x) const {
  return at::linear(x, weight_->expanded(), bias_);
}

void Linear::forward_into(const void* x, int64_t tokens, void* y, const Executor& executor) const {
  counted([&] {
    weight_->run({.dtype = dtype_of(weight_->compute().dtype),
                  .tokens = tokens,
                  .x = x,
                  .x_stride = in_features(),
                  .y = y,
                  .y_stride = out_features(),
                  .bias = bias_ ? bias_->const_data_ptr() : nullptr},
                 executor);
  });
}

at::Tensor Linear::rows(const at::Tensor& ids) const {
  if (!weight_->is_coded()) return at::embedding(weight_->expanded(), ids);
  const at::Tensor flat = ids.to(at::kInt).contiguous().view({-1});
  Shape shape = ids.sizes().vec();
  shape.push_back(in_features());
  at::Tensor out = at::empty(shape, weight_->compute().dtype);
  rows_into(flat.const_data_ptr<int32_t>(), flat.numel(), out.mutable_data_ptr(), torch_executor());
  return out;
}

void Linear::rows_into(const int32_t* ids, int64_t count, void* out,
                       const Executor& executor) const {
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK(ids[i] >= 0 && ids[i] < out_features(), "rows: no row ", ids[i], " of ",
                out_features());
  weight_->read_rows(ids, count, out, executor);
}

at::Tensor Linear::weight() const {
  const at::Tensor all = weight_->expanded();
  return is_compact() ? all.clone() : all;
}

void Linear::set_weight(at::Tensor weight) {
  whole_.reset();
  weight_ = dense_weight(std::move(weight));
}

bool Linear::recordable() const { return weight_->recordable(); }
bool Linear::is_compact() const { return weight_->is_compact(); }
int64_t Linear::out_features() const { return weight_->rows(); }
int64_t Linear::in_features() const { return weight_->columns(); }
size_t Linear::weight_bytes() const { return weight_->bytes(); }

std::optional<kernels::Problem> Linear::decode_problem() const { return weight_->decode_problem(); }

}  // namespace lacuna::model

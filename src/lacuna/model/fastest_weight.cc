#include "lacuna/model/fastest_weight.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <map>
#include <mutex>

#include "lacuna/model/gpu_clock.h"

namespace lacuna::model {
namespace {

/// Numbers of tokens up to each power of two are measured at it; beyond this one no more.
constexpr int64_t kMostMeasured = 8192;
constexpr int64_t kMostAtOnce = 64;  // tokens of a step
constexpr int kTimes = 7;
/// Of the dense time: what a sparse form must be ahead to be taken.
constexpr double kNoise = 0.99;
/// Of the norm: how far from the dense product sums in another order may lead, and codes of x.
constexpr double kMostError = 0x1p-7, kMostErrorOfCodes = 0.1;
constexpr int64_t kCacheFloats = int64_t{48} << 20;  // 192 MiB: no cache of a GPU is larger

int64_t standing_for(int64_t tokens) {
  return std::min(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(tokens))),
                  kMostMeasured);
}

struct Answers {
  std::mutex mutex;
  std::map<std::pair<std::string, int64_t>, size_t> forms;  // by what is the same, and tokens
};
Answers& answers() {
  static Answers all;
  return all;
}

}  // namespace

FastestWeight::FastestWeight(std::vector<Form> forms)
    : Weight(forms.back().weight->rows(), forms.back().weight->columns(),
             forms.back().weight->compute()),
      forms_(std::move(forms)) {
  same_ = fmt::format("{} {}x{}", compute().device.str(), rows(), columns());
  for (const Form& form : forms_) {
    // Weights that differ by less than some percent of their bytes are alike.
    const double share = static_cast<double>(form.weight->bytes()) /
                         static_cast<double>(std::max<int64_t>(1, rows() * columns()));
    same_ += fmt::format(" {} {:.1f}", form.name, share * 10);
  }
}

size_t FastestWeight::bytes() const {
  size_t all = 0;
  for (const Form& form : forms_) all += form.weight->bytes();
  return all;
}

/// As a step runs it, or, of more tokens than a step has, as a prompt does.
at::Tensor FastestWeight::product(const Form& form, const at::Tensor& x) const {
  const int64_t tokens = x.size(0);
  if (tokens > kMostAtOnce) return form.weight->multiply(x, {});
  at::Tensor y = at::empty({tokens, rows()}, x.options());
  const format::RowProduct product{.dtype = dtype_of(compute().dtype),
                                   .tokens = tokens,
                                   .x = x.const_data_ptr(),
                                   .x_stride = columns(),
                                   .y = y.mutable_data_ptr(),
                                   .y_stride = rows()};
  form.weight->run(product, Executor());
  return y;
}

bool FastestWeight::is_right(const Form& form, int64_t tokens) const {
  const auto options = at::TensorOptions().device(compute().device).dtype(compute().dtype);
  for (const int64_t count : {tokens, tokens / 2 + tokens / 4 + 1}) {
    if (count > tokens || count < form.from) continue;
    const at::Tensor x =
        at::randn({count, columns()}, options.dtype(at::kFloat)).to(compute().dtype);
    const at::Tensor exact = product(forms_.back(), x);
    // What is asked for next most likely lies where this did: a form that writes nothing gives NaN.
    (void)at::full({count, rows()}, std::numeric_limits<double>::quiet_NaN(), options);
    try {
      const at::Tensor y = product(form, x);
      const double off = (y.to(at::kFloat) - exact.to(at::kFloat)).norm().item<double>();
      const double most = form.coded ? kMostErrorOfCodes : kMostError;
      if (!(off <= most * exact.to(at::kFloat).norm().item<double>())) return false;
    } catch (const c10::Error& error) {
      TORCH_WARN(form.name, " is left out: ", error.what_without_backtrace());
      return false;
    }
  }
  return true;
}

/// The least time of each form, emptying the cache before each product.
std::vector<double> FastestWeight::times_us(int64_t tokens) const {
  const auto options = at::TensorOptions().device(compute().device).dtype(compute().dtype);
  const at::Tensor x =
      at::randn({tokens, columns()}, options.dtype(at::kFloat)).to(compute().dtype);
  const at::Tensor cold = at::zeros({kCacheFloats}, options.dtype(at::kFloat));
  at::Tensor sum = at::empty({}, cold.options());
  GpuClock watch(compute().device);
  std::vector<double> least(forms_.size(), 1e30);
  std::vector<bool> taken;
  for (const Form& form : forms_)
    taken.push_back(&form == &forms_.back() || (form.from <= tokens && is_right(form, tokens)));
  for (int time = -1; time < kTimes; ++time)
    for (size_t i = 0; i < forms_.size(); ++i) {
      if (!taken[i]) continue;
      at::sum_out(sum, cold, at::IntArrayRef({0}));
      watch.start();
      (void)product(forms_[i], x);
      const double us = watch.stop_us();
      if (time >= 0) least[i] = std::min(least[i], us);
    }
  return least;
}

size_t FastestWeight::measured(int64_t tokens) const {
  Answers& all = answers();
  const std::lock_guard lock(all.mutex);
  const std::pair key{same_, standing_for(tokens)};
  if (const auto known = all.forms.find(key); known != all.forms.end()) return known->second;
  size_t form = forms_.size() - 1;
  if (forms_.size() > 1) {
    const std::vector<double> us = times_us(standing_for(tokens));
    const auto best = std::min_element(us.begin(), us.end());
    if (*best < kNoise * us.back()) form = static_cast<size_t>(best - us.begin());
  }
  return all.forms[key] = form;
}

const FastestWeight::Form& FastestWeight::chosen(int64_t tokens) const {
  return forms_[measured(tokens)];
}

at::Tensor FastestWeight::multiply(const at::Tensor& x,
                                   const std::optional<at::Tensor>& bias) const {
  const int64_t tokens = x.numel() / columns();
  if (tokens == 0 || x.requires_grad()) return forms_.back().weight->multiply(x, bias);
  return chosen(tokens).weight->multiply(x, bias);
}

void FastestWeight::run(const format::RowProduct& product, const Executor& executor) const {
  chosen(product.tokens).weight->run(product, executor);
}

}  // namespace lacuna::model

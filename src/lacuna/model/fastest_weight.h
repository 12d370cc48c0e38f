// A weight on a GPU in several forms, of which every number of tokens takes the fastest.
#pragma once

#include <string>
#include <vector>

#include "lacuna/model/weight.h"

namespace lacuna::model {

/// What `--memory fastest` makes of a sparse weight: packed for each kernel that takes some number
/// of tokens, and dense beside them. So it takes more memory than a dense weight, and no number of
/// tokens is slower than dense.
///
/// Which form a product takes was measured once in this process for the same forms of the same
/// shape and the same power of two of tokens, when it was first asked for: every form in turns on
/// this weight, the cache emptied before each product, the least time counts. Another form than the
/// dense one must be ahead of it by more than the noise of that, and its product must be the dense
/// one's: libraries that choose among their own algorithms are not taken at their word. So the bits
/// of an output may differ from process to process where two forms are equally fast.
class FastestWeight final : public Weight {
 public:
  struct Form {
    std::string name;  ///< "linear_bitmap:cuda_sm90_gap", "dense"
    WeightPtr weight;
    int64_t from = 1;    ///< fewest tokens that it is for
    bool coded = false;  ///< its x may be rounded to codes
  };
  /// @param forms  of one W, the dense one last
  explicit FastestWeight(std::vector<Form> forms);

  at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const override;
  void run(const format::RowProduct& product, const Executor& executor) const override;
  at::Tensor expanded() const override { return forms_.back().weight->expanded(); }
  size_t bytes() const override;
  bool is_compact() const override { return false; }

  /// The form that so many tokens take; measures where nobody has asked yet.
  const Form& chosen(int64_t tokens) const;

 private:
  size_t measured(int64_t tokens) const;
  at::Tensor product(const Form& form, const at::Tensor& x) const;
  /// Whether the product of so many tokens, and of a number below that is no round one, is the
  /// dense form's.
  bool is_right(const Form& form, int64_t tokens) const;
  /// Of each form that is right.
  std::vector<double> times_us(int64_t tokens) const;

  std::vector<Form> forms_;
  std::string same_;  ///< what weights with the same answers share
};

}  // namespace lacuna::model

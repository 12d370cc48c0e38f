#include <algorithm>

#include "lacuna/prune/builtin.h"
#include "lacuna/prune/chunks.h"
#include "lacuna/prune/damped_gram.h"
#include "lacuna/prune/rounded_products.h"
#include "lacuna/prune/selection.h"
#include "lacuna/prune/spectrum.h"

namespace lacuna::prune {
namespace {

constexpr int64_t kMostIterations = 300, kBetweenChecks = 3, kPatientUntil = 30;
constexpr int64_t kPolishSteps = 30;
constexpr double kPolishTolerance = 1e-4;

/// How rho goes on, by how many weights changed sides since the last check.
class Schedule {
 public:
  enum class Next { kGoOn, kRestart, kStop };
  double rho() const { return rho_; }

  /// @param changed  share of the kept weights' count; a swap counts twice @param iteration from 1
  Next check(double changed, int64_t iteration) {
    if (changed == 0 && grown_) return Next::kStop;
    Next next = Next::kGoOn;
    if (changed > 0.005) {
      rho_ *= changed > 0.1 ? 1.3 : 1.2;
      grown_ = true;
    } else if (grown_) {
      rho_ *= 1.1;
    } else {  // it was too large from the start: nothing moves
      rho_ /= 5;
      if (changed > 0) next = Next::kRestart;
    }
    rho_ = std::min(rho_, 1e6);
    if (iteration > kPatientUntil && changed < 0.0003) return Next::kStop;
    return next;
  }

 private:
  double rho_ = 0.1;
  bool grown_ = false;
};

/// Alternating directions: B fits the outputs freely, D is the nearest matrix under the pattern, V
/// the multipliers of B = D. After each step D = S on the mask and V = rho S off it, with
/// S = B + V / rho, so that S and the mask are the whole state.
/// B = (B0 G + rho D - V) (G + rho I)^-1 is written as B0 + (D - B0 - V / rho) rho (G + rho I)^-1:
/// one product with a matrix of norm 1 at most, whose rounding stays as small as what it
/// multiplies, where the first form subtracts large numbers from each other.
class Admm {
 public:
  Admm(const Problem& problem, const DampedGram& gram, const Spectrum& spectrum)
      : request_(problem.request),
        spectrum_(spectrum),
        rounded_products_(gram.rounded_products),
        dense_(gram.scaled(problem.weight).contiguous()),
        free_(at::empty_like(dense_)) {
    start_mask_ = problem.mask.defined() ? problem.mask : project(dense_);
  }

  const at::Tensor& dense() const { return dense_; }
  const at::Tensor& start_mask() const { return start_mask_; }
  int64_t iterations() const { return iterations_; }
  bool converged() const { return converged_; }

  /// B where it has come to rest.
  const at::Tensor& run() {
    restart();
    at::Tensor checked = mask_;
    const double kept = start_mask_.sum().item<double>();
    while (iterations_ < kMostIterations) {
      step();
      if (++iterations_ % kBetweenChecks != 0) continue;
      const double changed = (mask_ != checked).sum().item<double>();
      const Schedule::Next next = schedule_.check(kept > 0 ? changed / kept : 0, iterations_);
      if (next == Schedule::Next::kStop) {
        converged_ = true;
        break;
      }
      if (next == Schedule::Next::kRestart) restart();
      checked = mask_;
    }
    return free_;
  }

  at::Tensor project(const at::Tensor& scaled) const {
    const at::Tensor scores =
        request_.pattern.kind == format::PatternKind::kBlock ? scaled.square() : scaled.abs();
    return select(scores, request_.pattern, request_.sparsity, request_.group.value_or(Group::kRow),
                  request_.executor);
  }

 private:
  void restart() {
    state_ = dense_.clone();
    mask_ = start_mask_;
    multiplier_ = 0;
  }

  /// The rows' masks don't depend on each other.
  bool rowwise() const {
    return request_.pattern.kind == format::PatternKind::kKeepOf ||
           (request_.pattern.kind == format::PatternKind::kUnstructured &&
            request_.group == Group::kRow);
  }

  void step() {
    const double rho = schedule_.rho(), pulled = multiplier_ / rho;
    const at::Tensor shrinkage = spectrum_.shrinkage(rho, request_.executor);
    const RoundedProducts rounded(rounded_products_);
    at::Tensor mask = rowwise() ? at::empty_like(mask_) : mask_;
    row_strips(dense_, request_.executor, [&](int64_t first, int64_t count) {
      at::Tensor state = state_.narrow(0, first, count), free = free_.narrow(0, first, count);
      const at::Tensor dense = dense_.narrow(0, first, count);
      const at::Tensor kept = state * mask_.narrow(0, first, count);
      const at::Tensor rest = state - kept;
      at::addmm_out(free, dense, (kept - dense).sub_(rest, pulled), shrinkage);
      at::add_out(state, free, rest, pulled);
      if (rowwise())
        mask.narrow(0, first, count)
            .copy_(select(state.abs(), request_.pattern, request_.sparsity, Group::kRow));
    });
    mask_ = rowwise() ? mask : project(state_);
    multiplier_ = rho;
  }

  const Request& request_;
  const Spectrum& spectrum_;
  const bool rounded_products_;
  const at::Tensor dense_;  // scaled weights B0
  at::Tensor start_mask_;
  at::Tensor state_, mask_, free_;  // S, where D is, B
  double multiplier_ = 0;           // V = multiplier_ * S off the mask
  Schedule schedule_;
  int64_t iterations_ = 0;
  bool converged_ = false;
};

/// ADMM finds which weights to keep together, conjugate gradients what they are then.
/// A score gives the mask that it starts from (and what competes); without one that is the largest
/// scaled weights. Where it has not come to rest after 300 iterations, or rests where nothing is
/// won (inputs of a rank far below their number), the better of its mask and the one it started
/// from is taken.
/// @paper Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
/// Language Models, https://arxiv.org/abs/2406.07831
class Alps final : public Solver {
 public:
  std::string_view name() const override { return "alps"; }
  Needs needs() const override { return Needs::kGram; }
  std::optional<Group> own_group() const override { return Group::kLayer; }
  bool changes_weights() const override { return true; }

  Status prepare(InputStatistics& statistics, const Request& request) const override {
    LACUNA_CHECK(prepare_damped(statistics, request));
    if (statistics.spectrum) return {};
    LACUNA_TRY(Spectrum spectrum, Spectrum::of(*statistics.damped));
    statistics.spectrum = std::make_shared<const Spectrum>(std::move(spectrum));
    return {};
  }

  /// Scaled weights, both sides of the iteration, what a strip multiplies; the eigenvectors and
  /// what finds them in float64, a shrinkage and its half.
  uint64_t working_bytes(uint64_t weights, uint64_t squared) const override {
    return 4 * 4 * weights + (4 * 8 + 4 * 4) * squared + Spectrum::kRememberedBytes;
  }

  Result<Pruned> solve(const Problem& problem) const override {
    const DampedGram& gram = *problem.statistics.damped;
    Admm admm(problem, gram, *problem.statistics.spectrum);
    const at::Tensor& free = admm.run();
    Pruned pruned = polished(admm.project(free), free, problem, admm);
    pruned.damping = gram.damping;
    pruned.iterations = admm.iterations();
    pruned.warnings = gram.warnings;
    const auto error = [&](const at::Tensor& weight) {
      return damped_error(problem.weight, weight, gram, problem.request.executor);
    };
    const double reached = error(pruned.weight);
    if (admm.converged() && reached <= error(problem.weight * admm.start_mask())) return pruned;
    const Pruned start = polished(admm.start_mask(), admm.dense(), problem, admm);
    if (reached <= error(start.weight)) return pruned;
    pruned.weight = start.weight;
    pruned.mask = start.mask;
    pruned.fell_back = true;
    pruned.warnings.push_back(fmt::format(
        "alps: no better mask than the one it started from after {} iterations; that one is taken",
        pruned.iterations));
    return pruned;
  }

 private:
  static Pruned polished(const at::Tensor& mask, const at::Tensor& from, const Problem& problem,
                         const Admm& admm) {
    const DampedGram& gram = *problem.statistics.damped;
    const at::Tensor scaled = from.masked_fill(mask.logical_not(), 0);
    conjugate_gradients(gram, admm.dense(), mask, scaled, kPolishSteps, kPolishTolerance,
                        problem.request.executor);
    Pruned pruned;
    pruned.weight = gram.weight(scaled, mask);
    pruned.mask = mask;
    return pruned;
  }
};

}  // namespace

const Solver& alps_solver() {
  static const Alps solver;
  return solver;
}

}  // namespace lacuna::prune

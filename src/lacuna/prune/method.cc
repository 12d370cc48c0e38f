#include "lacuna/prune/method.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "lacuna/prune/builtin.h"
#include "lacuna/prune/chunks.h"
#include "lacuna/prune/coding.h"
#include "lacuna/prune/damped_gram.h"
#include "lacuna/prune/hybrid.h"
#include "lacuna/prune/inverse_factor.h"
#include "lacuna/prune/selection.h"

namespace lacuna::prune {
namespace {

struct NamedGroup {
  Group group;
  std::string_view name;
};

constexpr NamedGroup kGroups[] = {
    {Group::kRow, "row"}, {Group::kLayer, "layer"}, {Group::kBlock128, "block128"}};

/// @errors kBadInput naming row and column of the first NaN or infinity
Status check_finite(const at::Tensor& values, std::string_view what, std::string_view advice) {
  const at::Tensor bad = values.isfinite().logical_not_();
  if (!bad.any().item<bool>()) return {};
  const int64_t first = bad.flatten().to(at::kByte).argmax().item<int64_t>();
  const double value = values.flatten()[first].item<double>();
  if (values.dim() == 1)
    return bad_input("{}: must be finite (got {} in column {}). {}", what, value, first, advice);
  return bad_input("{}: must be finite (got {} in row {}, column {}). {}", what, value,
                   first / values.size(1), first % values.size(1), advice);
}

/// |X A^T|_F^2 = sum of the elements of (A G) * A, in strips of rows.
double energy(const at::Tensor& a, const at::Tensor& gram, const Executor& executor) {
  const int64_t rows_at_once = a.is_cpu() ? 128 : 4096;
  std::vector<double> sums(static_cast<size_t>((a.size(0) + rows_at_once - 1) / rows_at_once));
  parallel_chunks(a.is_cpu() ? executor : Executor::serial(), static_cast<int64_t>(sums.size()),
                  [&](int64_t i) {
                    const at::Tensor strip = a.narrow(
                        0, i * rows_at_once, std::min(rows_at_once, a.size(0) - i * rows_at_once));
                    sums[static_cast<size_t>(i)] =
                        at::mm(strip, gram).mul_(strip).sum(at::kDouble).item<double>();
                  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

std::string_view group_name(Group group) {
  for (const auto& known : kGroups)
    if (known.group == group) return known.name;
  return "?";
}

std::string_view coding_name(Coding coding) { return coding == Coding::kGptq ? "gptq" : "awq"; }

Result<Coding> parse_coding(std::string_view name) {
  for (const Coding coding : {Coding::kGptq, Coding::kAwq})
    if (coding_name(coding) == name) return coding;
  return usage_error("--coding: unknown way to codes (got {}; need gptq or awq).", name);
}

Result<Group> parse_group(std::string_view name) {
  for (const auto& known : kGroups)
    if (known.name == name) return known.group;
  return usage_error("--group: unknown group (got {}; need row, layer or block128).", name);
}

namespace {

const Score* const kScores[] = {&magnitude_score(), &wanda_score(),    &ria_score(),
                                &hessian_score(),   &gradient_score(), &fisher_score(),
                                &regional_score()};
const Solver* const kSolvers[] = {&no_solver(), &sparsegpt_solver(), &exact_solver(),
                                  &alps_solver()};
const Refinement* const kRefinements[] = {&swaps_refinement(), &polish_refinement(),
                                          &dsnot_refinement()};
constexpr std::string_view kOwnScore = "own";

template <class T, size_t N>
std::vector<std::string> names_of(T* const (&stages)[N]) {
  std::vector<std::string> names;
  for (const T* stage : stages) names.emplace_back(stage->name());
  return names;
}

template <class T, size_t N>
Result<T*> find_stage(T* const (&stages)[N], std::string_view name, const char* flag) {
  for (T* stage : stages)
    if (stage->name() == name) return stage;
  return usage_error("{}: unknown stage (got {}; need one of {}).", flag, name,
                     fmt::join(names_of(stages), ", "));
}

/// "score=wanda solve=alps refine=swaps,polish"
std::string spelled(const Score* score, const Solver& solver,
                    const std::vector<const Refinement*>& refinements) {
  std::string text =
      fmt::format("score={} solve={}", score ? score->name() : kOwnScore, solver.name());
  for (size_t i = 0; i < refinements.size(); ++i)
    text += fmt::format("{}{}", i == 0 ? " refine=" : ",", refinements[i]->name());
  return text;
}

/// Scores by gradients need them, unless the mask is there.
Status check_gradient(Slope slope, const at::Tensor& weight, const Request& request) {
  if (slope == Slope::kNone || request.keep_mask) return {};
  const at::Tensor& gradient = request.gradient;
  if (!gradient.defined() || gradient.sizes() != weight.sizes())
    return usage_error("gradient: needs one of the weight's shape (got {}).",
                       gradient.defined() ? "another" : "none");
  return check_finite(
      gradient, "gradient",
      "The calibration passed NaN or infinity through the model: try --dtype float32.");
}

bool drops_nothing(const at::Tensor& weight, const Request& request) {
  return request.pattern.kind != format::PatternKind::kKeepOf &&
         dropped_of(weight.numel(), request.sparsity) == 0;
}

/// What was done to the matrix that a stage went by, once.
void add_warnings(const DampedGram& gram, Pruned& pruned) {
  for (const std::string& warning : gram.warnings)
    if (std::ranges::count(pruned.warnings, warning) == 0) pruned.warnings.push_back(warning);
}

/// Runs a refinement and holds it to its promise. What rounding alone may add to a float32 error is
/// far below kRounding of it.
Status refine(const Refinement& refinement, const Problem& problem, bool resolved, Pruned& pruned) {
  if (!refinement.never_raises_the_damped_error())
    return refinement.refine(problem, resolved, pruned);
  add_warnings(*problem.statistics.damped, pruned);
  constexpr double kRounding = 1e-5;
  const auto error = [&] {
    return damped_error(problem.weight, pruned.weight, *problem.statistics.damped,
                        problem.request.executor);
  };
  const double before = error();
  LACUNA_CHECK(refinement.refine(problem, resolved, pruned));
  const double after = error();
  if (after <= before * (1 + kRounding)) return {};
  return check_failed(
      "{}: raised the damped error of the outputs (from {:g} to {:g}). This is a fault of the "
      "program; leave the refinement out and report it.",
      refinement.name(), before, after);
}

}  // namespace

// ---- methods ------------------------------------------------------------------------------------

Status Stage::prepare(InputStatistics&, const Request&) const { return {}; }
uint64_t Stage::working_bytes(uint64_t, uint64_t) const { return 0; }

Status prepare_factor(InputStatistics& statistics, const Request& request) {
  if (statistics.factor) return {};
  LACUNA_TRY(InverseFactor factor, inverse_factor(statistics, request.damping, request.executor));
  statistics.factor = std::make_shared<const InverseFactor>(std::move(factor));
  return {};
}

Status prepare_damped(InputStatistics& statistics, const Request& request) {
  if (statistics.damped) return {};
  LACUNA_TRY(DampedGram damped, damped_gram(statistics.gram, request.damping, request.executor));
  damped.rounded_products = request.rounded_products && statistics.gram.is_cuda();
  statistics.damped = std::make_shared<const DampedGram>(std::move(damped));
  return {};
}

Method::Method(std::string name, const Score* score, const Solver& solver,
               std::vector<const Refinement*> refinements)
    : name_(std::move(name)),
      score_(score),
      solver_(&solver),
      refinements_(std::move(refinements)) {
  about_ = spelled(score_, *solver_, refinements_);
  if (name_.empty()) name_ = about_;
}

bool Method::needs_gram() const {
  return codes_ || (score_ != nullptr && score_->needs() == Needs::kGram) ||
         solver_->needs() == Needs::kGram ||
         std::any_of(refinements_.begin(), refinements_.end(),
                     [](const auto* each) { return each->needs() == Needs::kGram; });
}

bool Method::needs_inputs() const {
  return needs_gram() || (score_ != nullptr && score_->needs() != Needs::kNothing) ||
         solver_->needs() != Needs::kNothing ||
         std::any_of(refinements_.begin(), refinements_.end(),
                     [](const auto* each) { return each->needs() != Needs::kNothing; });
}

bool Method::changes_weights() const { return solver_->changes_weights(); }

Slope Method::slope() const { return score_ != nullptr ? score_->slope() : Slope::kNone; }

uint64_t Method::working_bytes(uint64_t weights, uint64_t squared) const {
  uint64_t most = solver_->working_bytes(weights, squared);
  for (const Refinement* refinement : refinements_)
    most = std::max(most, refinement->working_bytes(weights, squared));
  return codes_ ? most + coding_bytes(weights, squared) : most;
}

Group Method::default_group() const {
  return score_ != nullptr ? score_->default_group() : *solver_->own_group();
}

Status Method::prepare(InputStatistics& statistics, const Request& request) const {
  if (score_ != nullptr) LACUNA_CHECK(score_->prepare(statistics, request));
  LACUNA_CHECK(solver_->prepare(statistics, request));
  for (const Refinement* refinement : refinements_)
    LACUNA_CHECK(refinement->prepare(statistics, request));
  return request.quantization.none() ? Status() : prepare_coding(statistics, request);
}

Status Method::check(const at::Tensor& weight, const InputStatistics& statistics,
                     const Request& request) const {
  if (weight.dim() != 2 || weight.scalar_type() != at::kFloat)
    return bad_input("weight: must be a float32 matrix (got {} dimensions). Convert it first.",
                     weight.dim());
  LACUNA_CHECK(check_pattern(request));
  LACUNA_CHECK(check_finite(weight, "weight", "Repair or download the model again."));
  const bool gram = needs_gram() || !request.quantization.none();
  if (!gram && !needs_inputs()) return {};
  const at::Tensor& inputs = statistics.square_sums;
  if (!inputs.defined() || (gram && !statistics.gram.defined()))
    return usage_error("{}: needs calibration inputs (got none).", name_);
  if (inputs.sizes() != weight.sizes().slice(1))
    return bad_input("inputs: {} columns of statistics for a weight of {}.", inputs.numel(),
                     weight.size(1));
  constexpr std::string_view kAdvice =
      "The calibration passed NaN or infinity through the model: try --dtype float32.";
  return check_finite(inputs, "inputs: sum of squares", kAdvice);
}

Result<Pruned> Method::run_stages(Problem problem) const {
  const Request& request = problem.request;
  if (score_ != nullptr)
    problem.mask = select(score_->scores(problem), request.pattern, request.sparsity,
                          request.group.value_or(Group::kRow), request.executor);
  LACUNA_TRY(Pruned pruned, solver_->solve(problem));
  for (const Refinement* refinement : refinements_)
    LACUNA_CHECK(refine(*refinement, problem, solver_->changes_weights(), pruned));
  return pruned;
}

Result<Pruned> Method::prune(const at::Tensor& weight, const InputStatistics& given,
                             const Request& asked) const {
  LACUNA_CHECK(check(weight, given, asked));
  LACUNA_CHECK(check_gradient(slope(), weight, asked));
  if (asked.rest.kind != format::PatternKind::kDense)
    return prune_hybrid(*this, weight, given, asked);
  Request request = asked;
  if (!weight.is_cpu()) request.executor = Executor::serial();
  if (request.pattern.kind != format::PatternKind::kKeepOf)
    request.group = request.group.value_or(default_group());
  InputStatistics statistics = given;  // tensors are shared, not copied
  const bool coded = !request.quantization.none();
  const at::Tensor here = coded ? weight.cpu() : weight;
  Request coding = request;
  coding.executor = request.coder;
  Pruned pruned;
  if (request.keep_mask || drops_nothing(weight, request)) {
    pruned.weight = weight.clone(at::MemoryFormat::Contiguous);
    pruned.mask = request.keep_mask ? weight != 0 : at::ones_like(weight, at::kBool);
    if (coded) LACUNA_CHECK(prepare_coding(statistics, request));
  } else {
    LACUNA_CHECK(prepare(statistics, request));
    // Codes come last, unless the solver makes them on its way and nothing follows.
    if (coded && solver_->makes_codes() && refinements_.empty() &&
        request.coding == Coding::kGptq) {
      LACUNA_TRY(pruned, run_stages({here, on_cpu(statistics), coding, {}}));
    } else {
      Request stages = request;
      stages.quantization = {};
      LACUNA_TRY(pruned, run_stages({weight, statistics, stages, {}}));
    }
  }
  if (coded) {
    pruned.weight = pruned.weight.cpu();
    pruned.mask = pruned.mask.cpu();
    LACUNA_CHECK(make_codes({here, on_cpu(statistics), coding, {}}, pruned));
    add_warnings(*statistics.damped, pruned);
  }
  return pruned;
}

Status check_pattern(const Request& request) {
  if (request.keep_mask) return {};  // nothing is chosen
  if (!(request.sparsity >= 0 && request.sparsity <= 1))
    return usage_error("--sparsity: must lie between 0 and 1 (got {}).", request.sparsity);
  if (request.pattern.kind == format::PatternKind::kDense)
    return usage_error(
        "--pattern: dense prunes nothing (need unstructured, KEEP:OF or block:RxC).");
  if (request.rest.kind != format::PatternKind::kDense) LACUNA_CHECK(check_hybrid(request));
  const format::Pattern& pattern = request.pattern;
  const bool keep_of = pattern.kind == format::PatternKind::kKeepOf;
  if ((keep_of && !(0 < pattern.keep && pattern.keep < pattern.of && pattern.of <= 64)) ||
      (pattern.kind == format::PatternKind::kBlock &&
       (pattern.block_rows < 1 || pattern.block_columns < 1)))
    return usage_error("--pattern: out of range (got {}; need 0 < KEEP < OF <= 64, or block:RxC).",
                       pattern.text());
  if (keep_of && request.group)
    return usage_error(
        "--group: {} can't be combined with {}, whose groups are fixed. Leave it out.",
        group_name(*request.group), request.pattern.text());
  return {};
}

const std::vector<const Method*>& methods() {
  static const Method sparsegpt("sparsegpt", nullptr, sparsegpt_solver());
  static const Method alps("alps", nullptr, alps_solver());
  static const Method wanda("wanda", &wanda_score(), no_solver());
  static const Method ria("ria", &ria_score(), no_solver());
  static const Method dsnot("dsnot", &wanda_score(), no_solver(), {&dsnot_refinement()});
  static const Method hessian("hessian", &hessian_score(), exact_solver());
  static const Method gradient("gradient", &gradient_score(), no_solver());
  static const Method magnitude("magnitude", &magnitude_score(), no_solver());
  static const std::vector<const Method*> all = {&sparsegpt, &alps,    &wanda,    &ria,
                                                 &dsnot,     &hessian, &gradient, &magnitude};
  return all;
}

Result<const Method*> find_method(std::string_view name) {
  std::vector<std::string_view> known;
  for (const Method* method : methods()) {
    if (method->name() == name) return method;
    known.push_back(method->name());
  }
  return usage_error("--method: unknown method (got {}; need one of {}).", name,
                     fmt::join(known, ", "));
}

Result<Method> compose(const MethodChoice& choice) {
  Method made("", nullptr, no_solver());
  if (!choice.method.empty()) {
    LACUNA_TRY(const Method* known, find_method(choice.method));
    made = *known;
  }
  if (choice.score == kOwnScore) {
    made.score_ = nullptr;
  } else if (!choice.score.empty()) {
    LACUNA_TRY(made.score_, find_stage(kScores, choice.score, "--score"));
  }
  if (!choice.solve.empty()) {
    LACUNA_TRY(made.solver_, find_stage(kSolvers, choice.solve, "--solve"));
  }
  if (!choice.refine.empty()) made.refinements_.clear();
  if (choice.refine.size() > 1 && std::ranges::count(choice.refine, "none") > 0)
    return usage_error("--refine none: stands alone (got {}).", fmt::join(choice.refine, ", "));
  for (const std::string& name : choice.refine) {
    if (name == "none") continue;
    LACUNA_TRY(const Refinement* refinement, find_stage(kRefinements, name, "--refine"));
    made.refinements_.push_back(refinement);
  }
  if (made.score_ == nullptr && !made.solver_->own_group())
    return usage_error("--solve {}: can't choose weights by itself. Give --score {}.",
                       made.solver_->name(), fmt::join(score_names(), "|"));
  for (const Refinement* refinement : made.refinements_)
    if (made.solver_->changes_weights() && !refinement->takes_changed_weights())
      return usage_error("--refine {}: takes weights as they were (got --solve {}; need none).",
                         refinement->name(), made.solver_->name());
  const std::string text = spelled(made.score_, *made.solver_, made.refinements_);
  Method composed("", made.score_, *made.solver_, made.refinements_);
  for (const Method* known : methods())
    if (known->about() == text) composed.name_ = known->name_;
  composed.codes_ = choice.codes;
  return composed;
}

std::vector<std::string> score_names() {
  std::vector<std::string> names = names_of(kScores);
  names.emplace_back(kOwnScore);
  return names;
}
std::vector<std::string> solver_names() { return names_of(kSolvers); }
std::vector<std::string> refinement_names() {
  std::vector<std::string> names = names_of(kRefinements);
  names.emplace_back("none");
  return names;
}

double relative_error(const at::Tensor& weight, const at::Tensor& pruned, const at::Tensor& gram,
                      const Executor& executor) {
  const double lost = energy(weight - pruned, gram, executor);
  if (lost <= 0) return 0;  // rounding can leave a tiny negative number
  return std::sqrt(lost / energy(weight, gram, executor));
}

}  // namespace lacuna::prune

// How an operation finds its kernel: problem strings, candidates that say why not, the table of
// what was measured (measured.h), LACUNA_FORCE; and what the linear operations share.
#pragma once

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/cpu.h"
#include "lacuna/core/dtype.h"
#include "lacuna/core/executor.h"
#include "lacuna/core/gpu.h"
#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"
#include "lacuna/format/quantization.h"
#include "lacuna/format/row_product.h"

namespace lacuna::kernels {

/// How the weights of a problem are stored.
enum class Values : uint8_t { kF32, kBF16, kF16, kInt8, kInt4G64, kFP8 };
std::string_view text(Values values);
/// The element type of unquantised values.
std::optional<DType> dtype_of(Values values);
Values values_of(DType dtype);
/// What a problem calls these codes, or nothing (other groups of columns, zero points).
std::optional<Values> values_of(const format::Quantization& quantization);
/// Whether kernels walk such values row by row (format::RowsView): numbers and fp8. int8 and int4
/// are packed as a stream (linear_coded).
bool walked_by_rows(Values values);

/// One call of an operation on matrices: y[T,N] = x[T,K] · W[N,K]^T and its relatives.
///
/// As text, the one grammar of benchmarks, case files, records and `doctor`:
///
///     OPERATION:VALUES[/ACTIVATIONS]:NxKxT[:SPARSITY]
///     linear_bitmap:bf16:14336x4096x1:0.5        half of the weights dropped, unstructured
///     linear_nm:int4g64:4096x4096x8:2:4          KEEP:OF
///     linear_bsr:bf16:4096x4096x1:block32x32@0.5
///     linear_dense:bf16/f32:4096x4096x1          bf16 weights, float32 x and y
///
/// VALUES is f32, bf16, f16, int8, int4g64 (int4 for short) or fp8; x and y have the same type
/// unless ACTIVATIONS (f32, bf16, f16) says otherwise, and bf16 where the values are quantised.
struct Problem {
  std::string operation;
  Values values = Values::kBF16;
  DType activations = DType::kBF16;
  int64_t outputs = 0;  ///< N
  int64_t inputs = 0;   ///< K
  int64_t tokens = 0;   ///< T
  format::Pattern pattern;
  double sparsity = 0;  ///< share of zeros; 1 - keep/of for KEEP:OF

  /// @errors kUsage
  static Result<Problem> parse(std::string_view text);
  std::string text() const;
  bool operator==(const Problem&) const = default;
};

/// Where a problem is to be run: on this CPU, or on a GPU when `gpu` is set.
struct Device {
  CpuFeatures cpu;
  std::optional<GpuFacts> gpu;
  static const Device& this_cpu();
  /// The first GPU of this machine. Its facts are all zero where none answers, which every
  /// candidate then says.
  static const Device& this_gpu();
};

/// A candidate's answer: yes, or why not.
class Support {
 public:
  static Support yes() { return Support(""); }
  template <class... A>
  static Support no(fmt::format_string<A...> why, A&&... args) {
    return Support(fmt::format(why, std::forward<A>(args)...));
  }
  /// The first `no` of several conditions, else yes.
  static Support all(std::initializer_list<Support> conditions);
  explicit operator bool() const { return refusal_.empty(); }
  const std::string& refusal() const { return refusal_; }

 private:
  explicit Support(std::string refusal) : refusal_(std::move(refusal)) {}
  std::string refusal_;
};

/// `condition`, or "needs WHAT".
Support needs(bool condition, std::string_view what);

/// What every implementation of an operation has; each operation adds how it is run. Named
/// device_isa_idea.
struct Candidate {
  std::string name;
  Support (*supports)(const Problem& problem, const Device& device) = nullptr;
};

/// What decided for a candidate, from weak to strong.
enum class ChosenBy : uint8_t {
  kOrder,     ///< the first of the list that supports the problem
  kMeasured,  ///< the measured table (measured.h)
  kForce,     ///< LACUNA_FORCE
};
/// "order of the list", "measured table", "LACUNA_FORCE"
std::string_view text(ChosenBy by);

/// One line of explain().
struct Explanation {
  std::string candidate;
  Support support;
  bool chosen = false;
  /// Of the chosen one: what decided. Of one that the measured table names in vain: why it isn't
  /// taken.
  std::string note;
};

/// The candidate that LACUNA_FORCE=OPERATION:CANDIDATE[,...] pins for an operation on this device,
/// or nothing: names that begin with cuda_ pin weights on a GPU, all others weights in host memory.
std::optional<std::string> forced_candidate(std::string_view operation, const Device& device);

namespace detail {
/// The candidate to run, and what decided.
struct Choice {
  size_t index = 0;
  ChosenBy by = ChosenBy::kOrder;
};
/// LACUNA_FORCE before the measured table before the order of the list. @errors kUsage:
/// LACUNA_FORCE names an unknown candidate; kNotPossible: none supports the problem, or the forced
/// one doesn't
Result<Choice> choose(const std::vector<const Candidate*>& candidates, const Problem& problem,
                      const Device& device);
std::vector<Explanation> explain(const std::vector<const Candidate*>& candidates,
                                 const Problem& problem, const Device& device);
}  // namespace detail

/// The candidates of one operation, from special to general, the reference last.
/// @tparam C  a Candidate with the operation's own run function
template <class C>
class CandidateList {
 public:
  CandidateList(std::initializer_list<C> candidates) : candidates_(candidates) {}

  /// Puts a candidate of a higher tier (one that stands on torch) before all others. At start-up
  /// only: not safe against a concurrent choose().
  void add_first(C candidate) { candidates_.push_front(std::move(candidate)); }

  /// The one that LACUNA_FORCE pins, else the one that measured fastest here, else the first that
  /// supports the problem. The pointer stays valid for the life of the program.
  Result<const C*> choose(const Problem& problem, const Device& device) const {
    LACUNA_TRY(const detail::Choice choice, detail::choose(pointers(), problem, device));
    return &candidates_[choice.index];
  }
  /// Every candidate with its answer; last, one that the measured table names and nobody knows.
  std::vector<Explanation> explain(const Problem& problem, const Device& device) const {
    return detail::explain(pointers(), problem, device);
  }
  const C* find(std::string_view name) const {
    for (const C& candidate : candidates_)
      if (candidate.name == name) return &candidate;
    return nullptr;
  }
  auto begin() const { return candidates_.begin(); }
  auto end() const { return candidates_.end(); }

 private:
  std::vector<const Candidate*> pointers() const {
    std::vector<const Candidate*> all;
    for (const C& candidate : candidates_) all.push_back(&candidate);
    return all;
  }
  std::deque<C> candidates_;  // elements never move
};

// --- Linear operations: y[T,N] = x[T,K] · W[N,K]^T (+ bias) on the rows of W
// ----------------------

/// How a linear operation is run on a CPU.
struct LinearCandidate : Candidate {
  size_t (*workspace_bytes)(const Problem& problem) = nullptr;
  /// `product` agrees with the problem; the workspace has workspace_bytes().
  void (*run)(const format::RowsView& rows, const format::RowProduct& product, void* workspace,
              const Executor& executor) = nullptr;
};
using LinearCandidates = CandidateList<LinearCandidate>;

/// A candidate for one problem, and the scratch it needs. Running it allocates and locks nothing.
struct LinearPlan {
  Problem problem;
  const LinearCandidate* candidate = nullptr;
  size_t workspace_bytes = 0;
};
Result<LinearPlan> plan_linear(const LinearCandidates& candidates, const Problem& problem,
                               const Device& device);

/// What every linear kernel of the CPU asks for: host memory, unquantised values, at most
/// format::kMaxTokens tokens.
Support supports_rows(const Problem& problem, const Device& device);
/// The same where fp8 codes are multiplied too.
Support supports_rows_or_fp8(const Problem& problem, const Device& device);
/// `vdpbf16ps` multiplies bf16 with bf16, and flushes denormals.
Support supports_bf16_dot(const Problem& problem, const Device& device);
/// What files of kernels for x86 are compiled with.
Support needs_vbmi2(const Device& device);
Support needs_avx2(const Device& device);
Support needs_avx2_f16c(const Device& device);

/// The candidate that runs kImplementations.
template <const format::RowImplementations& kImplementations>
LinearCandidate row_candidate(std::string name,
                              Support (*supports)(const Problem&, const Device&)) {
  return {{std::move(name), supports},
          [](const Problem& problem) {
            return format::row_product_workspace_bytes(problem.tokens, problem.inputs);
          },
          [](const format::RowsView& rows, const format::RowProduct& product, void* workspace,
             const Executor& executor) {
            format::run_row_product(kImplementations.for_values(rows.dtype), rows, product,
                                    workspace, executor);
          }};
}
/// The candidate that runs the float64 definition.
LinearCandidate reference_candidate(Support (*supports)(const Problem&, const Device&));

}  // namespace lacuna::kernels

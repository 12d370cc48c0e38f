#include "lacuna/bench/compare.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <memory>

#include "lacuna/bench/stream_read.h"
#include "lacuna/core/clock.h"
#include "lacuna/core/random.h"
#include "lacuna/io/file.h"
#include "lacuna/io/lines.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/model/torch.h"

namespace lacuna::bench {
namespace {

using kernels::Problem;

constexpr int64_t kWarmUpRounds = 2;
constexpr size_t kTimedInATurn = 5;
constexpr double kMostSettleTimes = 10;
constexpr int64_t kMostRounds = 20000;
/// Rows of W that the float64 reference takes at a time: as float64 they are four times as large.
constexpr int64_t kReferenceRows = 1024;

/// Copies of a weight in one layout, handed out in turn: nobody meets a copy again before all
/// others have been used.
class Copies {
 public:
  void add(std::unique_ptr<Packed> copy) { copies_.push_back(std::move(copy)); }
  const Packed& first() const { return *copies_.front(); }
  const Packed& next() { return *copies_[next_++ % copies_.size()]; }
  size_t count() const { return copies_.size(); }

 private:
  std::vector<std::unique_ptr<Packed>> copies_;
  size_t next_ = 0;
};

/// A problem with its weight and what its products must be.
struct Case {
  Problem problem;
  bool dense_rival = false;  ///< there for the comparison alone
  Weight weight;
  at::Tensor exact, weight_sums;  ///< float64 [T,N]
  std::map<std::string, Copies> layouts;
};

/// Someone whose first output was right.
struct Entry {
  Case* of = nullptr;
  Contender contender;
  Copies* copies = nullptr;
  at::Tensor last_y;
  std::vector<double> samples_us;
};

bool same_shape(const Problem& a, const Problem& b) { return dense_problem(a) == dense_problem(b); }

/// x[T,K]: standard normal, in the type of the activations.
at::Tensor random_activations(const Problem& problem, uint64_t seed) {
  at::Tensor x = at::empty({problem.tokens, problem.inputs}, at::kFloat);
  float* values = x.mutable_data_ptr<float>();
  for (int64_t i = 0; i < x.numel(); ++i)
    values[i] = static_cast<float>(random_normal(seed, 0, static_cast<uint64_t>(i)));
  return x.to(model::scalar_type(problem.activations));
}

/// The product and the sums of magnitudes in float64, some rows of W at a time. Their own rounding
/// (K 2^-53) is far below one float32 rounding, of which the bounds have more than they count.
void make_reference(Case& c, const at::Tensor& x) {
  const at::Tensor wide = x.to(at::kDouble), magnitudes = wide.abs();
  std::vector<at::Tensor> exact, sums;
  for (int64_t row = 0; row < c.problem.outputs; row += kReferenceRows) {
    const int64_t rows = std::min(kReferenceRows, c.problem.outputs - row);
    const at::Tensor w = c.weight.dense.narrow(0, row, rows).to(at::kDouble);
    exact.push_back(at::linear(wide, w));
    sums.push_back(at::linear(magnitudes, w.abs()));
  }
  c.exact = at::cat(exact, 1);
  c.weight_sums = at::cat(sums, 1);
}

std::string check(const Case& c, const Contender& contender, const at::Tensor& x,
                  const at::Tensor& y) {
  return wrong_output(y, c.exact, c.weight_sums, contender.bound(c.problem),
                      contender.slack ? contender.slack(c.weight, x) : at::Tensor());
}

/// Packs the first copy and checks the first product.
/// @return empty, or what went wrong
std::string first_product(Case& c, const Contender& contender, const at::Tensor& x) {
  try {  // torch reports its failures by exceptions
    Copies& copies = c.layouts[contender.layout];
    if (copies.count() == 0) {
      auto packed = contender.pack(c.weight);
      if (!packed.ok()) return packed.error().message;
      copies.add(std::move(packed).value());
    }
    at::Tensor y = at::full({c.problem.tokens, c.problem.outputs},
                            std::numeric_limits<float>::quiet_NaN(), x.options());
    contender.run(c.problem, copies.first(), x, y);
    return check(c, contender, x, y);
  } catch (const c10::Error& error) {
    return first_line(error.what_without_backtrace());
  }
}

Status add_copies(Entry& entry, double rotated_bytes) {
  const auto bytes = static_cast<double>(entry.copies->first().bytes());
  while (static_cast<double>(entry.copies->count()) * bytes < rotated_bytes) {
    LACUNA_TRY(auto packed, entry.contender.pack(entry.of->weight));
    entry.copies->add(std::move(packed));
  }
  return {};
}

double time_us(Entry& entry, const at::Tensor& x) {
  at::Tensor y;
  const Packed& weight = entry.copies->next();
  const auto start = Clock::now();
  entry.contender.run(entry.of->problem, weight, x, y);
  const std::chrono::duration<double, std::micro> us = Clock::now() - start;
  entry.last_y = std::move(y);
  return us.count();
}

/// A contender's turn: products in a row, as in a decode step. Those before every copy has been
/// used once, or until `settle_us` are over if that is later (ten times as long at most), don't
/// count: after another program's pace a machine takes a while to give this one its own (clock,
/// power, memory), and what nobody has read for a second comes at half the speed of what a model
/// reads for each token.
/// @return the median of the others
double turn_us(Entry& entry, const at::Tensor& x, double settle_us) {
  size_t products = 0;
  for (double spent = 0; spent < settle_us || (spent > 0 && spent < kMostSettleTimes * settle_us &&
                                               products < entry.copies->count());
       ++products)
    spent += time_us(entry, x);
  std::vector<double> us(settle_us > 0 ? kTimedInATurn : 1);
  for (double& one : us) one = time_us(entry, x);
  std::ranges::nth_element(us, us.begin() + static_cast<int64_t>(us.size()) / 2);
  return us[us.size() / 2];
}

/// Takes those out who are `slowest` times as slow as the fastest of their problem (each one's
/// faster of two products): a turn of theirs would take longer than everyone else's together.
void drop_slow(std::vector<Entry>& entries, const at::Tensor& x, double slowest,
               std::vector<Untimed>& dropped) {
  if (slowest <= 0) return;
  std::map<const Entry*, double> us;
  std::map<const Case*, double> fastest;
  for (Entry& entry : entries) {
    const double best = us[&entry] = std::min(time_us(entry, x), time_us(entry, x));
    const auto [at, first] = fastest.emplace(entry.of, best);
    if (!first) at->second = std::min(at->second, best);
  }
  std::vector<Entry> kept;
  for (Entry& entry : entries) {
    const double times = us[&entry] / fastest[entry.of];
    if (times < slowest)
      kept.push_back(std::move(entry));
    else
      dropped.push_back({entry.of->problem.text(), entry.contender.name,
                         fmt::format("right, but {:.0f} times as slow as the fastest", times)});
  }
  entries = std::move(kept);
}

/// All take turns until the time is over; every other round in reverse, so that nobody always
/// follows the same one.
Result<int64_t> run_rounds(std::vector<Entry>& entries, const at::Tensor& x,
                           const CompareOptions& options, const std::atomic<bool>* interrupted) {
  auto start = Clock::now();
  int64_t rounds = 0;
  for (int64_t round = -kWarmUpRounds; rounds < kMostRounds; ++round) {
    if (interrupted != nullptr && interrupted->load())
      return Error{Code::kInterrupted, "interrupted"};
    if (round == 0) start = Clock::now();
    for (size_t i = 0; i < entries.size(); ++i) {
      Entry& entry = entries[round % 2 == 0 ? i : entries.size() - 1 - i];
      const double us = turn_us(entry, x, options.settle_us);
      if (round >= 0) entry.samples_us.push_back(us);
    }
    if (round < 0) continue;
    ++rounds;
    if (rounds >= options.least_rounds && seconds_since(start) >= options.seconds) break;
  }
  return rounds;
}

Record record_of(const Entry& entry, double read) {
  const Problem& problem = entry.of->problem;
  Record record{.problem = problem.text(),
                .candidate = entry.contender.name,
                .selectable = entry.contender.candidate,
                .us = summarize(entry.samples_us),
                .copies = static_cast<int64_t>(entry.copies->count()),
                .weight_bytes = entry.copies->first().bytes(),
                .scratch_bytes = entry.contender.scratch_bytes(problem),
                .flops = 2.0 * static_cast<double>(problem.tokens) *
                         static_cast<double>(problem.outputs) * static_cast<double>(problem.inputs),
                .max_error = max_error(entry.last_y, entry.of->exact),
                .samples_us = entry.samples_us};
  record.gb_per_second = static_cast<double>(record.weight_bytes) / record.us.median / 1e3;
  record.gflop_per_second = record.flops / record.us.median / 1e3;
  if (read > 0) record.share = record.gb_per_second / read;
  return record;
}

/// The problems with the dense one that they are compared with, each with its operation.
Result<std::vector<std::pair<Case, const kernels::LinearOperation*>>> make_cases(
    const std::vector<Problem>& problems, bool rivals) {
  LACUNA_CHECK(check_one_shape(problems));
  std::vector<std::pair<Case, const kernels::LinearOperation*>> cases;
  bool has_dense = !rivals;
  for (const Problem& problem : problems) {
    LACUNA_TRY(const auto* operation, kernels::find_linear_operation(problem.operation));
    has_dense |= problem == dense_problem(problem);
    cases.emplace_back(Case{.problem = problem}, operation);
  }
  if (has_dense) return cases;
  const Problem dense = dense_problem(problems.front());
  LACUNA_TRY(const auto* operation, kernels::find_linear_operation(dense.operation));
  cases.emplace_back(Case{.problem = dense, .dense_rival = true}, operation);
  return cases;
}

}  // namespace

CompareOptions CompareOptions::quick() {
  return {.seconds = 0,
          .least_rounds = 5,
          .settle_us = 0,
          .rotated_bytes = 0,
          .stream_bytes = 1 << 24,
          .slowest = 0};
}

std::string wrong_output(const at::Tensor& y, const at::Tensor& exact,
                         const at::Tensor& weight_sums, const kernels::ErrorBound& bound,
                         const at::Tensor& slack) {
  if (!y.defined() || y.sizes() != exact.sizes()) return "wrong output: not of the shape [T, N]";
  const at::Tensor got = y.to(at::kDouble).contiguous();
  const double* values = got.const_data_ptr<double>();
  const double* wanted = exact.const_data_ptr<double>();
  const double* sums = weight_sums.const_data_ptr<double>();
  const double* more = slack.defined() ? slack.const_data_ptr<double>() : nullptr;
  for (int64_t i = 0; i < got.numel(); ++i) {
    double most = bound(wanted[i], sums[i]);
    if (more != nullptr) most += (1 + 0x1p-8) * more[i];     // it is rounded to the type of y too
    if (std::fabs(values[i] - wanted[i]) <= most) continue;  // false for NaN
    return fmt::format("wrong output: y[{}, {}] is off (got {:g}; need {:g} within {:.2g})",
                       i / got.size(1), i % got.size(1), values[i], wanted[i], most);
  }
  return "";
}

Result<Comparison> compare(const std::vector<Problem>& problems, const CompareOptions& options,
                           const std::function<void(const std::string&)>& step,
                           const std::atomic<bool>* interrupted) {
  const c10::InferenceMode inference;
  const auto say = [&](const std::string& what) {
    if (step) step(what);
  };
  LACUNA_TRY(auto cases, make_cases(problems, options.rivals));
  Comparison result{.problems = problems};

  const at::Tensor x = random_activations(problems.front(), options.seed + 1);
  std::vector<Entry> entries;
  for (auto& [c, operation] : cases) {
    const std::string text = c.problem.text();
    std::vector<Contender> willing;
    for (Contender& contender : contenders(*operation)) {
      if (!options.rivals && !contender.candidate) continue;
      const kernels::Support support = contender.supports(c.problem);
      if (support) {
        willing.push_back(std::move(contender));
      } else {
        result.refused.push_back({text, contender.name, support.refusal()});
      }
    }
    if (willing.empty()) continue;  // a weight for nobody
    say(fmt::format("{}: weight and reference", text));
    LACUNA_TRY(c.weight, random_weight(c.problem, options.seed));
    make_reference(c, x);
    for (Contender& contender : willing) {
      if (interrupted != nullptr && interrupted->load())
        return Error{Code::kInterrupted, "interrupted"};
      const std::string wrong = first_product(c, contender, x);
      if (!wrong.empty()) {
        result.failed.push_back({text, contender.name, wrong});
        continue;
      }
      Copies* copies = &c.layouts[contender.layout];
      entries.push_back({.of = &c, .contender = std::move(contender), .copies = copies});
    }
  }
  if (entries.empty()) return result;

  drop_slow(entries, x, options.slowest, result.refused);
  say(fmt::format("{}: copies", problems.front().text()));
  for (Entry& entry : entries) LACUNA_CHECK(add_copies(entry, options.rotated_bytes));
  std::optional<StreamRead> read;
  if (options.stream_bytes > 0) {
    read.emplace(static_cast<size_t>(options.stream_bytes));
    result.read_before = read->gb_per_second(model::torch_executor());
  }
  say(fmt::format("{}: {} take turns", problems.front().text(), entries.size()));
  LACUNA_TRY(result.rounds, run_rounds(entries, x, options, interrupted));
  if (read) result.read_after = read->gb_per_second(model::torch_executor());

  // The last products met other copies than those that were checked first.
  std::erase_if(entries, [&](const Entry& entry) {
    const Case& c = *entry.of;
    const std::string wrong = check(c, entry.contender, x, entry.last_y);
    if (!wrong.empty()) result.failed.push_back({c.problem.text(), entry.contender.name, wrong});
    return !wrong.empty();
  });
  for (const Entry& entry : entries)
    result.records.push_back(record_of(entry, (result.read_before + result.read_after) / 2));
  set_ratios(result, dense_problem(problems.front()));
  return result;
}

double max_error(const at::Tensor& y, const at::Tensor& exact) {
  const double most = exact.abs().max().item<double>();
  const double off = (y.to(at::kDouble) - exact).abs().max().item<double>();
  return most > 0 ? off / most : off;
}

void set_ratios(Comparison& comparison, const Problem& dense) {
  const Record* best = nullptr;
  for (const Record& record : comparison.records)
    if (record.problem == dense.text() && (best == nullptr || record.us.median < best->us.median))
      best = &record;
  if (best == nullptr) return;
  comparison.baseline = best->problem + " " + best->candidate;
  for (Record& record : comparison.records)
    record.ratio = summarize(paired_ratios(best->samples_us, record.samples_us));
}

Status check_one_shape(const std::vector<Problem>& problems) {
  if (problems.empty()) return usage_error("bench: no problem (need at least one). Give one.");
  for (const Problem& problem : problems)
    if (!same_shape(problem, problems.front()))
      return usage_error(
          "{}: not of one shape with {} (need the same values, activations, N, K and T). Compare "
          "them apart.",
          problem.text(), problems.front().text());
  return {};
}

std::vector<std::vector<Problem>> same_shapes(const std::vector<Problem>& problems) {
  std::vector<std::vector<Problem>> groups;
  for (const Problem& problem : problems) {
    const auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& candidate) {
      return same_shape(candidate.front(), problem);
    });
    if (group == groups.end()) {
      groups.push_back({problem});
    } else if (std::find(group->begin(), group->end(), problem) == group->end()) {
      group->push_back(problem);
    }
  }
  return groups;
}

Result<std::vector<Problem>> read_cases(const std::string& file) {
  LACUNA_TRY(const std::string text, io::read_text(file));
  std::vector<Problem> problems;
  LACUNA_CHECK(io::for_each_line(text, [&](size_t number, std::string_view line) -> Status {
    line = line.substr(0, line.find('#'));
    while (line.ends_with(' ') || line.ends_with('\t')) line.remove_suffix(1);
    if (line.empty()) return {};
    const auto problem = Problem::parse(line);
    if (!problem.ok()) return bad_input("{}: line {}: {}", file, number, problem.error().message);
    problems.push_back(*problem);
    return {};
  }));
  if (problems.empty())
    return bad_input("{}: holds no problem (need one a line). See bench/cases/.", file);
  return problems;
}

}  // namespace lacuna::bench

// Every candidate of the linear operations against the float64 definition, wherever the support
// matrix says that it must work.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <set>
#include <sstream>

#include "format/random_matrix.h"
#include "lacuna/kernels/error_bound.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/kernels/linear_bitmap/linear_bitmap.h"
#include "lacuna/kernels/linear_bsr/linear_bsr.h"
#include "lacuna/kernels/linear_csr/linear_csr.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/kernels/linear_nm/linear_nm.h"
#include "lacuna/kernels/linear_stream/linear_stream.h"
#include "lacuna/kernels/linear_stream/value_chunk.h"

namespace lacuna::kernels {
namespace {

using format::Pattern;
using format::PatternKind;
using format::RowProduct;
using format::RowsView;
using lacuna::testing::bits_of;
using lacuna::testing::MatrixBits;
using lacuna::testing::random_matrix;
using lacuna::testing::value_of;

// --- The support matrix
// ---------------------------------------------------------------------------

struct Row {
  std::string operation, candidate;
  std::vector<DType> values, activations;
  int64_t first_token = 0, last_token = 0;
  std::vector<Pattern> patterns;
  std::vector<std::string> needs;
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

std::vector<DType> dtypes(const std::string& text) {
  std::vector<DType> types;
  for (const std::string& name : split(text, ','))
    types.push_back(name == "f32"    ? DType::kF32
                    : name == "bf16" ? DType::kBF16
                    : name == "fp8"  ? DType::kF8E4M3
                                     : DType::kF16);
  return types;
}

const std::vector<Row>& support_matrix() {
  static const std::vector<Row> rows = [] {
    std::ifstream file(std::string(LACUNA_SOURCE_DIR) + "/tests/kernels/support_matrix.txt");
    std::vector<Row> all;
    for (std::string line; std::getline(file, line);) {
      if (line.empty() || line[0] == '#') continue;
      std::istringstream fields(line);
      Row row;
      std::string values, activations, tokens, patterns, needs;
      fields >> row.operation >> row.candidate >> values >> activations >> tokens >> patterns >>
          needs;
      row.values = dtypes(values);
      row.activations = dtypes(activations);
      const auto ends = split(tokens, '-');  // "1-16", "17-any"
      row.first_token = std::stoll(ends[0]);
      row.last_token = ends[1] == "any" ? std::numeric_limits<int64_t>::max() : std::stoll(ends[1]);
      for (const std::string& text : split(patterns, ','))
        row.patterns.push_back(*Pattern::parse(text));
      if (needs != "-") row.needs = split(needs, ',');
      all.push_back(row);
    }
    return all;
  }();
  return rows;
}

LinearCandidates& candidates_of(const std::string& operation) {
  return (*find_linear_operation(operation))->candidates();
}

bool& feature(CpuFeatures& cpu, const std::string& name) {
  static const std::map<std::string, bool CpuFeatures::*> members = {
      {"avx2", &CpuFeatures::avx2},
      {"fma", &CpuFeatures::fma},
      {"f16c", &CpuFeatures::f16c},
      {"avx512_vbmi2", &CpuFeatures::avx512_vbmi2},
      {"avx512_bf16", &CpuFeatures::avx512_bf16},
      {"amx_bf16", &CpuFeatures::amx_bf16}};
  return cpu.*members.at(name);
}

Device device_with(const std::vector<std::string>& features) {
  Device device;
  for (const std::string& name : features) feature(device.cpu, name) = true;
  return device;
}

bool runs_here(const Row& row) {
  CpuFeatures here = cpu_features();
  for (const std::string& name : row.needs)
    if (!feature(here, name)) return false;
  return true;
}

Problem problem_of(const Row& row, DType values, DType activations, int64_t tokens,
                   const Pattern& pattern) {
  return {.operation = row.operation,
          .values = values == DType::kF8E4M3 ? Values::kFP8 : values_of(values),
          .activations = activations,
          .outputs = 100,
          .inputs = 100,
          .tokens = tokens,
          .pattern = pattern,
          .sparsity = 0.5};
}

TEST(SupportMatrix, has_a_line_for_every_candidate_and_a_candidate_for_every_line) {
  ASSERT_GE(support_matrix().size(), 29u);
  std::set<std::string> listed;
  for (const Row& row : support_matrix()) {
    EXPECT_NE(candidates_of(row.operation).find(row.candidate), nullptr) << row.candidate;
    listed.insert(row.operation + ":" + row.candidate);
  }
  for (const LinearOperation& operation : linear_operations())
    for (const LinearCandidate& candidate : operation.candidates())
      EXPECT_TRUE(listed.contains(std::string(operation.name) + ":" + candidate.name))
          << candidate.name;
}

TEST(SupportMatrix, every_candidate_takes_what_its_line_says_and_nothing_else) {
  constexpr DType kAll[] = {DType::kF32, DType::kBF16, DType::kF16};
  constexpr DType kAllValues[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF8E4M3};
  const auto has = [](const auto& list, const auto& item) {
    return std::find(list.begin(), list.end(), item) != list.end();
  };
  std::vector<Pattern> patterns = {Pattern{}, Pattern::block(32, 32)};
  for (const Row& row : support_matrix())
    for (const Pattern& pattern : row.patterns)
      if (!has(patterns, pattern)) patterns.push_back(pattern);
  for (const Row& row : support_matrix()) {
    const LinearCandidate& candidate = *candidates_of(row.operation).find(row.candidate);
    const Device able = device_with(row.needs);
    for (const DType values : kAllValues)
      for (const DType activations : kAll)
        for (const Pattern& pattern : patterns)
          for (const int64_t tokens :
               {1, 2, 3, 4, 5, 8, 11, 12, 13, 14, 15, 16, 17, 18, 20, 64, 65, 512, 100000}) {
            const Problem problem = problem_of(row, values, activations, tokens, pattern);
            const bool expected = has(row.values, values) && has(row.activations, activations) &&
                                  has(row.patterns, pattern) && tokens >= row.first_token &&
                                  tokens <= row.last_token;
            const Support support = candidate.supports(problem, able);
            ASSERT_EQ(static_cast<bool>(support), expected)
                << row.candidate << " " << problem.text() << " " << support.refusal();
            if (!expected) continue;
            for (const std::string& name : row.needs) {
              Device lacking = able;
              feature(lacking.cpu, name) = false;
              ASSERT_FALSE(candidate.supports(problem, lacking)) << row.candidate << " " << name;
            }
            Device gpu = able;
            gpu.gpu.emplace();
            ASSERT_FALSE(candidate.supports(problem, gpu));
          }
  }
}

// --- Running a candidate
// --------------------------------------------------------------------------

struct Target {
  const char* operation;
  Pattern pattern;
};
const Target kTargets[] = {{"linear_dense", Pattern{}},
                           {"linear_bitmap", Pattern::unstructured()},
                           {"linear_nm", Pattern::keep_of(2, 4)},
                           {"linear_nm", Pattern::keep_of(1, 4)},
                           {"linear_nm", Pattern::keep_of(4, 8)},
                           {"linear_nm", Pattern::keep_of(8, 16)},
                           {"linear_nm", Pattern::keep_of(3, 5)},
                           {"linear_nm", Pattern::keep_of(31, 64)},
                           {"linear_bsr", Pattern::block(32, 32)},
                           {"linear_bsr", Pattern::block(5, 64)},
                           {"linear_bsr", Pattern::block(16, 5)},
                           {"linear_bsr", Pattern::block(1, 8)},
                           {"linear_bsr", Pattern::block(4, 4)},
                           {"linear_bsr", Pattern::block(8, 8)},
                           {"linear_bsr", Pattern::block(16, 1)},
                           {"linear_csr", Pattern::unstructured()},
                           {"linear_stream", Pattern::unstructured()},
                           {"linear_stream", Pattern::keep_of(2, 4)},
                           {"linear_stream", Pattern::keep_of(3, 5)}};

/// The same bytes at an odd address, the way a file may have them.
Bytes shifted(const Bytes& bytes) {
  std::vector<std::byte> moved(bytes.size() + 1);
  std::copy(bytes.span().begin(), bytes.span().end(), moved.begin() + 1);
  return Bytes::take(std::move(moved)).slice(1, bytes.size());
}

/// A weight in the form that the candidates of one operation take.
class Weight {
 public:
  Weight(const MatrixBits& bits, const Target& target)
      : dense_(bits.tensor(1)),
        dense_view_(
            format::dense_rows(dense_.bytes.data(), bits.dtype(), bits.rows(), bits.columns())),
        view_(dense_view_) {
    if (target.pattern.kind == PatternKind::kDense) return;
    auto matrix = *format::compress(dense_, target.pattern);
    for (Bytes* part : {&matrix.values, &matrix.block_columns, &matrix.block_offsets})
      *part = shifted(*part);
    if (target.operation == linear_csr::kOperation) {
      slices_ = linear_csr::Slices::pack(matrix).value();
      view_ = slices_->view();
    } else if (target.operation == linear_stream::kOperation && bits.dtype() != DType::kF32) {
      stream_ = linear_stream::ValueStream::pack(matrix).value();
      view_ = stream_->view();
    } else {
      compact_ = format::CompactRows::make(std::move(matrix)).value();
      view_ = compact_->view();
    }
  }
  const RowsView& view() const { return view_; }
  /// The same weight by its dense rows: what the definition is applied to.
  const RowsView& dense_view() const { return dense_view_; }

 private:
  Tensor dense_;
  RowsView dense_view_;
  std::optional<format::CompactRows> compact_;
  std::optional<linear_csr::Slices> slices_;
  std::optional<linear_stream::ValueStream> stream_;
  RowsView view_;
};

/// x, bias and y with gaps between tokens and canaries around y.
class Operands {
 public:
  template <class Draw>
  Operands(DType dtype, int64_t tokens, int64_t inputs, int64_t outputs, bool bias, Draw draw)
      : dtype_(dtype),
        tokens_(tokens),
        inputs_(inputs),
        outputs_(outputs),
        width_(size_bytes(dtype)) {
    x_.resize(1 + static_cast<size_t>(tokens * x_stride()) * width_, 0xff);  // the gaps are NaN
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < inputs; ++k) put(x_, 1 + (t * x_stride() + k) * width_, draw(t, k));
    if (bias) {
      bias_.resize(1 + static_cast<size_t>(outputs) * width_);
      for (int64_t n = 0; n < outputs; ++n) put(bias_, 1 + n * width_, draw(tokens, n));
    }
  }
  int64_t x_stride() const { return inputs_ + 5; }
  int64_t y_stride() const { return outputs_ + 3; }
  int64_t tokens() const { return tokens_; }
  RowProduct product() {
    y_.assign(kCanary + static_cast<size_t>(tokens_ * y_stride()) * width_ + kCanary, 0xff);
    return {.dtype = dtype_,
            .tokens = tokens_,
            .x = x_.data() + 1,
            .x_stride = x_stride(),
            .y = y_.data() + kCanary,
            .y_stride = y_stride(),
            .bias = bias_.empty() ? nullptr : bias_.data() + 1};
  }
  uint32_t y_bits(int64_t t, int64_t n) const {
    uint32_t bits = 0;
    std::memcpy(&bits, y_.data() + kCanary + (t * y_stride() + n) * width_, width_);
    return bits;
  }
  float y(int64_t t, int64_t n) const { return value_of(y_bits(t, n), dtype_); }
  double x(int64_t t, int64_t k) const {
    uint32_t bits = 0;
    std::memcpy(&bits, x_.data() + 1 + (t * x_stride() + k) * width_, width_);
    return value_of(bits, dtype_);
  }
  /// Nothing but y[t, 0..N) was written.
  bool surroundings_intact() const {
    for (size_t i = 0; i < y_.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i) - static_cast<int64_t>(kCanary);
      const auto element = at / static_cast<int64_t>(width_);
      const bool inside =
          at >= 0 && element < tokens_ * y_stride() && element % y_stride() < outputs_;
      if (!inside && y_[i] != 0xff) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kCanary = 65;  // odd: y isn't aligned either
  void put(std::vector<uint8_t>& to, size_t at, float value) {
    const uint32_t bits = bits_of(value, dtype_);
    std::memcpy(to.data() + at, &bits, width_);
  }
  DType dtype_;
  int64_t tokens_, inputs_, outputs_;
  size_t width_;
  std::vector<uint8_t> x_, bias_, y_;
};

void run(const LinearCandidate& candidate, const Weight& weight, Operands& operands,
         const Executor& executor = Executor::serial()) {
  const RowProduct product = operands.product();
  const Problem problem{.activations = product.dtype,
                        .outputs = weight.view().rows,
                        .inputs = weight.view().columns,
                        .tokens = product.tokens};
  std::vector<uint8_t> workspace(candidate.workspace_bytes(problem), 0xff);  // NaN everywhere
  candidate.run(weight.view(), product, workspace.data(), executor);
}

// --- Comparators
// ----------------------------------------------------------------------------------

/// The bound of a candidate (kernels/error_bound.h).
double bound(const std::string& candidate, DType dtype, int64_t columns, double exact,
             double weight_sum, double flushed) {
  return ErrorBound{float_roundings(candidate, columns), columns, dtype,
                    flushes_denormals(candidate)}(exact, weight_sum, flushed);
}

struct Case {
  Row row;
  const LinearCandidate* candidate;
};

/// The candidates that the matrix wants and this CPU can run. Others are named, not skipped
/// silently. Those that would not be asked for so few tokens take them here.
std::vector<Case> cases(const std::string& operation, DType values, DType activations,
                        const Pattern& pattern, int64_t tokens) {
  static std::set<std::string> named;
  std::vector<Case> all;
  for (const Row& row : support_matrix()) {
    const auto has = [](const auto& list, const auto& item) {
      return std::find(list.begin(), list.end(), item) != list.end();
    };
    if (row.operation != operation || !has(row.values, values) ||
        !has(row.activations, activations) || !has(row.patterns, pattern) ||
        tokens > row.last_token)
      continue;
    if (runs_here(row)) {
      all.push_back({row, candidates_of(operation).find(row.candidate)});
    } else if (named.insert(operation + ":" + row.candidate).second) {
      std::printf("[ NOT RUN  ] %s:%s: this CPU can't\n", operation.c_str(), row.candidate.c_str());
    }
  }
  return all;
}

constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

float small_integer(uint64_t seed, int64_t a, int64_t b) {
  return static_cast<float>(static_cast<int>(random_bits(seed, a, b) % 17) - 8);
}

/// Small integers: every float32 sum is exact, so the bits must be those of the rounded exact sum.
void check_exact(const Target& target, DType values, DType activations, int64_t outputs,
                 int64_t inputs, int64_t tokens, bool bias) {
  const uint64_t seed = static_cast<uint64_t>(outputs * 1000003 + inputs * 1009 + tokens);
  const Weight weight(
      random_matrix(values, outputs, inputs, target.pattern, 0.5, seed,
                    [&](int64_t n, int64_t k) { return small_integer(seed + 1, n, k); }),
      target);
  Operands operands(activations, tokens, inputs, outputs, bias,
                    [&](int64_t t, int64_t k) { return small_integer(seed + 2, t, k); });
  std::vector<double> exact(static_cast<size_t>(tokens * outputs));
  format::reference_row_product(weight.dense_view(), operands.product(), exact.data());
  for (const Case& c : cases(target.operation, values, activations, target.pattern, tokens)) {
    run(*c.candidate, weight, operands);
    const auto label = ::testing::Message()
                       << c.candidate->name << " " << long_name(values) << " x "
                       << long_name(activations) << " " << target.pattern.text() << " " << outputs
                       << "x" << inputs << "x" << tokens;
    ASSERT_TRUE(operands.surroundings_intact()) << label;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t n = 0; n < outputs; ++n)
        ASSERT_EQ(operands.y_bits(t, n),
                  bits_of(static_cast<float>(exact[t * outputs + n]), activations))
            << label << " t=" << t << " n=" << n;
  }
}

TEST(Linear, exact_on_small_integers_for_all_widths_and_token_counts) {
  std::vector<int64_t> widths;
  for (int64_t k = 1; k <= 17; ++k) widths.push_back(k);
  for (const int64_t k : {31, 32, 33, 63, 64, 65, 95, 100, 257}) widths.push_back(k);
  for (const Target& target : kTargets)
    for (const DType values : kTypes)
      for (const DType activations : kTypes)
        for (const int64_t inputs : widths)
          for (int64_t tokens = 1; tokens <= 16; ++tokens)
            check_exact(target, values, activations, 5, inputs, tokens, tokens % 2 == 0);
}

/// All that takes more than 16 tokens: bf16 everywhere, the other types under a bitmap.
std::vector<std::pair<Target, DType>> many_token_targets() {
  std::vector<std::pair<Target, DType>> all;
  for (const Target& target : kTargets) {
    all.push_back({target, DType::kBF16});
    if (target.pattern == Pattern::unstructured() || target.pattern == Pattern::keep_of(3, 5))
      for (const DType type : {DType::kF32, DType::kF16}) all.push_back({target, type});
  }
  return all;
}

TEST(Linear, exact_on_small_integers_for_many_tokens_of_mixed_types) {
  for (const DType values : kTypes)
    for (const DType activations : kTypes)
      for (const int64_t tokens : {17, 40})
        check_exact(kTargets[1], values, activations, 99, 300, tokens, true);
}

/// Every number of tokens on both sides of the tiles, one column, row and token more and less than
/// a tile, a block or a panel holds (kernels/tiled.h), and several of each.
TEST(Linear, exact_on_small_integers_for_many_tokens) {
  for (const auto& [target, type] : many_token_targets()) {
    for (int64_t tokens = 17; tokens <= 130; ++tokens)
      check_exact(target, type, type, 37, 71, tokens, tokens % 2 == 0);
    for (const int64_t tokens : {17, 33, 65, 130})
      for (const int64_t inputs : {1, 2, 31, 32, 33, 64, 95, 255, 256, 257, 289, 513})
        check_exact(target, type, type, 19, inputs, tokens, false);
    for (const int64_t tokens : {18, 64, 65, 97})
      for (const int64_t outputs : {1, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 129})
        check_exact(target, type, type, outputs, 67, tokens, true);
    check_exact(target, type, type, 35, 4096 + 33, 20, true);      // blocks of 4096 columns
    check_exact(target, type, type, 4200, 300, 65, true);          // panels of 512 rows
    check_exact(target, type, type, 70, 300, 2 * 256 + 17, true);  // blocks of 256, 512 tokens
  }
}

TEST(Linear, exact_on_small_integers_for_all_heights) {
  for (const Target& target : kTargets)
    for (const DType values : kTypes)
      for (const int64_t tokens : {1, 2, 3, 4, 5, 8, 9, 16}) {
        for (int64_t outputs = 1; outputs <= 17; ++outputs)
          check_exact(target, values, values, outputs, 70, tokens, true);
        for (const int64_t outputs : {63, 64, 65, 67, 129})
          check_exact(target, values, values, outputs, 70, tokens, false);
      }
}

TEST(Linear, bounded_error_on_normal_numbers) {
  for (const Target& target : kTargets)
    for (const DType values : kTypes)
      for (const DType activations : kTypes)
        for (const int64_t inputs : {1, 7, 32, 333, 2048})
          for (const int64_t tokens : {1, 4, 7, 16, 45, 80}) {
            const int64_t outputs = 9;
            const Weight weight(random_matrix(values, outputs, inputs, target.pattern, 0.5, inputs),
                                target);
            Operands operands(
                activations, tokens, inputs, outputs, true,
                [&](int64_t t, int64_t k) { return static_cast<float>(random_normal(99, t, k)); });
            std::vector<double> exact(static_cast<size_t>(tokens * outputs)), sums = exact;
            format::reference_row_product(weight.dense_view(), operands.product(), exact.data(),
                                          sums.data());
            for (const Case& c :
                 cases(target.operation, values, activations, target.pattern, tokens)) {
              run(*c.candidate, weight, operands);
              ASSERT_TRUE(operands.surroundings_intact()) << c.candidate->name;
              for (int64_t t = 0; t < tokens; ++t)
                for (int64_t n = 0; n < outputs; ++n) {
                  const size_t i = static_cast<size_t>(t * outputs + n);
                  ASSERT_LE(std::fabs(operands.y(t, n) - exact[i]),
                            bound(c.candidate->name, activations, inputs, exact[i], sums[i], 0))
                      << c.candidate->name << " " << long_name(values) << " x "
                      << long_name(activations) << " " << inputs << " t=" << t << " n=" << n;
                }
            }
          }
}

TEST(Linear, a_row_of_the_matrix_may_be_empty_or_full) {
  for (const auto& [inputs, tokens] :
       {std::pair<int64_t, int64_t>{31, 3}, {32, 3}, {100, 3}, {700, 3}, {100, 40}, {300, 70}})
    for (const DType dtype : kTypes)
      for (const Target& target : kTargets) {
        const Pattern& pattern = target.pattern;
        if (pattern.kind == PatternKind::kKeepOf) continue;  // neither
        const int64_t height = pattern.kind == PatternKind::kBlock ? pattern.block_rows : 1;
        const MatrixBits bits =
            random_matrix(dtype, 70, inputs, Pattern{}, 0, 1, [&](int64_t n, int64_t k) {
              const int64_t row = n / height;
              return row % 3 == 0 || n > 66 ? 0.0f : row % 3 == 1 ? 1.0f : small_integer(4, n, k);
            });
        const Weight weight(bits, target);
        Operands operands(dtype, tokens, inputs, 70, false,
                          [](int64_t t, int64_t k) { return small_integer(5, t, k); });
        std::vector<double> exact(static_cast<size_t>(tokens * 70));
        format::reference_row_product(weight.dense_view(), operands.product(), exact.data());
        for (const Case& c : cases(target.operation, dtype, dtype, pattern, tokens)) {
          run(*c.candidate, weight, operands);
          for (int64_t t = 0; t < tokens; ++t)
            for (int64_t n = 0; n < 70; ++n)
              ASSERT_EQ(operands.y(t, n),
                        value_of(bits_of(static_cast<float>(exact[t * 70 + n]), dtype), dtype))
                  << c.candidate->name << " n=" << n;
        }
      }
}

/// Far columns are reached over zeros between them, and rows of very different lengths share a
/// slice.
TEST(Linear, exact_at_every_sparsity_and_far_columns) {
  for (const int64_t inputs : {255, 256, 257, 511, 1000, 3000})
    for (const double sparsity : {0.0, 0.7, 0.95, 0.99, 0.999, 1.0})
      for (const int64_t tokens : {1, 2, 3, 7, 16}) {
        const uint64_t seed = static_cast<uint64_t>(inputs + tokens);
        for (const Target& target : {Target{"linear_csr", Pattern::unstructured()},
                                     Target{"linear_stream", Pattern::unstructured()},
                                     Target{"linear_bsr", Pattern::block(8, 32)},
                                     Target{"linear_bsr", Pattern::block(2, 8)},
                                     Target{"linear_bsr", Pattern::block(33, 64)},
                                     Target{"linear_bsr", Pattern::block(3, 7)}}) {
          const Weight weight(
              random_matrix(DType::kBF16, 37, inputs, target.pattern, sparsity, seed,
                            [&](int64_t n, int64_t k) {
                              return n == 5 && k < inputs - 1 ? 0.0f : small_integer(seed, n, k);
                            }),
              target);
          Operands operands(DType::kF32, tokens, inputs, 37, true,
                            [](int64_t t, int64_t k) { return small_integer(5, t, k); });
          std::vector<double> exact(static_cast<size_t>(tokens * 37));
          format::reference_row_product(weight.dense_view(), operands.product(), exact.data());
          for (const LinearCandidate& candidate : candidates_of(target.operation)) {
            const Problem problem{.activations = DType::kF32,
                                  .outputs = 37,
                                  .inputs = inputs,
                                  .tokens = tokens,
                                  .pattern = target.pattern,
                                  .sparsity = sparsity};
            if (!candidate.supports(problem, Device::this_cpu())) continue;  // named by cases()
            run(candidate, weight, operands);
            ASSERT_TRUE(operands.surroundings_intact()) << candidate.name;
            for (int64_t t = 0; t < tokens; ++t)
              for (int64_t n = 0; n < 37; ++n)
                ASSERT_EQ(operands.y(t, n), static_cast<float>(exact[t * 37 + n]))
                    << candidate.name << " " << target.pattern.text() << " " << inputs << " "
                    << sparsity << " t=" << t << " n=" << n;
          }
        }
      }
}

TEST(Linear, an_empty_matrix_gives_the_bias_and_no_rows_give_nothing) {
  for (const Target& target : kTargets)
    for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{5, 0}, {0, 40}, {0, 0}})
      for (const int64_t tokens : {2, 18}) {
        const Weight weight(MatrixBits(DType::kBF16, outputs, inputs), target);
        Operands operands(DType::kBF16, tokens, inputs, outputs, true,
                          [](int64_t t, int64_t k) { return small_integer(6, t, k); });
        for (const Case& c :
             cases(target.operation, DType::kBF16, DType::kBF16, target.pattern, tokens)) {
          run(*c.candidate, weight, operands);
          EXPECT_TRUE(operands.surroundings_intact()) << c.candidate->name;
          for (int64_t n = 0; n < outputs; ++n)
            EXPECT_EQ(operands.y(1, n), small_integer(6, tokens, n)) << c.candidate->name;
        }
      }
}

/// NaN and infinity end where the dense product has them: 0 · infinity is NaN for a dropped weight.
/// Denormal weights and inputs keep their worth, except where the candidate says that it flushes.
TEST(Linear, nan_infinity_minus_zero_and_denormals) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t inputs = 40, outputs = 12, tokens = 5;
  for (const Target& target : kTargets)
    for (const DType dtype : kTypes) {
      const float tiny = dtype == DType::kF16 ? 0x1p-24f : 0x1p-132f;  // denormal in each type
      const float large = dtype == DType::kF16 ? 0x1p12f : 0x1p120f;
      const MatrixBits bits =
          random_matrix(dtype, outputs, inputs, target.pattern, 0.5, 3, [&](int64_t n, int64_t k) {
            if (n == 0 && k % 7 == 0) return nan;
            if (n == 1 && k % 5 == 0) return inf;
            if (n == 2) return tiny * static_cast<float>(1 + k % 5);
            if (n == 3) return -0.0f;
            if (n == 4 && k % 2) return -tiny;
            return small_integer(8, n, k);
          });
      const Weight weight(bits, target);
      Operands operands(dtype, tokens, inputs, outputs, false, [&](int64_t t, int64_t k) {
        if (t == 0) return large;
        if (t == 1 && k == 9) return inf;
        if (t == 2 && k == 39) return nan;
        if (t == 3) return tiny * static_cast<float>(k % 3);
        return small_integer(9, t, k);
      });
      std::vector<double> exact(tokens * outputs), sums = exact;
      format::reference_row_product(weight.dense_view(), operands.product(), exact.data(),
                                    sums.data());
      const auto denormal = [&](double v) { return v != 0 && std::fabs(v) < 0x1p-126; };
      for (const Case& c : cases(target.operation, dtype, dtype, target.pattern, tokens)) {
        run(*c.candidate, weight, operands);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t n = 0; n < outputs; ++n) {
            const double want = exact[t * outputs + n];
            const float got = operands.y(t, n);
            const auto label = ::testing::Message()
                               << c.candidate->name << " " << long_name(dtype) << " "
                               << target.pattern.text() << " t=" << t << " n=" << n << ": " << got
                               << ", need " << want;
            double flushed = 0;
            for (int64_t k = 0; k < inputs; ++k)
              if (denormal(bits.value(n, k)) || denormal(operands.x(t, k)))
                flushed += std::fabs(bits.value(n, k) * operands.x(t, k));
            const float rounded = value_of(bits_of(static_cast<float>(want), dtype), dtype);
            if (std::isnan(want) ||
                (flushes_denormals(c.candidate->name) && std::isinf(flushed))) {  // 0 * infinity
              ASSERT_TRUE(std::isnan(got)) << label;
            } else if (std::isinf(rounded)) {
              ASSERT_EQ(got, rounded) << label;
            } else {
              ASSERT_LE(std::fabs(got - want), bound(c.candidate->name, dtype, inputs, want,
                                                     sums[t * outputs + n], flushed))
                  << label;
            }
          }
      }
    }
}

TEST(Linear, the_bits_depend_neither_on_threads_nor_on_companions) {
  ThreadPool two(2), three(3);
  const int64_t outputs = 333, inputs = 517;
  for (const Target& target : kTargets)
    for (const DType dtype : kTypes) {
      const Weight weight(random_matrix(dtype, outputs, inputs, target.pattern, 0.5, 12), target);
      const auto draw = [](int64_t, int64_t k) {
        return static_cast<float>(random_normal(5, 0, k));
      };
      for (const Case& c : cases(target.operation, dtype, dtype, target.pattern, 1)) {
        Operands alone(dtype, 1, inputs, outputs, false, draw);
        run(*c.candidate, weight, alone);
        for (const int64_t tokens : {1, 2, 3, 4, 6, 7, 11, 16, 17, 40, 70, 300})
          for (ThreadPool* pool : {&two, &three}) {
            if (tokens > c.row.last_token) continue;
            Operands together(dtype, tokens, inputs, outputs, false, draw);  // every token the same
            run(*c.candidate, weight, together, pool->executor());
            ASSERT_TRUE(together.surroundings_intact());
            for (int64_t t = 0; t < tokens; ++t)
              for (int64_t n = 0; n < outputs; ++n)
                ASSERT_EQ(together.y_bits(t, n), alone.y_bits(0, n))
                    << c.candidate->name << " " << long_name(dtype) << " T=" << tokens
                    << " t=" << t;
          }
      }
    }
}

TEST(Linear, plan_chooses_explains_and_refuses) {
  const auto plan = linear_bitmap::plan(*Problem::parse("linear_bitmap:bf16:64x64x4:0.5"));
  ASSERT_TRUE(plan.ok()) << plan.error().message;
  EXPECT_GT(plan->workspace_bytes, 0u);
  const auto many = *Problem::parse("linear_bitmap:bf16:64x64x17:0.5");
  EXPECT_EQ(linear_bitmap::plan(many, device_with({"avx512_vbmi2"}))->candidate->name,
            "cpu_avx512_tiled_fma");
  EXPECT_EQ(linear_bitmap::plan(many, device_with({}))->candidate->name, "cpu_portable_tiled");
  const auto tiled =
      linear_bitmap::plan(many, device_with({"avx512_vbmi2", "avx512_bf16", "amx_bf16"}));
  ASSERT_TRUE(tiled.ok()) << tiled.error().message;
  EXPECT_EQ(tiled->candidate->name, "cpu_amx_tiled_dot");
  EXPECT_EQ(linear_bitmap::plan(*Problem::parse("linear_bitmap:int8:64x64x1:0.5")).error().code,
            Code::kNotPossible);
  EXPECT_EQ(linear_nm::plan(*Problem::parse("linear_bitmap:bf16:64x64x1:0.5")).error().code,
            Code::kUsage);
  EXPECT_EQ(linear_dense::plan(*Problem::parse("linear_dense:bf16:64x64x1:0.5")).error().code,
            Code::kNotPossible);
  const Device old;  // no vector extension at all
  const auto lines = linear_nm::explain(*Problem::parse("linear_nm:bf16:64x64x1:2:4"), old);
  for (const Explanation& line : lines) EXPECT_EQ(line.chosen, line.candidate == "cpu_portable");
}

TEST(Linear, pack_refuses_the_patterns_of_others_and_keeps_memory_compact) {
  const auto matrix = [](const Pattern& pattern) {
    return *format::compress(random_matrix(DType::kBF16, 256, 1024, pattern, 0.5, 2).tensor(),
                             pattern);
  };
  const auto bitmap = linear_bitmap::pack(matrix(Pattern::unstructured()));
  ASSERT_TRUE(bitmap.ok());
  EXPECT_LE(bitmap->size_bytes(), bitmap->matrix().size_bytes() * 102 / 100);
  EXPECT_FALSE(linear_bitmap::pack(matrix(Pattern::keep_of(2, 4))).ok());
  EXPECT_FALSE(linear_nm::pack(matrix(Pattern::unstructured())).ok());
  EXPECT_FALSE(linear_nm::pack(matrix(Pattern::block(8, 8))).ok());
  EXPECT_TRUE(linear_nm::pack(matrix(Pattern::keep_of(2, 4))).ok());
  EXPECT_FALSE(linear_bsr::pack(matrix(Pattern::unstructured())).ok());
  const auto blocks = linear_bsr::pack(matrix(Pattern::block(8, 8)));
  ASSERT_TRUE(blocks.ok());
  EXPECT_EQ(blocks->size_bytes(), blocks->matrix().size_bytes());
  EXPECT_FALSE(linear_csr::Slices::pack(matrix(Pattern::keep_of(2, 4))).ok());
  EXPECT_FALSE(linear_csr::Slices::pack(matrix(Pattern::block(8, 8))).ok());
}

TEST(Slices, take_three_bytes_a_non_zero_whatever_the_rows_are_like) {
  // Row n keeps n + 1 columns: neighbours in the matrix have other neighbours in their slice.
  const MatrixBits bits =
      random_matrix(DType::kBF16, 640, 640, Pattern{}, 0, 1,
                    [](int64_t n, int64_t k) { return (k * 7 + n * 13) % 640 <= n ? 1.0f : 0.0f; });
  const auto matrix = *format::compress(bits.tensor(), Pattern::unstructured());
  const double kept = static_cast<double>(format::count_kept(matrix));
  const auto slices = linear_csr::Slices::pack(matrix).value();
  const double index_bytes = 640 * 4 + 41 * 8;
  EXPECT_LE(static_cast<double>(slices.size_bytes()) - index_bytes, 3 * kept * 1.05);
}

TEST(Slices, expand_to_the_matrix_with_any_number_of_threads) {
  for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{37, 700}, {16, 1}, {1, 300}})
    for (const DType dtype : kTypes)
      for (const double sparsity : {0.0, 0.9, 0.995, 1.0})
        for (const int threads : {1, 3}) {
          const MatrixBits bits =
              random_matrix(dtype, outputs, inputs, Pattern::unstructured(), sparsity, 3);
          ThreadPool pool(threads);
          const auto slices =
              linear_csr::Slices::pack(*format::compress(bits.tensor(), Pattern::unstructured()),
                                       pool.executor())
                  .value();
          std::vector<float> dense(static_cast<size_t>(outputs * inputs), std::nanf(""));
          for (int64_t slice = 0; slice < linear_csr::slice_count(outputs); ++slice)
            linear_csr::expand_slice(slices.view(), slice, DType::kF32, dense.data());
          for (int64_t n = 0; n < outputs; ++n)
            for (int64_t k = 0; k < inputs; ++k)
              ASSERT_EQ(dense[static_cast<size_t>(n * inputs + k)], bits.value(n, k));
        }
}

TEST(ValueStream, refuses_what_it_does_not_hold_and_takes_the_bytes_of_the_compact_matrix) {
  const auto matrix = [](DType dtype, const Pattern& pattern) {
    return *format::compress(random_matrix(dtype, 256, 1024, pattern, 0.5, 2).tensor(), pattern);
  };
  const auto pack = [&](DType dtype, const Pattern& pattern) {
    return linear_stream::ValueStream::pack(matrix(dtype, pattern));
  };
  EXPECT_FALSE(pack(DType::kF32, Pattern::unstructured()).ok());
  EXPECT_FALSE(pack(DType::kBF16, Pattern::block(8, 8)).ok());
  for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4)}) {
    const auto packed = pack(DType::kBF16, pattern);
    ASSERT_TRUE(packed.ok());
    const size_t index = (256 / 16 + 1) * 8 + 64;
    EXPECT_LE(packed->size_bytes(), matrix(DType::kBF16, pattern).size_bytes() + index);
  }
}

TEST(ValueStream, expands_to_the_matrix_with_any_number_of_threads) {
  for (const auto& [outputs, inputs] :
       {std::pair<int64_t, int64_t>{37, 700}, {16, 1}, {1, 300}, {33, 64}})
    for (const DType dtype : {DType::kBF16, DType::kF16})
      for (const Pattern& pattern :
           {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::keep_of(3, 5)})
        for (const double sparsity : {0.0, 0.5, 0.9, 1.0})
          for (const int threads : {1, 3}) {
            const MatrixBits bits = random_matrix(dtype, outputs, inputs, pattern, sparsity, 3);
            ThreadPool pool(threads);
            const auto stream = linear_stream::ValueStream::pack(
                                    *format::compress(bits.tensor(), pattern), pool.executor())
                                    .value();
            const auto size = static_cast<size_t>(outputs * inputs);
            std::vector<float> wide(size, std::nanf(""));
            std::vector<uint16_t> same(size, 0xffff);
            for (int64_t tile = 0; tile < stream::tile_count(outputs); ++tile) {
              linear_stream::expand_tile(stream.view(), tile, DType::kF32, wide.data());
              linear_stream::expand_tile(stream.view(), tile, dtype, same.data());
            }
            for (int64_t n = 0; n < outputs; ++n)
              for (int64_t k = 0; k < inputs; ++k) {
                const auto i = static_cast<size_t>(n * inputs + k);
                ASSERT_EQ(wide[i], bits.value(n, k));
                ASSERT_EQ(value_of(same[i], dtype), bits.value(n, k));
              }
          }
}

TEST(ValueStream, of_parts_is_that_of_the_whole_matrix) {
  const MatrixBits whole =
      random_matrix(DType::kBF16, 192 + 23, 130, Pattern::unstructured(), 0.5, 4);
  const auto rows = [&](int64_t first, int64_t count) {
    const Tensor all = whole.tensor();
    const size_t row = 130 * 2;
    const Bytes bytes(std::make_shared<Bytes>(all.bytes),
                      all.bytes.data() + static_cast<size_t>(first) * row,
                      static_cast<size_t>(count) * row);
    return *format::compress(Tensor{DType::kBF16, {count, 130}, bytes}, Pattern::unstructured());
  };
  const auto one = linear_stream::ValueStream::pack(rows(0, 215)).value();
  const auto parts =
      linear_stream::ValueStream::pack({rows(0, 128), rows(128, 64), rows(192, 23)}).value();
  ASSERT_EQ(parts.view().rows, 215);
  ASSERT_EQ(parts.size_bytes(), one.size_bytes());
  const auto bytes = static_cast<size_t>(one.view().stream_offsets[stream::tile_count(215)]);
  EXPECT_EQ(std::memcmp(parts.view().stream, one.view().stream, bytes), 0);
  EXPECT_FALSE(linear_stream::ValueStream::pack({rows(0, 23), rows(23, 64)}).ok()) << "a torn tile";
}

/// Every implementation writes the bytes of the portable one, and takes them apart again.
TEST(ValueStream, chunks_are_the_same_whoever_packs_them) {
  const auto& portable = linear_stream::chunk_tools().back();
  for (const linear_stream::ChunkTool& tool : linear_stream::chunk_tools()) {
    if (!tool.runs_here) {
      std::printf("not run here: chunks by %s\n", tool.name);
      continue;
    }
    for (uint64_t seed = 0; seed < 64; ++seed) {
      uint16_t values[16][64 + 32];
      for (int64_t r = 0; r < 16; ++r)
        for (int64_t i = 0; i < 96; ++i)
          values[r][i] = static_cast<uint16_t>(random_bits(seed, r, i) | 1);
      const auto rows = [&] {
        linear_stream::ChunkRows of;
        for (int64_t r = 0; r < 16; ++r) {
          const uint64_t some = random_bits(seed + 100, r, 0);
          of.masks[r] = seed == 0   ? 0
                        : seed == 1 ? ~uint64_t{0}
                        : seed % 2  ? some & some >> 3
                                    : some;
          of.values[r] = reinterpret_cast<const uint8_t*>(values[r]);
        }
        return of;
      };
      uint8_t want[stream::kMostValueChunkBytes] = {}, got[stream::kMostValueChunkBytes] = {};
      auto of_portable = rows(), of_tool = rows();
      const int64_t bytes = portable.pack(of_portable, want);
      ASSERT_EQ(tool.pack(of_tool, got), bytes);
      ASSERT_EQ(std::memcmp(got, want, static_cast<size_t>(bytes)), 0) << tool.name;
      for (int64_t r = 0; r < 16; ++r) ASSERT_EQ(of_tool.values[r], of_portable.values[r]);
      linear_stream::ChunkWeights apart;
      ASSERT_EQ(tool.unpack(want, apart), bytes);
      for (int64_t r = 0; r < 16; ++r)
        for (int64_t c = 0, rank = 0; c < 64; ++c) {
          const bool kept = rows().masks[r] >> c & 1;
          ASSERT_EQ(apart[r][c], kept ? values[r][rank] : 0) << tool.name;
          rank += kept;
        }
    }
  }
}

TEST(LinearOperation, of_an_unstructured_weight_on_a_cpu_depends_on_its_zeros) {
  const auto on = [](const char* problem, const Device& cpu) {
    return linear_operation_on_cpu(*Problem::parse(problem), cpu)->name;
  };
  const Device wide = device_with({"avx512_vbmi2"});
  EXPECT_EQ(on("linear_bitmap:bf16:64x64x1:0.84", wide), "linear_stream");
  EXPECT_EQ(on("linear_bitmap:bf16/f32:64x64x1:0.5", wide), "linear_stream");
  EXPECT_EQ(on("linear_bitmap:f16:64x64x1:0.5", wide), "linear_bitmap");
  EXPECT_EQ(on("linear_nm:bf16:64x64x1:2:4", wide), "linear_stream");
  EXPECT_EQ(on("linear_nm:bf16:64x64x1:2:4", Device{}), "linear_nm");
  EXPECT_EQ(on("linear_bitmap:f32:64x64x1:0.5", wide), "linear_bitmap");
  EXPECT_EQ(on("linear_bitmap:bf16:64x64x1:0.85", wide), "linear_csr");
  EXPECT_EQ(on("linear_bsr:bf16:64x64x1:block8x8@0.5", wide), "linear_bsr");
  const auto name = [&](const char* problem) { return on(problem, Device{}); };
  EXPECT_EQ(name("linear_bitmap:bf16:64x64x1:0.84"), "linear_bitmap");
  EXPECT_EQ(name("linear_bitmap:bf16:64x64x1:0.85"), "linear_csr");
  EXPECT_EQ(name("linear_bitmap:int8:64x64x1:0.95"), "linear_bitmap") << "codes have a stream";
  EXPECT_EQ(name("linear_bsr:bf16:64x64x1:block8x8@0.95"), "linear_bsr");
  setenv("LACUNA_FORCE", "linear_csr:cpu_portable_gather", 1);
  EXPECT_EQ(name("linear_bitmap:bf16:64x64x1:0.5"), "linear_csr");
  setenv("LACUNA_FORCE", "linear_bitmap:cpu_portable", 1);
  EXPECT_EQ(name("linear_bitmap:bf16:64x64x1:0.95"), "linear_bitmap");
  EXPECT_EQ(on("linear_bitmap:bf16:64x64x1:0.5", wide), "linear_bitmap");
  EXPECT_EQ(on("linear_nm:bf16:64x64x1:2:4", wide), "linear_stream") << "another pattern's";
  setenv("LACUNA_FORCE", "linear_stream:cpu_portable_stream", 1);
  EXPECT_EQ(name("linear_bitmap:bf16:64x64x1:0.95"), "linear_stream");
  EXPECT_EQ(name("linear_nm:f16:64x64x1:1:4"), "linear_stream");
  EXPECT_EQ(name("linear_nm:f32:64x64x1:1:4"), "linear_nm") << "it holds 16 bits";
  setenv("LACUNA_FORCE", "linear_bitmap:cpu_portable,linear_csr:cpu_portable_gather", 1);
  EXPECT_EQ(name("linear_bitmap:bf16:64x64x1:0.5"), "linear_bitmap");
  EXPECT_EQ(name("linear_bitmap:bf16:64x64x1:0.95"), "linear_csr");
  unsetenv("LACUNA_FORCE");
}

}  // namespace
}  // namespace lacuna::kernels

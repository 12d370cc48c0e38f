// The timing method: who takes part, that wrong outputs are caught, what records say.
#include "lacuna/bench/compare.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "lacuna/bench/record.h"
#include "lacuna/format/row_product.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::bench {
namespace {
using kernels::Problem;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Field;
using ::testing::HasSubstr;
using testing::must;

Problem problem(const char* text) { return must(Problem::parse(text)); }

Comparison quick(const std::vector<const char*>& texts) {
  std::vector<Problem> problems;
  for (const char* text : texts) problems.push_back(problem(text));
  return must(compare(problems, CompareOptions::quick()));
}

const Record* find(const Comparison& comparison, std::string_view of, std::string_view candidate) {
  for (const Record& record : comparison.records)
    if (record.problem == of && record.candidate == candidate) return &record;
  return nullptr;
}

template <class List>
const Untimed* find(const List& list, std::string_view candidate) {
  for (const Untimed& untimed : list)
    if (untimed.candidate == candidate) return &untimed;
  return nullptr;
}

TEST(Compare, timesEveryCandidateAndTheDenseRivals) {
  const Comparison result = quick({"linear_bitmap:f32:96x160x3:0.5"});
  EXPECT_TRUE(result.failed.empty()) << result.failed[0].candidate << " " << result.failed[0].why;
  const char *sparse = "linear_bitmap:f32:96x160x3:0.5", *dense = "linear_dense:f32:96x160x3";
  ASSERT_NE(find(result, sparse, "cpu_portable"), nullptr);
  ASSERT_NE(find(result, dense, "cpu_portable"), nullptr);
  EXPECT_EQ(find(result, dense, "reference"), nullptr) << "it is the definition, no rival";
  const Record* torch = find(result, dense, "cpu_torch_linear");
  ASSERT_NE(torch, nullptr);
  EXPECT_FALSE(torch->selectable);
  EXPECT_NE(find(result, dense, "cpu_onednn_packed"), nullptr);
  ASSERT_NE(find(result.refused, "cpu_expand_torch_linear"), nullptr);
  EXPECT_THAT(find(result.refused, "cpu_expand_torch_linear")->why, HasSubstr("17 tokens"));

  EXPECT_GE(result.rounds, 5);
  EXPECT_GT(result.read_before, 0);
  EXPECT_GT(result.read_after, 0);
  double best = 1e30;
  for (const Record& record : result.records) {
    EXPECT_LE(record.us.p10, record.us.median);
    EXPECT_LE(record.us.median, record.us.p90);
    EXPECT_EQ(record.samples_us.size(), static_cast<size_t>(result.rounds));
    EXPECT_EQ(record.flops, 2.0 * 96 * 160 * 3);
    EXPECT_DOUBLE_EQ(record.gb_per_second,
                     static_cast<double>(record.weight_bytes) / record.us.median / 1e3);
    EXPECT_GT(*record.share, 0);
    if (record.problem == dense) best = std::min(best, record.us.median);
  }
  for (const Record& record : result.records)
    if (record.problem + " " + record.candidate == result.baseline) {
      EXPECT_EQ(record.problem, dense);
      EXPECT_EQ(record.us.median, best);
      EXPECT_EQ(record.ratio->median, 1);
    }
  EXPECT_EQ(torch->weight_bytes, 96u * 160 * 4);
  // One bit a weight, half of the values, the index of the rows, room behind the last row.
  const size_t compact = find(result, sparse, "cpu_portable")->weight_bytes;
  EXPECT_GE(compact, 96u * 160 / 8 + 96 * 160 * 2);
  EXPECT_LE(compact, 96u * 160 / 8 + 96 * 160 * 2 + 97 * 8 + 1024);
}

TEST(Compare, theSlowAreNamedNotTimed) {
  CompareOptions options = CompareOptions::quick();
  const char *sparse = "linear_bitmap:f32:512x512x1:0.5", *dense = "linear_dense:f32:512x512x1";
  const Comparison all = must(compare({problem(sparse)}, options));
  options.slowest = 1 + 1e-9;
  const Comparison fastest = must(compare({problem(sparse)}, options));
  for (const char* text : {sparse, dense})
    EXPECT_EQ(std::count_if(fastest.records.begin(), fastest.records.end(),
                            [&](const Record& record) { return record.problem == text; }),
              1);
  for (const Record& record : all.records) {
    if (find(fastest, record.problem, record.candidate) != nullptr) continue;
    EXPECT_THAT(fastest.refused, Contains(AllOf(Field(&Untimed::problem, record.problem),
                                                Field(&Untimed::candidate, record.candidate),
                                                Field(&Untimed::why, HasSubstr("times as slow")))));
  }
}

TEST(Compare, outputsAreRightForEveryTypeAndNumberOfTokens) {
  for (const char* text :
       {"linear_bitmap:bf16:64x96x1:0.7", "linear_bitmap:bf16:64x100x16:0.5",
        "linear_nm:bf16:33x64x17:2:4", "linear_bitmap:f16:64x64x40:0.5",
        "linear_nm:f32:1x1x130:1:4", "linear_nm:bf16/f32:40x64x20:2:4",
        "linear_bitmap:bf16/f32:40x64x2:0.5", "linear_dense:bf16:70x257x512",
        "linear_bsr:bf16:64x96x1:block32x32@0.8", "linear_bsr:f16:70x100x7:block8x4@0.5",
        "linear_bsr:bf16:64x64x20:block8x8@0.5", "linear_csr:bf16:64x700x1:0.95",
        "linear_csr:f32:33x64x16:0.5", "linear_csr:bf16:40x64x33:0.9",
        "linear_stream:bf16:64x96x1:0.7", "linear_stream:f16:33x100x16:2:4",
        "linear_stream:bf16:40x64x33:0.5"}) {
    const Comparison result = quick({text});
    for (const Untimed& failed : result.failed)
      ADD_FAILURE() << failed.problem << " " << failed.candidate << ": " << failed.why;
    EXPECT_FALSE(result.records.empty()) << text;
  }
}

TEST(Compare, expandedWeightsAreTimedFrom17TokensOn) {
  const Comparison result = quick({"linear_nm:bf16:64x64x17:2:4"});
  const Record* record = find(result, "linear_nm:bf16:64x64x17:2:4", "cpu_expand_torch_linear");
  ASSERT_NE(record, nullptr);
  EXPECT_EQ(record->scratch_bytes, 64u * 64 * 2);
  EXPECT_LT(record->weight_bytes, 64u * 64 * 2);
}

TEST(Compare, int8HasTheDynamicProductOfTorchBesideIt) {
  for (const char* text : {"linear_dense:int8/f32:96x160x3", "linear_dense:int8:96x160x40"}) {
    const Comparison result = quick({text});
    for (const Untimed& failed : result.failed)
      ADD_FAILURE() << failed.problem << " " << failed.candidate << ": " << failed.why;
    const Record* record = find(result, text, "cpu_torch_dynamic_int8");
    ASSERT_NE(record, nullptr) << text;
    EXPECT_EQ(record->weight_bytes, 96u * 160 + 96 * 8);
  }
}

TEST(Compare, aRandomInt8WeightIsCodesTimesTheScaleOfItsRow) {
  const Weight weight = must(random_weight(problem("linear_bitmap:int8:16x64x1:0.5"), 3));
  const at::Tensor codes = weight.dense / weight.row_scales.view({-1, 1});
  EXPECT_TRUE(at::equal(codes, codes.round()));
  EXPECT_LE(codes.abs().max().item<float>(), 127);
  EXPECT_GE(codes.abs().amax(1).min().item<float>(), 126);
  EXPECT_GE((codes == 0).sum().item<int64_t>(), 16 * 32);
  EXPECT_TRUE(random_weight(problem("linear_dense:fp8:16x64x1"), 3)->compact.has_value());
}

TEST(Compare, problemsOfOneShapeShareARoundRobin) {
  const Comparison result = quick({"linear_bitmap:f32:64x64x1:0.5", "linear_nm:f32:64x64x1:2:4"});
  EXPECT_NE(find(result, "linear_bitmap:f32:64x64x1:0.5", "cpu_portable"), nullptr);
  EXPECT_NE(find(result, "linear_nm:f32:64x64x1:2:4", "cpu_portable"), nullptr);
  EXPECT_EQ(std::count_if(result.records.begin(), result.records.end(),
                          [](const Record& r) { return r.candidate == "cpu_torch_linear"; }),
            1);
}

TEST(Compare, refusesWhatDoesNotBelongTogether) {
  const auto wrong =
      compare({problem("linear_dense:bf16:64x64x1"), problem("linear_dense:bf16:64x64x2")},
              CompareOptions::quick());
  ASSERT_FALSE(wrong.ok());
  EXPECT_EQ(wrong.error().code, Code::kUsage);
  EXPECT_FALSE(compare({}, CompareOptions::quick()).ok());
  const auto unknown =
      compare({problem("linear_magic:bf16:64x64x1:block8x8@0.5")}, CompareOptions::quick());
  ASSERT_FALSE(unknown.ok());
  EXPECT_THAT(unknown.error().message, HasSubstr("linear_magic"));
}

TEST(Compare, quantisedValuesRunOnTheStreamKernels) {
  for (const char* text : {"linear_bitmap:int4g64:64x192x1:0.5", "linear_nm:int8:66x128x7:2:4",
                           "linear_dense:int8:64x64x16"}) {
    const Comparison result = quick({text});
    EXPECT_FALSE(result.records.empty()) << text;
    EXPECT_TRUE(result.failed.empty()) << text;
  }
}

TEST(Compare, fp8InBlocksHasNoContenderAndSaysSo) {
  EXPECT_FALSE(quick({"linear_bitmap:fp8:64x64x1:0.5"}).records.empty());
  const std::string blocks = "linear_bsr:fp8:64x64x1:block8x8@0.5";
  const Comparison result = quick({blocks.c_str()});
  EXPECT_FALSE(result.records.empty());  // the dense ones
  for (const Record& record : result.records) EXPECT_NE(record.problem, blocks);
  EXPECT_THAT(result.refused, Contains(Field(&Untimed::problem, blocks)));
}

TEST(Compare, stopsWhenInterrupted) {
  const std::atomic<bool> interrupted = true;
  const auto stopped =
      compare({problem("linear_dense:f32:64x64x1")}, CompareOptions::quick(), {}, &interrupted);
  ASSERT_FALSE(stopped.ok());
  EXPECT_EQ(stopped.error().code, Code::kInterrupted);
}

// --- Kernels that compute something else ---------------------------------------------------------

/// Only these tests' problems have this many outputs.
constexpr int64_t kWrongOutputs = 77;

kernels::Support only_here(const Problem& problem, const kernels::Device&) {
  return kernels::needs(problem.outputs == kWrongOutputs && problem.tokens == 1, "a test");
}

void run_right(const format::RowsView& rows, const format::RowProduct& product, void*,
               const Executor&) {
  format::run_reference_row_product(rows, product);
}

void add_output(const format::RowProduct& product, float error) {
  float* last = static_cast<float*>(product.y) + kWrongOutputs - 1;
  *last += error;
}

void register_wrong_candidates() {
  static const bool once = [] {
    auto& list = kernels::linear_dense::candidates();
    const auto none = [](const Problem&) -> size_t { return 0; };
    list.add_first({{"cpu_wrong_by_a_little", only_here},
                    none,
                    [](const format::RowsView& rows, const format::RowProduct& product, void* w,
                       const Executor& executor) {
                      run_right(rows, product, w, executor);
                      add_output(product, 1e-4f);
                    }});
    list.add_first(
        {{"cpu_writes_nothing", only_here},
         none,
         [](const format::RowsView&, const format::RowProduct&, void*, const Executor&) {}});
    list.add_first({{"cpu_wrong_later", only_here},
                    none,
                    [](const format::RowsView& rows, const format::RowProduct& product, void* w,
                       const Executor& executor) {
                      static int calls = 0;
                      run_right(rows, product, w, executor);
                      if (++calls > 3) add_output(product, 1.0f);
                    }});
    return true;
  }();
  (void)once;
}

TEST(Compare, aWrongOutputIsCaughtAndNeverTimed) {
  register_wrong_candidates();
  const Comparison result = quick({"linear_dense:f32:77x128x1"});
  for (const char* name : {"cpu_wrong_by_a_little", "cpu_writes_nothing", "cpu_wrong_later"}) {
    const Untimed* failed = find(result.failed, name);
    ASSERT_NE(failed, nullptr) << name;
    EXPECT_THAT(failed->why, HasSubstr("wrong output")) << name;
    EXPECT_EQ(find(result, "linear_dense:f32:77x128x1", name), nullptr) << name;
  }
  EXPECT_THAT(find(result.failed, "cpu_wrong_by_a_little")->why, HasSubstr("y[0, 76]"));
  EXPECT_EQ(result.failed.size(), 3u);
  EXPECT_NE(find(result, "linear_dense:f32:77x128x1", "cpu_portable"), nullptr);
}

TEST(Compare, anOutputMayBeOffByItsBoundAndNoMore) {
  const kernels::ErrorBound bound{.roundings = 10, .inputs = 8, .dtype = DType::kF32};
  const at::Tensor exact = at::full({2, 3}, 2.0, at::kDouble), sums = at::full_like(exact, 4.0);
  const double most = bound(2.0, 4.0);
  const auto y = [&](double value) {
    at::Tensor out = exact.clone();
    out[1][2] = value;
    return out;
  };
  EXPECT_EQ(wrong_output(y(2.0 + 0.99 * most), exact, sums, bound), "");
  EXPECT_THAT(wrong_output(y(2.0 - 1.01 * most), exact, sums, bound), HasSubstr("y[1, 2]"));
  EXPECT_NE(wrong_output(y(std::numeric_limits<double>::quiet_NaN()), exact, sums, bound), "");
  EXPECT_NE(wrong_output(exact.t(), exact, sums, bound), "");
  EXPECT_NE(wrong_output(at::Tensor(), exact, sums, bound), "");
}

// --- Records and cases ---------------------------------------------------------------------------

TEST(Records, haveALineForEveryContender) {
  register_wrong_candidates();
  const Comparison result = quick({"linear_dense:f32:77x128x1"});
  const auto lines = lines_of(result, Environment::here());
  EXPECT_EQ(lines.size(), result.records.size() + result.refused.size() + result.failed.size());
  size_t records = 0, failures = 0;
  for (const auto& line : lines) {
    for (const char* key : {"verb", "problem", "name", "machine", "threads", "versions"})
      EXPECT_TRUE(line.contains(key)) << key;
    failures += line.contains("failed");
    if (!line.contains("median_us")) continue;
    ++records;
    for (const char* key : {"p10_us", "p90_us", "weight_bytes", "share_of_limit", "speedup",
                            "speedup_p10", "speedup_p90", "baseline", "gbps", "gflops", "rounds",
                            "copies", "read_gbps", "scratch_bytes", "max_error"})
      EXPECT_TRUE(line.contains(key) && !line[key].is_null()) << key;
    EXPECT_EQ(line["asked"][0], "linear_dense:f32:77x128x1");
    EXPECT_EQ(line["versions"]["libtorch"].get<std::string>().substr(0, 2), "2.");
  }
  EXPECT_EQ(records, result.records.size());
  EXPECT_EQ(failures, 3u);
}

TEST(Records, summariesAreNearestRanks) {
  const Summary summary = summarize({5, 1, 4, 2, 3, 10, 9, 8, 7, 6});
  EXPECT_EQ(summary.median, 5);
  EXPECT_EQ(summary.p10, 1);
  EXPECT_EQ(summary.p90, 9);
  EXPECT_EQ(summarize({7}).p90, 7);
  EXPECT_EQ(summarize({}).median, 0);
  EXPECT_EQ(paired_ratios({2, 9, 1}, {1, 3}), (std::vector<double>{2, 3}));
}

TEST(Cases, areReadLineByLine) {
  const auto folder = testing::scratch_folder("cases");
  const auto file = [&](const char* text) {
    std::ofstream(folder / "cases.txt") << text;
    return (folder / "cases.txt").string();
  };
  const auto cases = must(read_cases(
      file("# a comment\n\nlinear_dense:bf16:8x8x1\nlinear_nm:bf16:8x8x1:2:4  # why\n")));
  ASSERT_EQ(cases.size(), 2u);
  EXPECT_EQ(cases[1].text(), "linear_nm:bf16:8x8x1:2:4");
  const auto wrong = read_cases(file("linear_dense:bf16:8x8x1\nnonsense\n"));
  ASSERT_FALSE(wrong.ok());
  EXPECT_EQ(wrong.error().code, Code::kBadInput);
  EXPECT_THAT(wrong.error().message, HasSubstr("line 2"));
  EXPECT_FALSE(read_cases(file("# nothing\n")).ok());
  EXPECT_FALSE(read_cases("/nowhere/cases.txt").ok());
}

TEST(Cases, thoseOfTheProjectAreProblemsOfKnownOperations) {
  size_t files = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(testing::source_folder() / "bench/cases")) {
    for (const Problem& one : must(read_cases(entry.path().string())))
      EXPECT_TRUE(kernels::find_linear_operation(one.operation).ok()) << one.text();
    ++files;
  }
  EXPECT_GE(files, 1u);
}

TEST(Cases, groupBySharedShape) {
  const auto groups =
      same_shapes({problem("linear_bitmap:bf16:8x8x1:0.5"), problem("linear_bitmap:bf16:8x8x2:0.5"),
                   problem("linear_nm:bf16:8x8x1:2:4"), problem("linear_bitmap:bf16:8x8x1:0.5"),
                   problem("linear_bitmap:f32:8x8x1:0.5")});
  ASSERT_EQ(groups.size(), 3u);
  EXPECT_EQ(groups[0].size(), 2u) << "a problem that is given twice is timed once";
}

}  // namespace
}  // namespace lacuna::bench

#include "lacuna/kernels/select.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "lacuna/kernels/measured.h"

namespace lacuna::kernels {
namespace {

using ::testing::HasSubstr;

TEST(Problem, reads_back_the_text_it_writes) {
  for (const char* text :
       {"linear_bitmap:bf16:14336x4096x1:0.5", "linear_nm:int4g64:4096x4096x8:2:4",
        "linear_dense:bf16:4096x4096x1", "linear_bsr:f16:64x32x512:block32x32@0.5",
        "linear_dense:bf16/f32:1x1x16", "linear_bitmap:f32:7x9x3:0", "linear_nm:fp8:8x8x1:1:4",
        "linear_dense:int8/f32:4x4x4"}) {
    const auto problem = Problem::parse(text);
    ASSERT_TRUE(problem.ok()) << problem.error().message;
    EXPECT_EQ(problem->text(), text);
  }
}

TEST(Problem, means_what_it_says) {
  const auto problem = Problem::parse("linear_nm:bf16/f32:14336x4096x8:1:4");
  ASSERT_TRUE(problem.ok());
  EXPECT_EQ(problem->operation, "linear_nm");
  EXPECT_EQ(problem->values, Values::kBF16);
  EXPECT_EQ(problem->activations, DType::kF32);
  EXPECT_EQ(problem->outputs, 14336);
  EXPECT_EQ(problem->inputs, 4096);
  EXPECT_EQ(problem->tokens, 8);
  EXPECT_EQ(problem->pattern, format::Pattern::keep_of(1, 4));
  EXPECT_EQ(problem->sparsity, 0.75);
  EXPECT_EQ(Problem::parse("a:int8:1x1x1")->activations, DType::kBF16);
}

TEST(Problem, refuses_what_breaks_the_grammar_and_says_what) {
  const std::pair<const char*, const char*> wrong[] = {
      {"", "no operation"},
      {"linear_dense", "no values and no shape"},
      {"linear_dense:", "no values and no shape"},
      {"linear_dense:9x9x1", "unknown values"},
      {"linear_dense:bf17:1x1x1", "bf17"},
      {"linear_dense:bf16/int8:1x1x1", "unknown activations"},
      {"linear_dense:bf16:1x1", "an extent"},
      {"linear_dense:bf16:1x1x0", "an extent"},
      {"linear_dense:bf16:1x-1x1", "\"-1\""},
      {"linear_dense:bf16:1x1x1x1", "more than three"},
      {"linear_dense:bf16:1x1x99999999999", "an extent"},
      {"linear_bitmap:bf16:1x1x1:1.5", "unknown sparsity"},
      {"linear_bitmap:bf16:1x1x1:nan", "unknown sparsity"},
      {"linear_nm:bf16:1x1x1:4:2", "unknown sparsity"},
      {"linear_bsr:bf16:1x1x1:block32x32", "unknown sparsity"},
      {"linear_bsr:bf16:1x1x1:dense", "unknown sparsity"}};
  for (const auto& [text, message] : wrong) {
    const auto problem = Problem::parse(text);
    ASSERT_FALSE(problem.ok()) << text;
    EXPECT_EQ(problem.error().code, Code::kUsage);
    EXPECT_THAT(problem.error().message, HasSubstr(message)) << text;
  }
}

struct Toy : Candidate {
  int number = 0;
};

Support only_one_token(const Problem& problem, const Device&) {
  return needs(problem.tokens == 1, "one token");
}
Support always(const Problem&, const Device&) { return Support::yes(); }
Support never(const Problem&, const Device&) { return needs(false, "a miracle"); }

/// LACUNA_FORCE for one test.
class Force {
 public:
  explicit Force(const char* value) { setenv("LACUNA_FORCE", value, 1); }
  ~Force() { unsetenv("LACUNA_FORCE"); }
};

TEST(CandidateList, takes_the_first_that_supports_the_problem_and_explains) {
  CandidateList<Toy> list{{{"special", only_one_token}, 1}, {{"general", always}, 2}};
  const Problem one = *Problem::parse("toy:bf16:4x4x1"), two = *Problem::parse("toy:bf16:4x4x2");
  EXPECT_EQ((*list.choose(one, Device{}))->number, 1);
  EXPECT_EQ((*list.choose(two, Device{}))->number, 2);
  const auto lines = list.explain(two, Device{});
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0].support.refusal(), "needs one token");
  EXPECT_FALSE(lines[0].chosen);
  EXPECT_TRUE(lines[1].chosen);
}

TEST(CandidateList, a_candidate_added_later_comes_first_and_pointers_stay_valid) {
  CandidateList<Toy> list{{{"general", always}, 2}};
  const Problem problem = *Problem::parse("toy:bf16:4x4x1");
  const Toy* general = *list.choose(problem, Device{});
  for (int i = 0; i < 100; ++i) list.add_first({{"other", never}, 3});
  list.add_first({{"torch", only_one_token}, 7});
  EXPECT_EQ((*list.choose(problem, Device{}))->number, 7);
  EXPECT_EQ(list.find("general"), general);
}

TEST(CandidateList, force_pins_a_candidate_of_its_operation_alone) {
  CandidateList<Toy> list{{{"special", only_one_token}, 1}, {{"general", always}, 2}};
  const Problem one = *Problem::parse("toy:bf16:4x4x1"), two = *Problem::parse("toy:bf16:4x4x2");
  {
    const Force force("other:special,toy:general");
    EXPECT_EQ((*list.choose(one, Device{}))->number, 2);
  }
  {
    const Force force("toy:special");
    const auto refused = list.choose(two, Device{});
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().code, Code::kNotPossible);
    EXPECT_THAT(refused.error().message, HasSubstr("special, which needs one token"));
  }
  const Force force("toy:specail");
  const auto unknown = list.choose(one, Device{});
  ASSERT_FALSE(unknown.ok());
  EXPECT_EQ(unknown.error().code, Code::kUsage);
  EXPECT_THAT(unknown.error().message, HasSubstr("specail"));
}

TEST(CandidateList, says_why_when_nobody_can) {
  CandidateList<Toy> list{{{"special", only_one_token}, 1}, {{"miraculous", never}, 2}};
  const auto none = list.choose(*Problem::parse("toy:bf16:4x4x2"), Device{});
  ASSERT_FALSE(none.ok());
  EXPECT_EQ(none.error().code, Code::kNotPossible);
  EXPECT_THAT(none.error().message,
              HasSubstr("special needs one token; miraculous needs a miracle"));
}

/// A measured table for one test.
class Measured {
 public:
  Measured(const char* problem, const char* candidate) {
    set_measured_winners({{*Problem::parse(problem), candidate}});
  }
  ~Measured() { set_measured_winners({}); }
};

const char* note_of(const std::vector<Explanation>& lines, std::string_view candidate) {
  for (const Explanation& line : lines)
    if (line.candidate == candidate) return line.note.c_str();
  return "no such line";
}

TEST(MeasuredTable, goes_before_the_order_of_the_list_and_behind_force) {
  CandidateList<Toy> list{{{"special", only_one_token}, 1}, {{"general", always}, 2}};
  const Problem one = *Problem::parse("toy:bf16:4x4x1");
  EXPECT_STREQ(note_of(list.explain(one, Device{}), "special"), "chosen by: order of the list");
  const Measured table("toy:bf16:4x4x1", "general");
  EXPECT_EQ((*list.choose(one, Device{}))->number, 2);
  EXPECT_STREQ(note_of(list.explain(one, Device{}), "general"), "chosen by: measured table");
  EXPECT_EQ((*list.choose(*Problem::parse("toy:f32:4x4x1"), Device{}))->number, 1) << "another";
  Device gpu;
  gpu.gpu.emplace();
  EXPECT_EQ((*list.choose(one, gpu))->number, 1) << "the table was measured on a CPU";
  const Force force("toy:special");
  EXPECT_EQ((*list.choose(one, Device{}))->number, 1);
  const auto lines = list.explain(one, Device{});
  EXPECT_STREQ(note_of(lines, "special"), "chosen by: LACUNA_FORCE");
  EXPECT_THAT(note_of(lines, "general"), HasSubstr("LACUNA_FORCE goes first"));
}

TEST(MeasuredTable, an_entry_that_cannot_be_used_is_ignored_and_explained) {
  CandidateList<Toy> list{{{"special", only_one_token}, 1}, {{"general", always}, 2}};
  const Problem two = *Problem::parse("toy:bf16:4x4x2");
  {
    const Measured table("toy:bf16:4x4x2", "special");
    EXPECT_EQ((*list.choose(two, Device{}))->number, 2);
    EXPECT_THAT(note_of(list.explain(two, Device{}), "special"), HasSubstr("ignored"));
  }
  const Measured table("toy:bf16:4x4x2", "retired");
  EXPECT_EQ((*list.choose(two, Device{}))->number, 2);
  const auto lines = list.explain(two, Device{});
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[2].candidate, "retired");
  EXPECT_THAT(lines[2].support.refusal(), HasSubstr("is no candidate of toy"));
  EXPECT_FALSE(lines[2].chosen);
}

TEST(MeasuredTable, stands_for_problems_near_by) {
  const Measured table("toy:bf16:4x4x8:0.5", "general");
  for (const char* near : {"toy:bf16:4x4x8:0.5", "toy:bf16:4x4x5:0.5", "toy:bf16:4x4x7:0.4600001"})
    EXPECT_EQ(measured_winner(*Problem::parse(near)), "general") << near;
  for (const char* far : {"toy:bf16:4x4x4:0.5", "toy:bf16:4x4x9:0.5", "toy:bf16:4x4x8:0.6",
                          "toy:bf16:4x5x8:0.5", "toy:bf16/f32:4x4x8:0.5", "toy:bf16:4x4x8:2:4"})
    EXPECT_EQ(measured_winner(*Problem::parse(far)), std::nullopt) << far;
  set_measured_winners({{*Problem::parse("toy:bf16:4x4x8:0.5"), "rounded"},
                        {*Problem::parse("toy:bf16:4x4x7:0.46"), "exact"}});
  EXPECT_EQ(measured_winner(*Problem::parse("toy:bf16:4x4x7:0.46")), "exact");
  EXPECT_EQ(measured_winner(*Problem::parse("toy:bf16:4x4x6:0.46")), "rounded");
}

}  // namespace
}  // namespace lacuna::kernels

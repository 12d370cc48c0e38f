#include "lacuna/report/table.h"

#include <gtest/gtest.h>

namespace lacuna::report {
namespace {

TEST(Table, AlignsTheFirstColumnLeftAndTheOthersRight) {
  Table table({"layer", "error"});
  table.add({"q", "0.5"});
  table.add({"gate_proj", "10.25"});
  EXPECT_EQ(table.text(),
            "layer      error\n"
            "----------------\n"
            "q            0.5\n"
            "gate_proj  10.25\n");
}

TEST(Table, CountsCharactersNotBytes) {
  Table table({"é", "n"});
  table.add({"ab", "1"});
  EXPECT_EQ(table.text(), "é   n\n-----\nab  1\n");
}

TEST(Table, SpeaksMarkdownAndCsv) {
  Table table({"layer", "a, b"});
  table.add({"q|k", "say \"1\""});
  table.add({"v"});
  EXPECT_EQ(table.markdown(), "| layer | a, b |\n|---|---:|\n| q\\|k | say \"1\" |\n| v |  |\n");
  EXPECT_EQ(table.csv(), "layer,\"a, b\"\r\nq|k,\"say \"\"1\"\"\"\r\nv\r\n");
}

}  // namespace
}  // namespace lacuna::report

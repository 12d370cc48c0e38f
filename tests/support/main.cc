// Runs the tests of one folder and ends with what could not be tested for want of data.
#include <gtest/gtest.h>

#include <cstdio>
#include <set>
#include <string>

namespace lacuna::testing {
std::set<std::string>& missing_data();
}

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const int result = RUN_ALL_TESTS();
  const auto& missing = lacuna::testing::missing_data();
  if (!missing.empty()) {
    std::printf("[  MISSING ] %zu pieces of test data (set LACUNA_DATA):\n", missing.size());
    for (const std::string& name : missing) std::printf("[  MISSING ]   %s\n", name.c_str());
  }
  return result;
}

// Where tests find real models and texts, and how they say that something is missing.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

namespace lacuna::testing {

/// The folder of shared test data: $LACUNA_DATA, else ../shared/data beside the checkout. Empty
/// when there is none.
std::filesystem::path data_folder();
/// A file or folder below it, or empty. What was asked for and is missing is named in the summary
/// of the run.
std::filesystem::path data_path(const std::string& relative);
/// A file below .cache of the checkout, where ./dev keeps what it fetched, or empty; missing files
/// are named likewise.
std::filesystem::path cache_path(const std::string& relative);
/// The repository.
std::filesystem::path source_folder();
/// The small trained model that comes with it.
std::filesystem::path demo_model_folder();
/// A fresh empty folder for this test, removed at exit.
std::filesystem::path scratch_folder(const std::string& name);

}  // namespace lacuna::testing

/// `LACUNA_NEEDS_DATA(path, "models/lab-16m");` declares `path`, or skips the test and has the
/// summary say so.
#define LACUNA_NEEDS_DATA(variable, relative)                                    \
  const std::filesystem::path variable = ::lacuna::testing::data_path(relative); \
  if (variable.empty()) GTEST_SKIP() << "test data missing: " << (relative)

/// The same for a file that ./dev fetches: `LACUNA_NEEDS_CACHE(path, "models/X.gguf");`
#define LACUNA_NEEDS_CACHE(variable, relative)                                    \
  const std::filesystem::path variable = ::lacuna::testing::cache_path(relative); \
  if (variable.empty()) GTEST_SKIP() << "test data missing: .cache/" << (relative)

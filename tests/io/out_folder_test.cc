#include "lacuna/io/out_folder.h"

#include "io/sample_model.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using ::testing::HasSubstr;

TEST(FolderPath, HasALastNameWhateverTheSlashes) {
  EXPECT_EQ(folder_path("models/out/"), "models/out");
  EXPECT_EQ(folder_path("models/./out/."), "models/out");
  EXPECT_EQ(folder_path("a/b/../out//"), "a/out");
  EXPECT_EQ(folder_path("/out/"), "/out");
  EXPECT_EQ(folder_path("/"), "/");
  EXPECT_EQ(folder_path("."), fs::current_path());
  EXPECT_EQ(folder_path(".."), fs::current_path().parent_path());
}

TEST(OutFolder, IsNeverTheCurrentFolderOrOneAboveIt) {
  EXPECT_EQ(out_folder("x/").value(), fs::current_path() / "x");
  for (const std::string& out :
       {std::string("."), std::string(".."), std::string("./"), std::string("x/.."),
        std::string("/"), fs::current_path().string()})
    EXPECT_THAT(message_of(out_folder(out), Code::kUsage), HasSubstr("current folder")) << out;
  const fs::path link = lacuna::testing::scratch_folder("out") / "link";
  fs::create_directory_symlink(fs::current_path(), link);
  EXPECT_THAT(message_of(out_folder(link), Code::kUsage), HasSubstr("current folder"));
}

TEST(OutLock, IsHeldByOneAndLeavesNothing) {
  const fs::path folder = lacuna::testing::scratch_folder("lock"), out = folder / "deep" / "out";
  auto lock = OutLock::take(out);
  ASSERT_TRUE(lock.ok()) << lock.error().message;
  EXPECT_THAT(message_of(OutLock::take(out)), HasSubstr("another run writes here"));
  EXPECT_TRUE(OutLock::take(folder / "other").ok());
  *lock = nullptr;
  EXPECT_TRUE(fs::is_empty(folder / "deep"));
  EXPECT_TRUE(OutLock::take(out).ok());
  put_text(out.string() + ".lock", "");  // a killed run's
  EXPECT_TRUE(OutLock::take(out).ok());
  EXPECT_TRUE(fs::is_empty(folder / "deep"));
}

TEST(OutFolder, IsNeverTheOneThatIsRead) {
  const auto folder = testing::scratch_folder("source");
  EXPECT_TRUE(check_not_source(folder / "other", folder).ok());
  const Status same = check_not_source(folder / "." / "", folder);
  ASSERT_FALSE(same.ok());
  EXPECT_EQ(same.error().code, Code::kUsage);
}

}  // namespace
}  // namespace lacuna::io

#include "lacuna/prune/journal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lacuna/io/file.h"
#include "support/data.h"

namespace lacuna::prune {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

Journal::Block block_with(float value) {
  return {{{"w", {DType::kF32, {1}, Bytes::take(std::vector<float>{value})}}}, {{"layers", {"w"}}}};
}

TEST(Journal, KeepsFinishedBlocksForTheSameRun) {
  const fs::path out = testing::scratch_folder("journal") / "out";
  const nlohmann::json run = {{"method", "wanda"}};
  auto journal = Journal::open(out, run, false);
  ASSERT_TRUE(journal.ok()) << journal.error().message;
  EXPECT_EQ(journal->finished_blocks(), 0);
  ASSERT_TRUE(journal->write(0, block_with(1)).ok());
  ASSERT_TRUE(journal->write(1, block_with(2)).ok());

  const auto again = Journal::open(out, run, true);
  ASSERT_TRUE(again.ok()) << again.error().message;
  EXPECT_EQ(again->finished_blocks(), 2);
  const auto second = again->read(1);
  ASSERT_TRUE(second.ok()) << second.error().message;
  EXPECT_EQ(second->tensors[0].name, "w");
  EXPECT_EQ(read_unaligned<float>(second->tensors[0].tensor.bytes.data()), 2);
  EXPECT_EQ(second->notes.at("layers")[0], "w");

  ASSERT_TRUE(again->remove().ok());
  EXPECT_EQ(Journal::open(out, run, true)->finished_blocks(), 0) << "starts afresh";
}

TEST(Journal, NoticesEveryDamagedByteOfABlock) {
  const fs::path out = testing::scratch_folder("journal") / "out";
  auto journal = Journal::open(out, {{"method", "wanda"}}, false);
  ASSERT_TRUE(journal->write(0, block_with(1)).ok() && journal->write(1, block_with(2)).ok());
  const fs::path file = out.string() + ".journal/block-000.safetensors";
  const auto whole = io::read_text(file);
  ASSERT_TRUE(whole.ok());
  const auto refused = [&](const std::string& text) {
    EXPECT_TRUE(io::write_text(file, text).ok());
    const auto block = journal->read(0);
    if (block.ok()) return false;
    EXPECT_THAT(block.error().message,
                AllOf(HasSubstr("block-000.safetensors"), HasSubstr("--resume")));
    return true;
  };
  for (size_t i = 0; i < whole->size(); ++i) {
    std::string damaged = *whole;
    damaged[i] ^= 1;
    // Spaces pad the header.
    EXPECT_TRUE(refused(damaged) || (*whole)[i] == ' ') << "byte " << i;
  }
  EXPECT_TRUE(refused(whole->substr(0, whole->size() - 1)));
  EXPECT_TRUE(refused(whole->substr(0, 20)));
  EXPECT_TRUE(refused(*io::read_text(out.string() + ".journal/block-001.safetensors")));
  EXPECT_FALSE(refused(*whole));
}

TEST(Journal, FinishedBlocksAreNeverThrownAwayUnasked) {
  const fs::path out = testing::scratch_folder("journal") / "out";
  ASSERT_TRUE(Journal::open(out, {{"a", 2}}, false).ok());
  auto journal = Journal::open(out, {{"a", 1}}, false);  // no block is lost by that
  ASSERT_TRUE(journal.ok()) << journal.error().message;
  ASSERT_TRUE(journal->write(0, block_with(1)).ok());
  for (const Status& refused :
       {Journal::check(out, false), Status(Journal::open(out, {{"a", 1}}, false).error())}) {
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().code, Code::kBadInput);
    EXPECT_THAT(refused.error().message,
                AllOf(HasSubstr("out.journal"), HasSubstr("--resume"), HasSubstr("remove the")));
  }
  EXPECT_EQ(Journal::open(out, {{"a", 1}}, true)->finished_blocks(), 1);
}

TEST(Journal, TouchesNoFolderThatIsNotOurs) {
  const fs::path folder = testing::scratch_folder("journal"), out = folder / "out";
  const fs::path theirs = folder / "out.journal";
  const auto refused = [&](const char* why) {
    for (const bool resume : {false, true}) {
      const auto opened = Journal::open(out, {{"a", 1}}, resume);
      ASSERT_FALSE(opened.ok()) << why;
      EXPECT_EQ(opened.error().code, Code::kBadInput);
      EXPECT_THAT(opened.error().message, AllOf(HasSubstr("out.journal"), HasSubstr(why)));
    }
  };
  ASSERT_TRUE(io::write_text(theirs, "a file").ok());
  refused("not a folder");
  fs::remove(theirs);
  fs::create_directories(theirs);
  ASSERT_TRUE(io::write_text(theirs / "diary.txt", "mine").ok());
  refused("holds diary.txt");
  EXPECT_EQ(*io::read_text(theirs / "diary.txt"), "mine");
  fs::remove(theirs / "diary.txt");
  for (const char* text : {"{\"entries\": []}", "[]", "no JSON"}) {
    ASSERT_TRUE(io::write_text(theirs / "journal.json", text).ok());
    refused("not written by this tool");
    EXPECT_EQ(*io::read_text(theirs / "journal.json"), text);
  }
}

TEST(Journal, RemovesItsOwnFilesOnly) {
  const fs::path out = testing::scratch_folder("journal") / "out";
  auto journal = Journal::open(out, {{"a", 1}}, false);
  ASSERT_TRUE(journal->write(0, block_with(1)).ok());
  ASSERT_TRUE(io::write_text(out.string() + ".journal/diary.txt", "mine").ok());
  EXPECT_FALSE(journal->remove().ok());
  EXPECT_TRUE(fs::exists(out.string() + ".journal/diary.txt"));
  fs::remove(out.string() + ".journal/diary.txt");
  ASSERT_TRUE(journal->remove().ok());
  EXPECT_FALSE(fs::exists(out.string() + ".journal"));
}

TEST(Journal, OfAnotherRunIsRefusedAndTheDifferenceNamed) {
  const fs::path out = testing::scratch_folder("journal") / "out";
  ASSERT_TRUE(Journal::open(out, {{"method", "wanda"}, {"seed", 1}}, false).ok());
  const auto other = Journal::open(out, {{"method", "sparsegpt"}, {"seed", 1}}, true);
  ASSERT_FALSE(other.ok());
  EXPECT_EQ(other.error().code, Code::kBadInput);
  EXPECT_THAT(other.error().message, HasSubstr("different: method)"));
  const auto less = Journal::open(out, {{"seed", 1}}, true);
  ASSERT_FALSE(less.ok());
  EXPECT_THAT(less.error().message, HasSubstr("different: method)"));
}

TEST(Journal, CountsABlockOnlyWhenAllBeforeItAreThere) {
  const fs::path out = testing::scratch_folder("journal") / "out";
  auto journal = Journal::open(out, {{"a", 1}}, false);
  ASSERT_TRUE(journal->write(0, block_with(1)).ok());
  ASSERT_TRUE(journal->write(2, block_with(3)).ok());
  EXPECT_EQ(Journal::open(out, {{"a", 1}}, true)->finished_blocks(), 1);
}

TEST(Journal, AKillBeforeItsFirstFileLeavesNothingToResume) {
  const fs::path out = testing::scratch_folder("journal") / "out";
  fs::create_directories(out.string() + ".journal");
  const auto journal = Journal::open(out, {{"a", 1}}, true);
  ASSERT_TRUE(journal.ok()) << journal.error().message;
  EXPECT_EQ(journal->finished_blocks(), 0);
}

}  // namespace
}  // namespace lacuna::prune

#include "lacuna/io/file.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/sample_model.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

size_t files_in(const fs::path& folder) {
  return static_cast<size_t>(
      std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

TEST(MapFile, GivesTheBytesAndOutlivesTheFile) {
  const fs::path file = lacuna::testing::scratch_folder("file") / "a";
  put_text(file, "some bytes");
  const Bytes bytes = map_file(file).value();
  fs::remove(file);
  EXPECT_EQ(std::string(bytes.as<char>(), bytes.size()), "some bytes");
}

TEST(MapFile, AnEmptyFileIsEmptyBytes) {
  const fs::path file = lacuna::testing::scratch_folder("file") / "a";
  put_text(file, "");
  EXPECT_TRUE(map_file(file).value().empty());
  EXPECT_EQ(read_text(file).value(), "");
}

TEST(MapFile, WhatIsNoFileIsNamed) {
  const fs::path folder = lacuna::testing::scratch_folder("file");
  EXPECT_THAT(message_of(map_file(folder / "missing")),
              AllOf(HasSubstr("missing"), HasSubstr("No such file")));
  EXPECT_THAT(message_of(map_file(folder)),
              AllOf(HasSubstr(folder.string()), HasSubstr("not a regular file")));
  EXPECT_THAT(message_of(map_file("/dev/null")), HasSubstr("not a regular file"));
}

TEST(AtomicFile, HasItsNameOnlyAfterCommit) {
  const fs::path folder = lacuna::testing::scratch_folder("file");
  const fs::path file = folder / "a";
  {
    auto atomic = AtomicFile::create(file).value();
    ASSERT_TRUE(atomic.write("01234", 5).ok());
    ASSERT_TRUE(atomic.write("56789", 5).ok());
    EXPECT_EQ(atomic.size(), 10u);
    EXPECT_FALSE(fs::exists(file));
    ASSERT_TRUE(atomic.commit().ok());
  }
  EXPECT_EQ(file_text(file), "0123456789");
  EXPECT_EQ(files_in(folder), 1u);
}

TEST(AtomicFile, LeavesNothingWhenGivenUpAndKeepsTheOldContent) {
  const fs::path folder = lacuna::testing::scratch_folder("file");
  put_text(folder / "a", "old");
  {
    auto atomic = AtomicFile::create(folder / "a").value();
    ASSERT_TRUE(atomic.write("new", 3).ok());
    AtomicFile other = AtomicFile::create(folder / "b").value();
    atomic = std::move(other);  // gives the first one up
  }
  EXPECT_EQ(file_text(folder / "a"), "old");
  EXPECT_EQ(files_in(folder), 1u);
}

TEST(AtomicFile, AppendsAnotherFileThatHasNoNameYet) {
  const fs::path folder = lacuna::testing::scratch_folder("file");
  std::string large(3'000'001, 'a');
  for (size_t i = 0; i < large.size(); i += 7) large[i] = static_cast<char>(i);
  {
    auto spool = AtomicFile::create(folder / "spool").value();
    ASSERT_TRUE(spool.write(large.data(), large.size()).ok());
    auto whole = AtomicFile::create(folder / "whole").value();
    ASSERT_TRUE(whole.write("head", 4).ok());
    ASSERT_TRUE(whole.append(spool).ok());
    ASSERT_TRUE(whole.commit().ok());
  }
  EXPECT_EQ(file_text(folder / "whole"), "head" + large);
  EXPECT_EQ(files_in(folder), 1u);
}

TEST(AtomicFile, ReplacesNothingButAFile) {
  const fs::path folder = lacuna::testing::scratch_folder("file");
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0644), 0);
  fs::create_directory(folder / "folder");
  fs::create_symlink("pipe", folder / "link");
  for (const fs::path& path :
       {folder / "pipe", folder / "folder", folder / "link", fs::path("/dev/null")})
    EXPECT_THAT(message_of(write_text(path, "x")),
                AllOf(HasSubstr("is not a regular file"), HasSubstr("Choose another name")))
        << path;
  EXPECT_TRUE(fs::is_fifo(folder / "pipe"));
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  EXPECT_EQ(files_in(folder), 3u) << "no temporary file";
}

TEST(AtomicFile, WritesWhereALinkLeadsAndLeavesTheLink) {
  const fs::path folder = lacuna::testing::scratch_folder("file");
  fs::create_directory(folder / "there");
  put_text(folder / "there/old", "old");
  fs::create_symlink("there/old", folder / "a");
  fs::create_symlink(folder / "there/new", folder / "b");  // of nothing yet
  fs::create_symlink("b", folder / "c");
  ASSERT_TRUE(write_text(folder / "a", "1").ok());
  ASSERT_TRUE(write_text(folder / "c", "2").ok());
  EXPECT_EQ(file_text(folder / "there/old"), "1");
  EXPECT_EQ(file_text(folder / "there/new"), "2");
  for (const char* link : {"a", "b", "c"}) EXPECT_TRUE(fs::is_symlink(folder / link)) << link;
}

TEST(AtomicFile, AFolderThatIsNotThereIsNamed) {
  EXPECT_THAT(message_of(write_text("/nowhere/at/all", "x"), Code::kCheckFailed),
              AllOf(HasSubstr("/nowhere/at/all"), HasSubstr("No such file")));
}

TEST(ScratchMemory, HoldsWhatIsWrittenAndLeavesNoFile) {
  const fs::path folder = testing::scratch_folder("scratch");
  constexpr size_t kSize = size_t{3} << 20;
  auto memory = scratch_memory(folder, kSize);
  if (!memory.ok() && memory.error().code == Code::kNotPossible)
    GTEST_SKIP() << memory.error().message;
  ASSERT_TRUE(memory.ok()) << memory.error().message;
  EXPECT_EQ(files_in(folder), 0u);
  std::byte* const bytes = memory->get();
  for (size_t i = 0; i < kSize; ++i) bytes[i] = static_cast<std::byte>(i * 7);
  release_pages(bytes + 100, kSize - 200);  // whole pages around them
  for (size_t i = 0; i < kSize; i += 1001) ASSERT_EQ(bytes[i], static_cast<std::byte>(i * 7)) << i;
}

TEST(ScratchMemory, SaysWhereNoRoomWasFound) {
  const fs::path folder = testing::scratch_folder("scratch");
  const auto memory = scratch_memory(folder, size_t{1} << 50);
  ASSERT_FALSE(memory.ok());
  if (memory.error().code == Code::kNotPossible) GTEST_SKIP() << memory.error().message;
  EXPECT_THAT(memory.error().message, AllOf(HasSubstr(folder.string()), HasSubstr("1126 TB")));
  EXPECT_EQ(files_in(folder), 0u);
  EXPECT_THAT(message_of(scratch_memory(folder / "missing", 1), Code::kCheckFailed),
              HasSubstr("No such file"));
}

/// A file system of 256 KiB, mounted for one test.
class DiskFull : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = lacuna::testing::scratch_folder("tmpfs");
    if (::mount("tmpfs", folder_.c_str(), "tmpfs", 0, "size=256k") != 0)
      GTEST_SKIP() << "the disk-full test needs root and tmpfs: " << std::strerror(errno);
    mounted_ = true;
  }
  void TearDown() override {
    if (mounted_) {
      EXPECT_EQ(::umount(folder_.c_str()), 0) << std::strerror(errno);
    }
  }
  fs::path folder_;
  bool mounted_ = false;
};

TEST_F(DiskFull, WritingAFileFailsByNameAndLeavesNothing) {
  const std::string text(1 << 20, 'x');
  EXPECT_THAT(message_of(write_text(folder_ / "big", text), Code::kBadInput),
              AllOf(HasSubstr("big"), HasSubstr("No space left"), HasSubstr("Free some space")));
  EXPECT_EQ(files_in(folder_), 0u);
}

TEST_F(DiskFull, ScratchMemoryIsRefusedWhereTheFolderLiesInMemory) {
  EXPECT_THAT(message_of(scratch_memory(folder_, 4096), Code::kNotPossible),
              AllOf(HasSubstr(folder_.string()), HasSubstr("4.10 kB"), HasSubstr("on a disk")));
  EXPECT_EQ(files_in(folder_), 0u);
}

TEST_F(DiskFull, WritingAModelFailsByNameAndLeavesNothing) {
  auto writer = CheckpointWriter::create(folder_ / "out", {});
  ASSERT_TRUE(writer.ok()) << writer.error().message;
  const Tensor large = random_matrix(512, 512, DType::kF32, {});
  EXPECT_THAT(message_of(writer->add("model.norm.weight", large), Code::kBadInput),
              AllOf(HasSubstr("out.partial"), HasSubstr("No space left")));
  writer = check_failed("given up");  // destroys the writer
  EXPECT_EQ(files_in(folder_), 0u);
}

TEST_F(DiskFull, ADiskThatFillsUpWhileTheShardIsAssembledIsNoticedToo) {
  auto writer = CheckpointWriter::create(folder_ / "out", {});
  ASSERT_TRUE(writer.ok()) << writer.error().message;
  const Tensor fits_once = random_matrix(200, 200, DType::kF32, {});
  ASSERT_TRUE(writer->add("model.norm.weight", fits_once).ok());
  EXPECT_THAT(message_of(writer->finish(sample_config()), Code::kBadInput),
              AllOf(HasSubstr("safetensors"), HasSubstr("No space left")));
  EXPECT_FALSE(fs::exists(folder_ / "out"));
}

}  // namespace
}  // namespace lacuna::io

#include "lacuna/io/text_source.h"

#include <cstdlib>

#include "io/sample_model.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ReadDocuments, ATextIsOneDocument) {
  const fs::path file = lacuna::testing::scratch_folder("text") / "a.txt";
  put_text(file, "one\ntwo\n");
  EXPECT_THAT(read_documents(file).value(), ElementsAre("one\ntwo\n"));
}

TEST(ReadDocuments, JsonLinesGiveTheirTextFields) {
  const fs::path file = lacuna::testing::scratch_folder("text") / "a.jsonl";
  put_text(file, "{\"text\": \"one\\n\", \"id\": 3}\r\n\n{\"text\": \"\"}\n{\"text\": \"two\"}");
  EXPECT_THAT(read_documents(file).value(), ElementsAre("one\n", "two"));
}

TEST(ReadDocuments, ABadLineIsNamedByItsNumber) {
  const fs::path file = lacuna::testing::scratch_folder("text") / "a.jsonl";
  for (const char* bad : {"{\"text\": 5}", "[]", "{\"txt\": \"a\"}", "{", "\xff"}) {
    put_text(file, std::string("{\"text\": \"one\"}\n\n") + bad + "\n");
    EXPECT_THAT(message_of(read_documents(file)), AllOf(HasSubstr("a.jsonl"), HasSubstr("line 3")))
        << bad;
  }
}

TEST(ReadDocuments, EmptyAndMissingTextsAreRefusedByName) {
  const fs::path folder = lacuna::testing::scratch_folder("text");
  put_text(folder / "a.txt", " \n\t\n");
  put_text(folder / "b.jsonl", "\n");
  EXPECT_THAT(message_of(read_documents(folder / "a.txt")),
              AllOf(HasSubstr("a.txt"), HasSubstr("no text")));
  EXPECT_THAT(message_of(read_documents(folder / "b.jsonl")), HasSubstr("no text"));
  EXPECT_THAT(message_of(read_documents(folder / "c.txt")), HasSubstr("c.txt"));
}

TEST(ReadDocuments, ReadsRealTexts) {
  LACUNA_NEEDS_DATA(c4, "text/c4_sample.jsonl");
  EXPECT_EQ(read_documents(c4).value().size(), 1180u);
  LACUNA_NEEDS_DATA(stories, "text/tinystories.jsonl");
  EXPECT_EQ(read_documents(stories).value().size(), 900u);
}

TEST(FindDataset, FindsPathsAndNamesAndSaysWhereItLooked) {
  const fs::path folder = lacuna::testing::scratch_folder("text");
  fs::create_directories(folder / "c4");
  put_text(folder / "c4/train.txt", "x");
  put_text(folder / "wiki.jsonl", "x");
  fs::create_directories(folder / "wikitext-2");
  for (const char* part :
       {"wiki.train.tokens", "wiki.train.raw", "wiki.test.tokens", "wiki.test.raw"})
    put_text(folder / "wikitext-2" / part, "x");
  ::unsetenv("LACUNA_DATASETS");
  EXPECT_EQ(find_dataset((folder / "wiki.jsonl").string(), Split::kTrain).value(),
            folder / "wiki.jsonl");
  EXPECT_THAT(message_of(find_dataset("c4", Split::kTrain)),
              AllOf(HasSubstr("c4"), HasSubstr("LACUNA_DATASETS")));
  ::setenv("LACUNA_DATASETS", folder.c_str(), 1);
  EXPECT_EQ(find_dataset("c4", Split::kTrain).value(), folder / "c4/train.txt");
  EXPECT_EQ(find_dataset("wiki", Split::kTest).value(), folder / "wiki.jsonl");
  EXPECT_EQ(find_dataset("wikitext-2", Split::kTrain).value(),
            folder / "wikitext-2/wiki.train.raw");
  EXPECT_EQ(find_dataset("wikitext-2", Split::kTest).value(), folder / "wikitext-2/wiki.test.raw");
  // Nothing is judged by what it may have been calibrated with.
  EXPECT_THAT(message_of(find_dataset("c4", Split::kTest)),
              HasSubstr((folder / "c4/test.txt").string()));
  EXPECT_THAT(message_of(find_dataset("ptb", Split::kTrain)),
              AllOf(HasSubstr((folder / "ptb.txt").string()),
                    HasSubstr((folder / "ptb/train.txt").string())));
  ::unsetenv("LACUNA_DATASETS");
}

}  // namespace
}  // namespace lacuna::io

#include "io/sample_model.h"
#include "lacuna/io/legacy_bitmask.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using format::CompactMatrix;
using format::Pattern;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

const std::string kQuery = "model.layers.0.self_attn.q_proj.weight";

std::set<std::string> names_in(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder))
    names.insert(entry.path().filename().string());
  return names;
}

void expect_same_weights(const fs::path& a, const fs::path& b) {
  const auto left = Checkpoint::open(a), right = Checkpoint::open(b);
  ASSERT_TRUE(left.ok()) << left.error().message;
  ASSERT_TRUE(right.ok()) << right.error().message;
  ASSERT_EQ(left->weights().size(), right->weights().size());
  for (const auto& [name, info] : left->weights()) {
    const auto x = left->dense(name), y = right->dense(name);
    ASSERT_TRUE(x.ok()) << x.error().message;
    ASSERT_TRUE(y.ok()) << y.error().message;
    EXPECT_TRUE(equal(*x, *y)) << name;
    EXPECT_EQ(info.pattern, right->weights().at(name).pattern) << name;
  }
}

constexpr Store kStores[] = {Store::kCompact, Store::kDense, Store::kSparseBitmask,
                             Store::kCsr,     Store::kCoo,   Store::kBsr};

TEST(CheckpointWriter, EqualCallsGiveEqualFolders) {
  for (const Store store : kStores) {
    const fs::path a = write_model(sample_weights(), store);
    const fs::path b = write_model(sample_weights(), store);
    EXPECT_EQ(names_in(a), names_in(b));
    for (const std::string& name : names_in(a))
      EXPECT_EQ(file_text(a / name), file_text(b / name)) << name;
  }
}

TEST(CheckpointWriter, EveryStoreKeepsEveryWeightAndItsPattern) {
  const fs::path compact = write_model(sample_weights(), Store::kCompact);
  for (const Store store : kStores)
    expect_same_weights(compact, write_model(sample_weights(), store));
}

TEST(CheckpointWriter, FromCompactThroughAnyStoreAndBackGivesTheSameBytes) {
  // As convert writes it: in the order of the names.
  const fs::path compact =
      rewrite_model(write_model(sample_weights(), Store::kCompact), Store::kCompact);
  for (const Store store : kStores) {
    const fs::path back = rewrite_model(rewrite_model(compact, store), Store::kCompact);
    for (const char* name : {"model.safetensors", "checksums.json", "config.json"})
      EXPECT_EQ(file_text(back / name), file_text(compact / name)) << store_name(store) << name;
  }
}

TEST(CheckpointWriter, TwoOfFourAloneBecomesSparse24AndComesBackTheSame) {
  const fs::path compact =
      write_model({{kQuery, random_compact(64, 60, DType::kBF16, Pattern::keep_of(2, 4))},
                   {"model.norm.weight", random_matrix(1, 4, DType::kF32, {})}},
                  Store::kCompact);
  const fs::path legacy = rewrite_model(compact, Store::kSparseBitmask);
  const auto checkpoint = Checkpoint::open(legacy).value();
  EXPECT_EQ(checkpoint.weights().at(kQuery).store, Store::kSparse24Bitmask);
  EXPECT_THAT(checkpoint.weights().at(kQuery).parts,
              UnorderedElementsAre("model.layers.0.self_attn.q_proj.bitmask",
                                   "model.layers.0.self_attn.q_proj.compressed",
                                   "model.layers.0.self_attn.q_proj.shape"));
  const json sparsity = checkpoint.config()["quantization_config"]["sparsity_config"];
  EXPECT_EQ(checkpoint.config()["quantization_config"]["quant_method"], "compressed-tensors");
  EXPECT_EQ(sparsity["format"], "sparse-24-bitmask");
  EXPECT_EQ(sparsity["sparsity_structure"], "2:4");
  EXPECT_THAT(sparsity["targets"], ElementsAre("model.layers.0.self_attn.q_proj"));
  EXPECT_DOUBLE_EQ(sparsity["global_sparsity"], 64 * 30 / (64 * 60 + 4.0));
  const fs::path back = rewrite_model(legacy, Store::kCompact);
  for (const char* name : {"model.safetensors", "config.json"})
    EXPECT_EQ(file_text(back / name), file_text(compact / name));
}

TEST(CheckpointWriter, AMixedModelIsSparseBitmaskThroughoutWhicheverComesFirst) {
  const std::pair<std::string, Weight> two_of_four = {
      "a.weight", random_compact(8, 8, DType::kF32, Pattern::keep_of(2, 4))};
  const std::pair<std::string, Weight> unstructured = {
      "b.weight", random_compact(8, 8, DType::kF32, Pattern::unstructured())};
  const std::pair<std::string, Weight> dense = {"c.weight", random_matrix(2, 2, DType::kF32, {})};
  for (const auto& weights : {std::vector{two_of_four, dense, unstructured},
                              std::vector{unstructured, dense, two_of_four}}) {
    for (const uint64_t shard_bytes : {uint64_t{1} << 30, uint64_t{100}}) {
      const fs::path model =
          write_model(weights, Store::kSparseBitmask, sample_config(), shard_bytes);
      const auto checkpoint = Checkpoint::open(model).value();
      EXPECT_EQ(checkpoint.weights().at("a.weight").store, Store::kSparseBitmask);
      EXPECT_EQ(checkpoint.weights().at("b.weight").store, Store::kSparseBitmask);
      EXPECT_EQ(checkpoint.config()["quantization_config"]["sparsity_config"]["format"],
                "sparse-bitmask");
      for (const auto& [name, weight] : weights) {
        EXPECT_THAT(checkpoint.verify_checksums(name).value(), IsEmpty());
        if (const auto* matrix = std::get_if<CompactMatrix>(&weight)) {
          EXPECT_TRUE(equal(std::get<CompactMatrix>(checkpoint.weight(name).value()), *matrix))
              << name;
        }
      }
      EXPECT_FALSE(fs::exists(model / "before"));
    }
  }
}

TEST(CheckpointWriter, CutsShardsAtTheirSizeAndKeepsAWeightTogether) {
  const fs::path whole = write_model(sample_weights(), Store::kCompact);
  const fs::path cut = write_model(sample_weights(), Store::kCompact, sample_config(), 4000);
  EXPECT_TRUE(fs::exists(whole / "model.safetensors"));
  EXPECT_FALSE(fs::exists(whole / "model.safetensors.index.json"));
  expect_same_weights(whole, cut);
  const json index = json::parse(file_text(cut / "model.safetensors.index.json"));
  const auto checkpoint = Checkpoint::open(cut).value();
  EXPECT_EQ(index["metadata"]["total_size"], checkpoint.total_bytes());
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : index["weight_map"].items())
    shards.insert(shard.get<std::string>());
  ASSERT_GT(shards.size(), 2u);
  EXPECT_EQ(*shards.begin(), fmt::format("model-00001-of-{:05}.safetensors", shards.size()));
  for (const auto& [name, info] : checkpoint.weights()) {
    for (const std::string& part : info.parts)
      EXPECT_EQ(index["weight_map"][part], index["weight_map"][info.parts[0]]) << part;
    EXPECT_THAT(checkpoint.verify_checksums(name).value(), IsEmpty());
  }
}

TEST(CheckpointWriter, MergesIntoTheKeyOfTheCaller) {
  json config = sample_config();
  config["lacuna"] = {{"method", "sparsegpt"}, {"weights", {{"ghost", 1}}}};
  const fs::path model = write_model(sample_weights(), Store::kDense, config);
  const json ours = json::parse(file_text(model / "config.json"))["lacuna"];
  EXPECT_EQ(ours["method"], "sparsegpt");
  EXPECT_EQ(ours["format_version"], 1);
  EXPECT_EQ(ours["weights"].size(), 5u);
  EXPECT_EQ(ours["weights"][kQuery],
            (json{{"pattern", "unstructured"}, {"shape", {130, 37}}, {"values", "BF16"}}));
  config["lacuna"] = nullptr;
  EXPECT_TRUE(Checkpoint::open(write_model({}, Store::kCompact, config)).ok());
}

TEST(CheckpointWriter, ADeclaredDenseTensorKeepsItsPattern) {
  const Tensor dense = random_matrix(8, 8, DType::kBF16, Pattern::keep_of(4, 8));
  json config = sample_config();
  config["lacuna"] = {{"format_version", 1},
                      {"weights",
                       {{"a.weight", {{"pattern", "4:8"}, {"shape", {8, 8}}, {"values", "BF16"}}},
                        {"gone", {{"pattern", "2:4"}, {"shape", {8, 8}}, {"values", "BF16"}}}}}};
  const auto checkpoint =
      Checkpoint::open(write_model({{"a.weight", dense}}, Store::kDense, config)).value();
  EXPECT_EQ(checkpoint.weights().at("a.weight").pattern, Pattern::keep_of(4, 8));
  EXPECT_FALSE(checkpoint.config()["lacuna"]["weights"].contains("gone"));
}

TEST(CheckpointWriter, DropsTheDescriptionOfAnotherSparseStore) {
  json config = sample_config();
  config["compression_config"] = {{"sparsity_config", {{"format", "sparse-bitmask"}}}};
  config["quantization_config"] = {{"quant_method", "fp8"}};
  const json written =
      json::parse(file_text(write_model({}, Store::kDense, config) / "config.json"));
  EXPECT_FALSE(written.contains("compression_config"));
  EXPECT_TRUE(written.contains("quantization_config"));
}

TEST(CheckpointWriter, RefusesWhatItCannotWrite) {
  const fs::path out = lacuna::testing::scratch_folder("writer") / "out";
  auto writer = CheckpointWriter::create(out, {.store = Store::kSparseBitmask}).value();
  const Tensor tensor = random_matrix(2, 4, DType::kF32, {});
  ASSERT_TRUE(writer.add("a.weight", tensor).ok());
  EXPECT_THAT(message_of(writer.add("a.weight", tensor)), HasSubstr("\"a.weight\""));
  CompactMatrix broken = random_compact(2, 4, DType::kF32, Pattern::keep_of(2, 4));
  EXPECT_THAT(message_of(writer.add("b.bias", broken)), HasSubstr("b.bias"));
  broken.values = {};
  EXPECT_THAT(message_of(writer.add("b.weight", broken)), HasSubstr("\"b.weight\""));
  EXPECT_THAT(message_of(writer.copy_file("/no/such/file")), HasSubstr("/no/such/file"));
  EXPECT_THAT(message_of(writer.finish(json::array())), HasSubstr("JSON object"));
  json config = sample_config();
  config["name"] = "\xff";
  EXPECT_THAT(message_of(writer.finish(config)), HasSubstr("UTF-8"));
  EXPECT_FALSE(fs::exists(out));
}

TEST(CheckpointWriter, StagesBesideTheFolderAndCleansUpWhenGivenUp) {
  const fs::path folder = lacuna::testing::scratch_folder("writer");
  {
    auto writer = CheckpointWriter::create(folder / "deep/out/", {}).value();
    ASSERT_TRUE(writer.add("a", random_matrix(2, 2, DType::kF32, {})).ok());
    EXPECT_TRUE(fs::exists(folder / "deep/out.partial"));
    EXPECT_FALSE(fs::exists(folder / "deep/out"));
    CheckpointWriter moved = std::move(writer);
  }
  EXPECT_FALSE(fs::exists(folder / "deep/out.partial"));
  EXPECT_FALSE(fs::exists(folder / "deep/out"));
}

TEST(CheckpointWriter, TouchesNoFolderThatIsNotOurs) {
  const fs::path folder = lacuna::testing::scratch_folder("writer");
  const auto fault = [&](const char* name) {
    return message_of(CheckpointWriter::create(folder / name, {}));
  };
  fs::create_directories(folder / "theirs");
  put_text(folder / "theirs/thesis.tex", "x");
  EXPECT_THAT(fault("theirs"), AllOf(HasSubstr("theirs"), HasSubstr("not written by this tool")));
  put_text(folder / "theirs/config.json", sample_config().dump());
  EXPECT_THAT(fault("theirs"), HasSubstr("not written by this tool"));
  put_text(folder / "file", "x");
  EXPECT_THAT(fault("file"), AllOf(HasSubstr("file"), HasSubstr("not a folder")));
  fs::create_directories(folder / "new.partial");
  put_text(folder / "new.partial/notes", "x");
  EXPECT_THAT(fault("new"), HasSubstr("new.partial"));
  EXPECT_EQ(file_text(folder / "theirs/thesis.tex"), "x");
  EXPECT_EQ(file_text(folder / "new.partial/notes"), "x");
  fs::create_directories(folder / "empty");
  EXPECT_TRUE(CheckpointWriter::create(folder / "empty", {}).ok());
  EXPECT_THAT(message_of(CheckpointWriter::create("/proc/nowhere/out", {}), Code::kCheckFailed),
              HasSubstr("/proc/nowhere/out"));
}

TEST(CheckpointWriter, ReplacesOurOwnFolderAndWhatAKilledRunLeft) {
  const fs::path out = write_model(sample_weights(), Store::kCompact, sample_config(), 4000);
  fs::copy(out, out.string() + ".partial");
  put_text(out.string() + ".partial/shard.partial", "x");
  auto writer = CheckpointWriter::create(out, {.store = Store::kDense}).value();
  ASSERT_TRUE(writer.add("a.weight", random_matrix(2, 2, DType::kF32, {})).ok());
  ASSERT_TRUE(Checkpoint::open(out).value().contains(kQuery))
      << "the old model stands till the end";
  ASSERT_TRUE(writer.finish(sample_config()).ok());
  EXPECT_THAT(names_in(out),
              UnorderedElementsAre("config.json", "checksums.json", "model.safetensors"));
  EXPECT_THAT(names_in(out.parent_path()), ElementsAre("out"));
}

TEST(CheckpointWriter, RemovesNothingThatItDidNotWrite) {
  for (const bool listed : {true, false}) {
    const fs::path out = write_model(sample_weights(), Store::kCompact, sample_config(), 4000);
    if (!listed) fs::remove(out / "checksums.json");
    ASSERT_TRUE(CheckpointWriter::create(out, {}).ok()) << "all of it is ours";
    for (const char* name : {"thesis.tex", "sub/folder"}) {
      const fs::path theirs = out / name;
      fs::create_directories(theirs.parent_path());
      put_text(theirs, "mine");
      EXPECT_THAT(message_of(CheckpointWriter::create(out, {})),
                  AllOf(HasSubstr("holds " + theirs.lexically_relative(out).begin()->string()),
                        HasSubstr("Move it away")));
      EXPECT_EQ(file_text(theirs), "mine");
      fs::remove_all(out / *theirs.lexically_relative(out).begin());
    }
  }
}

TEST(CheckpointWriter, RemovesNothingThatCameWhileItWrote) {
  const fs::path out = write_model(sample_weights(), Store::kCompact);
  auto writer = CheckpointWriter::create(out, {}).value();
  put_text(out / "notes.md", "mine");  // looks like a companion, and no run wrote it
  EXPECT_THAT(message_of(writer.finish(sample_config())), HasSubstr("holds notes.md"));
  EXPECT_EQ(file_text(out / "notes.md"), "mine");
}

TEST(CheckpointWriter, IsAloneInItsFolder) {
  const fs::path out = lacuna::testing::scratch_folder("writer") / "out";
  {
    auto first = CheckpointWriter::create(out, {}).value();
    EXPECT_THAT(message_of(CheckpointWriter::create(out.string() + "/", {})),
                HasSubstr("another run writes here"));
    ASSERT_TRUE(first.finish(sample_config()).ok());
    EXPECT_TRUE(CheckpointWriter::create(out, {}).ok()) << "the first is done";
  }
  EXPECT_THAT(names_in(out.parent_path()), ElementsAre("out"));
  EXPECT_THAT(message_of(CheckpointWriter::create(".", {}), Code::kUsage),
              HasSubstr("current folder"));
}

TEST(CopyCompanionFiles, TakesTheSmallFilesAndNeverWeightsOrConfig) {
  const fs::path folder = lacuna::testing::scratch_folder("companions");
  for (const char* name :
       {"config.json", "checksums.json", "model.safetensors.index.json", "model.safetensors",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.json", "vocab.bpe",
        "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "thesis.tex"})
    put_text(folder / name, name);
  fs::create_directories(folder / "folder.json");
  const fs::path out = lacuna::testing::scratch_folder("companions") / "out";
  auto writer = CheckpointWriter::create(out, {}).value();
  ASSERT_TRUE(copy_companion_files(folder, writer).ok());
  ASSERT_TRUE(writer.finish(sample_config()).ok());
  EXPECT_THAT(names_in(out),
              UnorderedElementsAre("config.json", "checksums.json", "model.safetensors",
                                   "tokenizer.json", "vocab.bpe", "tokenizer.model", "merges.txt",
                                   "chat_template.jinja", "LICENSE"));
  EXPECT_EQ(file_text(out / "tokenizer.json"), "tokenizer.json");
  EXPECT_NE(file_text(out / "config.json"), "config.json");
  EXPECT_THAT(message_of(copy_companion_files("/no/such", writer)), HasSubstr("/no/such"));
}

TEST(CheckpointWriter, ARealModelSurvivesEveryStore) {
  const auto folder = lacuna::testing::demo_model_folder();
  const auto dense = Checkpoint::open(folder).value();
  std::vector<std::pair<std::string, Weight>> weights;
  size_t pruned_dense = 0, pruned_compact = 0;
  for (const auto& [name, info] : dense.weights()) {
    const Tensor tensor = dense.dense(name).value();
    if (name.find("_proj") == std::string::npos) {
      weights.emplace_back(name, tensor);
      continue;
    }
    // Zeros every second weight: half of it gone, in no N:M pattern across rows.
    auto* values = reinterpret_cast<const uint16_t*>(tensor.bytes.data());
    std::vector<uint16_t> kept(values, values + tensor.elements());
    for (size_t i = 0; i < kept.size(); ++i)
      if (random_uniform(5, 5, i) < 0.5) kept[i] = 0;
    const Tensor sparse{tensor.dtype, tensor.shape, Bytes::take(std::move(kept))};
    weights.emplace_back(name, format::compress(sparse, Pattern::unstructured()).value());
    pruned_dense += tensor.bytes.size();
    pruned_compact += std::get<CompactMatrix>(weights.back().second).size_bytes();
  }
  EXPECT_LE(static_cast<double>(pruned_compact), 0.57 * static_cast<double>(pruned_dense));
  const fs::path compact = write_model(weights, Store::kCompact, dense.config());
  for (const Store store : {Store::kDense, Store::kSparseBitmask}) {
    const fs::path other = rewrite_model(compact, store);
    expect_same_weights(compact, other);
    EXPECT_EQ(file_text(rewrite_model(other, Store::kCompact) / "model.safetensors"),
              file_text(compact / "model.safetensors"));
  }
}

}  // namespace
}  // namespace lacuna::io

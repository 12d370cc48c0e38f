#include "lacuna/io/checkpoint.h"

#include "io/sample_model.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using format::CompactMatrix;
using format::Pattern;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

const std::string kQuery = "model.layers.0.self_attn.q_proj.weight";  // unstructured
const std::string kKey = "model.layers.0.self_attn.k_proj.weight";    // 2:4
const std::string kNorm = "model.layers.0.input_layernorm.weight";    // a vector
const std::string kUp = "model.layers.0.mlp.up_proj.weight";          // blocks

TEST(Checkpoint, OpensRealShardsWithTheirIndex) {
  LACUNA_NEEDS_DATA(folder, "models/lab-16m");
  const auto checkpoint = Checkpoint::open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
  EXPECT_EQ(checkpoint->folder(), folder);
  EXPECT_EQ(checkpoint->weights().size(), 74u);
  EXPECT_FALSE(checkpoint->has_checksums());
  const std::string name = "model.layers.3.mlp.down_proj.weight";
  const WeightInfo& info = checkpoint->weights().at(name);
  EXPECT_EQ(info.shape, (Shape{384, 1024}));
  EXPECT_EQ(info.dtype, DType::kBF16);
  EXPECT_EQ(info.store, Store::kDense);
  EXPECT_EQ(info.bytes, 384u * 1024 * 2);
  EXPECT_THAT(info.parts, ElementsAre(name));
  size_t bytes = 0;
  for (const auto& [weight, facts] : checkpoint->weights()) bytes += facts.bytes;
  EXPECT_EQ(bytes, checkpoint->total_bytes());
  EXPECT_TRUE(
      equal(std::get<Tensor>(checkpoint->weight(name).value()), checkpoint->part(name).value()));
  EXPECT_THAT(message_of(checkpoint->weight("nonsense")), HasSubstr("nonsense"));
  EXPECT_THAT(message_of(checkpoint->dense("nonsense")), HasSubstr("nonsense"));
  EXPECT_THAT(message_of(checkpoint->part("nonsense")), HasSubstr("nonsense"));
  EXPECT_THAT(message_of(checkpoint->verify_checksums("nonsense")), HasSubstr("nonsense"));
  EXPECT_THAT(message_of(checkpoint->verify_checksums(name)), HasSubstr("no checksums"));
}

TEST(Checkpoint, WhatIsMissingIsNamed) {
  const fs::path folder = lacuna::testing::scratch_folder("ckpt");
  EXPECT_THAT(open_fault("/nowhere"), HasSubstr("/nowhere/config.json"));
  put_text(folder / "config.json", "{}");
  EXPECT_THAT(open_fault(folder), AllOf(HasSubstr("model.safetensors"), HasSubstr("No such file")));
  put_text(folder / "config.json", "[]");
  EXPECT_THAT(open_fault(folder), HasSubstr("not a JSON object"));
}

TEST(Checkpoint, AnIndexThatDisagreesWithItsShardsIsRefused) {
  const fs::path model = write_model(sample_weights(), Store::kDense, sample_config(), 2000);
  const fs::path index_file = model / "model.safetensors.index.json";
  const json index = json::parse(file_text(index_file));
  ASSERT_GT(index["weight_map"].size(), 3u);
  ASSERT_TRUE(Checkpoint::open(model).ok());
  const auto fault = [&](const std::function<void(json&)>& change) {
    json changed = index;
    change(changed);
    put_text(index_file, changed.dump());
    return open_fault(model);
  };
  const std::string shard = index["weight_map"][kQuery];
  EXPECT_THAT(fault([&](json& i) { i["weight_map"]["ghost"] = shard; }),
              AllOf(HasSubstr(shard), HasSubstr("\"ghost\"")));
  EXPECT_THAT(fault([&](json& i) { i["weight_map"].erase(kNorm); }),
              AllOf(HasSubstr(kNorm), HasSubstr("not in")));
  EXPECT_THAT(fault([&](json& i) { i["weight_map"][kQuery] = "../x.safetensors"; }),
              HasSubstr("../x.safetensors"));
  EXPECT_THAT(fault([&](json& i) { i["weight_map"][kQuery] = 3; }), HasSubstr(kQuery));
  EXPECT_THAT(fault([&](json& i) { i.erase("weight_map"); }), HasSubstr("weight_map"));
  EXPECT_THAT(fault([&](json& i) { i["weight_map"]["ghost"] = "no.safetensors"; }),
              HasSubstr("no.safetensors"));
  put_text(index_file, index.dump());
  fs::resize_file(model / shard, fs::file_size(model / shard) - 1);
  EXPECT_THAT(open_fault(model), AllOf(HasSubstr(shard), HasSubstr("truncated")));
}

TEST(Checkpoint, ReadsEveryPatternOfTheCompactStore) {
  const auto weights = sample_weights();
  const auto checkpoint = Checkpoint::open(write_model(weights, Store::kCompact)).value();
  ASSERT_EQ(checkpoint.weights().size(), weights.size());
  EXPECT_TRUE(checkpoint.has_checksums());
  for (const auto& [name, weight] : weights) {
    const WeightInfo& info = checkpoint.weights().at(name);
    const Weight read = checkpoint.weight(name).value();
    if (const auto* matrix = std::get_if<CompactMatrix>(&weight)) {
      EXPECT_EQ(info.store, Store::kCompact);
      EXPECT_EQ(info.pattern, matrix->pattern);
      EXPECT_EQ(info.bytes, matrix->size_bytes());
      EXPECT_TRUE(equal(std::get<CompactMatrix>(read), *matrix)) << name;
      EXPECT_TRUE(equal(checkpoint.dense(name).value(), format::expand(*matrix))) << name;
    } else {
      EXPECT_EQ(info.store, Store::kDense);
      EXPECT_TRUE(equal(std::get<Tensor>(read), std::get<Tensor>(weight))) << name;
    }
    EXPECT_THAT(checkpoint.verify_checksums(name).value(), IsEmpty()) << name;
  }
}

TEST(Checkpoint, DeclarationsItDoesNotKnowAreRefusedByName) {
  const auto fault = [](const std::function<void(json&)>& change) {
    const fs::path model = write_model(sample_weights(), Store::kCompact);
    edit_config(model, [&](json& config) { change(config["lacuna"]); });
    return open_fault(model);
  };
  EXPECT_THAT(fault([](json& l) { l["format_version"] = 4; }),
              AllOf(HasSubstr("config.json"), HasSubstr("format version (got 4; need 1, 2 or 3)")));
  EXPECT_THAT(fault([](json& l) { l.erase("format_version"); }), HasSubstr("got none"));
  EXPECT_THAT(fault([](json& l) { l = 3; }), HasSubstr("not an object"));
  EXPECT_THAT(fault([](json& l) { l["weights"] = json::array(); }), HasSubstr("not an object"));
  EXPECT_THAT(fault([](json& l) { l["weights"][kKey]["pattern"] = "5:4"; }),
              AllOf(HasSubstr(kKey), HasSubstr("5:4")));
  EXPECT_THAT(fault([](json& l) { l["weights"][kKey] = 1; }), HasSubstr(kKey));
  EXPECT_THAT(fault([](json& l) { l["weights"][kKey]["values"] = "I8"; }),
              AllOf(HasSubstr(kKey), HasSubstr("I8")));
  EXPECT_THAT(fault([](json& l) { l["weights"][kKey]["values"] = "BF16"; }),
              AllOf(HasSubstr(kKey + ".values"), HasSubstr("got F16"), HasSubstr("need BF16")));
  EXPECT_THAT(fault([](json& l) { l["weights"][kKey]["shape"] = {64}; }), HasSubstr(kKey));
  EXPECT_THAT(fault([](json& l) {
                l["weights"][kKey]["shape"] = {64, int64_t{1} << 40};
              }),
              HasSubstr(kKey));
  EXPECT_THAT(fault([](json& l) {
                l["weights"][kKey]["shape"] = {65, 64};
              }),
              AllOf(HasSubstr(kKey + ".bitmap"), HasSubstr("[64, 8]"), HasSubstr("[65, 8]")));
  EXPECT_THAT(fault([](json& l) { l["weights"].erase(kKey); }),
              AllOf(HasSubstr(kKey + ".bitmap"), HasSubstr("config.json")));
  EXPECT_THAT(fault([](json& l) { l["weights"].erase(kUp); }), HasSubstr(kUp + ".block_columns"));
  EXPECT_THAT(fault([](json& l) { l["weights"]["ghost"] = l["weights"][kKey]; }),
              AllOf(HasSubstr("ghost"), HasSubstr("no file holds it")));
}

TEST(Checkpoint, PartsThatAreMissingOrOfTheWrongTypeAreRefusedByName) {
  const Tensor longs{DType::kI64, {64, 8}, Bytes::take(std::vector<int64_t>(64 * 8))};
  const struct {
    std::string part;
    const Tensor* change;
  } cases[] = {{kKey + ".values", nullptr},      {kKey + ".bitmap", nullptr},
               {kKey + ".bitmap", &longs},       {kQuery + ".offsets", nullptr},
               {kQuery + ".offsets", &longs},    {kUp + ".block_offsets", nullptr},
               {kUp + ".block_columns", &longs}, {kUp + ".values", &longs}};
  for (const auto& [part, change] : cases) {
    const fs::path model = write_model(sample_weights(), Store::kCompact);
    edit_tensors(model / "model.safetensors", {{part, change}});
    EXPECT_THAT(open_fault(model), HasSubstr("\"" + part + "\"")) << part;
  }
}

TEST(Checkpoint, TheSameTensorInTwoShardsIsRefused) {
  const fs::path folder = lacuna::testing::scratch_folder("ckpt");
  const Tensor tensor = random_matrix(2, 2, DType::kF32, {});
  std::vector<SafetensorsFile> files;
  for (const char* name : {"a", "b"}) {
    ASSERT_TRUE(write_safetensors(folder / name, {{"twin", tensor}}).ok());
    files.push_back(SafetensorsFile::open(folder / name).value());
  }
  EXPECT_THAT(message_of(Checkpoint::from_files(json::object(), files, "C")),
              AllOf(HasSubstr((folder / "a").string()), HasSubstr((folder / "b").string()),
                    HasSubstr("twin")));
}

TEST(Checkpoint, EveryFlippedBitOfASparseWeightIsFoundByItsChecksum) {
  for (const std::string& part : std::vector<std::string>{
           kQuery + ".values", kQuery + ".bitmap", kQuery + ".offsets", kKey + ".values",
           kKey + ".bitmap", kUp + ".values", kUp + ".block_columns", kUp + ".block_offsets"}) {
    const fs::path model = write_model(sample_weights(), Store::kCompact);
    const fs::path file = model / "model.safetensors";
    flip_bit(file, data_position(file, part) + 1, 2);
    const auto checkpoint = Checkpoint::open(model).value();
    const std::string weight = part.substr(0, part.rfind('.'));
    EXPECT_THAT(checkpoint.verify_checksums(weight).value(),
                ElementsAre(AllOf(HasSubstr("model.safetensors"), HasSubstr("\"" + part + "\""),
                                  HasSubstr("chunk 1 of 1"))));
    EXPECT_THAT(checkpoint.verify_checksums("model.embed_tokens.weight").value(), IsEmpty());
  }
}

TEST(Checkpoint, ChecksumsNameTheChunkOfALargeTensor) {
  const fs::path model = write_model(
      {{"model.norm.weight", random_matrix(600, 1000, DType::kF32, {})}}, Store::kCompact);
  const fs::path file = model / "model.safetensors";
  flip_bit(file, data_position(file, "model.norm.weight") + (1 << 20), 0);
  const auto checkpoint = Checkpoint::open(model).value();
  EXPECT_THAT(checkpoint.verify_checksums("model.norm.weight").value(),
              ElementsAre(AllOf(HasSubstr("chunk 2 of 3"), HasSubstr("bytes 1048576 to 2097152"))));
}

TEST(Checkpoint, ChecksumsThatItCannotUseAreRefused) {
  const fs::path model = write_model(sample_weights(), Store::kCompact);
  const json good = json::parse(file_text(model / "checksums.json"));
  EXPECT_EQ(good["algorithm"], "XXH3-64");
  EXPECT_EQ(good["chunk_bytes"], 1048576);
  const auto fault = [&](const std::function<void(json&)>& change) {
    json changed = good;
    change(changed);
    put_text(model / "checksums.json", changed.dump());
    return open_fault(model);
  };
  EXPECT_THAT(fault([](json& c) { c["algorithm"] = "MD5"; }), HasSubstr("XXH3-64"));
  EXPECT_THAT(fault([](json& c) { c.erase("chunk_bytes"); }), HasSubstr("1048576"));
  EXPECT_THAT(fault([](json& c) { c["tensors"] = 1; }), HasSubstr("checksums.json"));
  EXPECT_THAT(fault([](json& c) { c["tensors"]["x"] = {1}; }), HasSubstr("\"x\""));
  EXPECT_THAT(fault([](json& c) { c["tensors"]["x"] = {{"a", "b"}}; }), HasSubstr("\"x\""));
  json without = good;
  without["tensors"].erase(kKey + ".values");
  without["tensors"][kQuery + ".values"].push_back("00");
  put_text(model / "checksums.json", without.dump());
  const auto checkpoint = Checkpoint::open(model).value();
  EXPECT_THAT(message_of(checkpoint.verify_checksums(kKey)), HasSubstr(kKey + ".values"));
  EXPECT_THAT(checkpoint.verify_checksums(kQuery).value(), ElementsAre(HasSubstr("lists 2")));
}

TEST(Checkpoint, ContentThatBreaksItsRulesIsRefusedWithRowAndColumn) {
  const auto fault = [](const std::string& part, uint64_t byte, int bit) {
    const fs::path model = write_model(sample_weights(), Store::kCompact);
    const fs::path file = model / "model.safetensors";
    flip_bit(file, data_position(file, part) + byte, bit);
    const std::string weight = part.substr(0, part.rfind('.'));
    const auto read = Checkpoint::open(model).value().weight(weight);
    const std::string message = message_of(read);
    EXPECT_THAT(message, AllOf(HasSubstr("model.safetensors"), HasSubstr(weight)));
    return message;
  };
  // Row 0 of the 2:4 matrix keeps columns 0 and 1 of every four.
  EXPECT_THAT(fault(kKey + ".bitmap", 0, 2), HasSubstr("row 0, column 0: "));
  EXPECT_THAT(fault(kKey + ".bitmap", 8 * 5 + 3, 7), HasSubstr("row 5, column 28: "));
  EXPECT_THAT(fault(kQuery + ".bitmap", 4, 7), HasSubstr("row 0"));  // past column 37
  EXPECT_THAT(fault(kQuery + ".bitmap", 0, 0), HasSubstr("row"));
  EXPECT_THAT(fault(kQuery + ".offsets", 8, 0), HasSubstr("rows 0..63"));
  EXPECT_THAT(fault(kUp + ".block_columns", 0, 4), HasSubstr("row"));
  EXPECT_THAT(fault(kUp + ".block_offsets", 8, 5), HasSubstr("row"));
}

TEST(Checkpoint, ATinyFileThatStandsForAHugeMatrixIsRefusedNotFatal) {
  CompactMatrix huge;
  huge.pattern = Pattern::block(4096, 4096);
  huge.rows = huge.columns = (int64_t{1} << 31) - 1;
  huge.values_dtype = DType::kF32;
  huge.block_offsets = Bytes::take(std::vector<int64_t>((size_t{1} << 19) + 1));
  const fs::path model = write_model({{kUp, huge}}, Store::kCompact);
  const auto checkpoint = Checkpoint::open(model).value();
  ASSERT_TRUE(checkpoint.weight(kUp).ok());
  EXPECT_THAT(message_of(checkpoint.dense(kUp), Code::kNotPossible),
              AllOf(HasSubstr(kUp), HasSubstr("memory")));
}

/// Bytes of files that lie in this process's memory.
size_t file_bytes_in_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("RssFile:")) return std::stoul(line.substr(8)) * 1024;
  return 0;
}

TEST(Checkpoint, AReleasedWeightLeavesTheMemoryAndComesBack) {
  const Shape shape{4096, 2048};
  std::vector<float> values(4096 * 2048);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 1009);
  const Tensor tensor{DType::kF32, shape, Bytes::take(std::move(values))};
  const fs::path model = write_model({{"large", tensor}, {"small", tensor}}, Store::kDense);
  const auto checkpoint = Checkpoint::open(model).value();
  const size_t before = file_bytes_in_memory();
  ASSERT_TRUE(equal(checkpoint.dense("large").value(), tensor));  // reads all of it
  const size_t read = file_bytes_in_memory();
  EXPECT_GE(read, before + tensor.bytes.size() * 9 / 10);
  checkpoint.release("large");
  EXPECT_LE(file_bytes_in_memory(), read - tensor.bytes.size() * 9 / 10);
  EXPECT_TRUE(equal(checkpoint.dense("large").value(), tensor));
  checkpoint.release("nonsense");  // nothing to do
}

TEST(Checkpoint, EarlyOptNamesAreReadUnderTodaysNames) {
  const Tensor embedding = random_matrix(5, 4, DType::kF16, {});
  json config = sample_config();
  config["model_type"] = "opt";
  const fs::path model =
      write_model({{"decoder.embed_tokens.weight", embedding}, {"lm_head.weight", embedding}},
                  Store::kDense, config);
  const auto checkpoint = Checkpoint::open(model).value();
  EXPECT_FALSE(checkpoint.contains("decoder.embed_tokens.weight"));
  EXPECT_TRUE(equal(checkpoint.dense("model.decoder.embed_tokens.weight").value(), embedding));
  EXPECT_TRUE(checkpoint.contains("lm_head.weight"));
  EXPECT_THAT(checkpoint.verify_checksums("model.decoder.embed_tokens.weight").value(), IsEmpty());
}

TEST(ChunkChecksums, AreXxh3OfEveryMebibyte) {
  EXPECT_THAT(chunk_checksums({}), IsEmpty());
  // XXH3-64 of "a" by another implementation (python-xxhash).
  EXPECT_THAT(chunk_checksums(Bytes::take<char>({'a'})), ElementsAre("e6c632b61e964e1f"));
  const auto three = chunk_checksums(Bytes::take(std::vector<char>((2 << 20) + 1)));
  ASSERT_THAT(three, SizeIs(3));
  EXPECT_EQ(three[0], three[1]);
  EXPECT_NE(three[1], three[2]);
  EXPECT_THAT(three, Each(SizeIs(16)));
}

}  // namespace
}  // namespace lacuna::io

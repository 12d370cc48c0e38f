// Weights in csr, coo and bsr: what lies in the files, how it comes back, and what is refused.
#include <limits>

#include "io/sample_model.h"
#include "lacuna/format/quantize.h"

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

const std::string kName = "model.layers.0.mlp.up_proj.weight";
const std::string kQuery = "model.layers.0.self_attn.q_proj.weight";  // unstructured
const std::string kKey = "model.layers.0.self_attn.k_proj.weight";    // 2:4
const std::string kUp = kName;                                        // blocks of 16x32
constexpr Store kStores[] = {Store::kCsr, Store::kCoo, Store::kBsr};

template <class T>
std::vector<T> list(const Checkpoint& checkpoint, const std::string& part) {
  const Tensor tensor = checkpoint.part(part).value();
  std::vector<T> values(tensor.bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  return values;
}

/// 0 1 0 2 / 0 0 0 0 / 3 0 0 4.
CompactMatrix small(const Pattern& pattern = Pattern::unstructured()) {
  return format::compress(
             {DType::kF32, {3, 4}, Bytes::take<float>({0, 1, -0.0f, 2, 0, 0, 0, 0, 3, 0, 0, 4})},
             pattern)
      .value();
}

json declared(const fs::path& model) {
  return json::parse(file_text(model / "config.json"))["lacuna"];
}

/// A model of one weight, in a store, with some of its parts changed.
fs::path damaged(Store store, const std::map<std::string, const Tensor*>& changes,
                 const Pattern& pattern = Pattern::unstructured()) {
  const fs::path model = write_model({{kName, small(pattern)}}, store);
  std::map<std::string, const Tensor*> parts;
  for (const auto& [suffix, tensor] : changes) parts[kName + suffix] = tensor;
  edit_tensors(model / "model.safetensors", parts);
  return model;
}

std::string weight_fault(const fs::path& model) {
  return message_of(Checkpoint::open(model).value().weight(kName));
}

TEST(Exchange, CsrLiesInTheFilesAsDocumented) {
  const fs::path model = write_model({{kName, small()}}, Store::kCsr);
  const auto checkpoint = Checkpoint::open(model).value();
  EXPECT_THAT(checkpoint.weights().at(kName).parts,
              ElementsAre(kName + ".row_offsets", kName + ".columns", kName + ".values"));
  EXPECT_EQ(checkpoint.weights().at(kName).store, Store::kCsr);
  EXPECT_EQ(checkpoint.part(kName + ".row_offsets")->dtype, DType::kI64);
  EXPECT_EQ(checkpoint.part(kName + ".columns")->dtype, DType::kI32);
  EXPECT_EQ(checkpoint.part(kName + ".values")->shape, (Shape{4}));
  EXPECT_THAT(list<int64_t>(checkpoint, kName + ".row_offsets"), ElementsAre(0, 2, 2, 4));
  EXPECT_THAT(list<int32_t>(checkpoint, kName + ".columns"), ElementsAre(1, 3, 0, 3));
  EXPECT_THAT(list<float>(checkpoint, kName + ".values"), ElementsAre(1, 2, 3, 4));
  EXPECT_EQ(declared(model)["format_version"], 3);
  EXPECT_EQ(
      declared(model)["weights"][kName],
      (json{{"pattern", "unstructured"}, {"shape", {3, 4}}, {"values", "F32"}, {"format", "csr"}}));
}

TEST(Exchange, CooLiesInTheFilesAsDocumented) {
  const auto checkpoint = Checkpoint::open(write_model({{kName, small()}}, Store::kCoo)).value();
  EXPECT_THAT(checkpoint.weights().at(kName).parts,
              ElementsAre(kName + ".rows", kName + ".columns", kName + ".values"));
  EXPECT_EQ(checkpoint.part(kName + ".rows")->dtype, DType::kI32);
  EXPECT_THAT(list<int32_t>(checkpoint, kName + ".rows"), ElementsAre(0, 0, 2, 2));
  EXPECT_THAT(list<int32_t>(checkpoint, kName + ".columns"), ElementsAre(1, 3, 0, 3));
  EXPECT_THAT(list<float>(checkpoint, kName + ".values"), ElementsAre(1, 2, 3, 4));
}

TEST(Exchange, BsrKeepsBlocksWithAnyNonZeroOfTheSizeThatIsChosen) {
  const fs::path out = lacuna::testing::scratch_folder("bsr") / "out";
  auto writer =
      CheckpointWriter::create(out, {.store = Store::kBsr, .blocks = Pattern::block(2, 2)}).value();
  ASSERT_TRUE(writer.add(kName, small()).ok());
  ASSERT_TRUE(writer.finish(sample_config()).ok());
  const auto checkpoint = Checkpoint::open(out).value();
  EXPECT_THAT(checkpoint.weights().at(kName).parts,
              ElementsAre(kName + ".block_columns", kName + ".block_offsets", kName + ".values"));
  EXPECT_THAT(list<int32_t>(checkpoint, kName + ".block_columns"), ElementsAre(0, 1, 0, 1));
  EXPECT_THAT(list<int64_t>(checkpoint, kName + ".block_offsets"), ElementsAre(0, 2, 4));
  EXPECT_THAT(list<float>(checkpoint, kName + ".values"),
              ElementsAre(0, 1, 0, 0, 0, 2, 0, 0, 3, 0, 0, 0, 0, 4, 0, 0));
  EXPECT_EQ(declared(out)["weights"][kName]["format"], "bsr:2x2");
  EXPECT_EQ(declared(out)["weights"][kName]["pattern"], "unstructured");
  EXPECT_TRUE(equal(std::get<CompactMatrix>(checkpoint.weight(kName).value()), small()));
}

TEST(Exchange, BsrTakesTheBlocksOfThePatternWhereNoneAreChosen) {
  const json weights = declared(write_model(sample_weights(), Store::kBsr))["weights"];
  EXPECT_EQ(weights[kUp]["format"], "bsr:16x32");
  EXPECT_EQ(weights[kKey]["format"], "bsr:32x32");
}

TEST(Exchange, EveryWeightArrivesAsTheCompactMatrixItWas) {
  const auto weights = sample_weights();
  for (const Store store : kStores) {
    const auto checkpoint = Checkpoint::open(write_model(weights, store)).value();
    size_t bytes = 0;
    for (const auto& [name, weight] : weights) {
      const WeightInfo& info = checkpoint.weights().at(name);
      bytes += info.bytes;
      EXPECT_THAT(checkpoint.verify_checksums(name).value(), IsEmpty()) << name;
      const Weight read = checkpoint.weight(name).value();
      if (const auto* matrix = std::get_if<CompactMatrix>(&weight)) {
        EXPECT_EQ(info.store, store);
        EXPECT_EQ(info.pattern, matrix->pattern);
        EXPECT_TRUE(equal(std::get<CompactMatrix>(read), *matrix)) << store_name(store) << name;
        EXPECT_TRUE(equal(checkpoint.dense(name).value(), format::expand(*matrix))) << name;
      } else {
        EXPECT_EQ(info.store, Store::kDense);
        EXPECT_TRUE(equal(std::get<Tensor>(read), std::get<Tensor>(weight))) << name;
      }
    }
    EXPECT_EQ(bytes, checkpoint.total_bytes());
  }
}

TEST(Exchange, AZeroAmongTheValuesStaysInTheMask) {
  const Tensor values{DType::kF32, {4}, Bytes::take<float>({1, 0, 3, 4})};
  for (const Store store : {Store::kCsr, Store::kCoo}) {
    const auto checkpoint = Checkpoint::open(damaged(store, {{".values", &values}})).value();
    const auto matrix = std::get<CompactMatrix>(checkpoint.weight(kName).value());
    EXPECT_EQ(format::count_kept(matrix), 4);
    EXPECT_EQ(format::count_zeros(matrix), 9);
    const fs::path again = write_model({{kName, matrix}}, store);
    EXPECT_THAT(list<float>(Checkpoint::open(again).value(), kName + ".values"),
                ElementsAre(1, 0, 3, 4));
  }
}

TEST(Exchange, DeclarationsAreReadFromVersion3OnAlone) {
  const auto fault = [](const std::function<void(json&)>& change) {
    const fs::path model = write_model({{kName, small()}}, Store::kCsr);
    edit_config(model, [&](json& config) { change(config["lacuna"]); });
    return open_fault(model);
  };
  for (const int version : {1, 2})
    EXPECT_THAT(fault([&](json& l) { l["format_version"] = version; }),
                AllOf(HasSubstr(kName), HasSubstr("lies there as csr"),
                      HasSubstr(fmt::format("format version {} doesn't know (need 3)", version))));
  const auto with_format = [&](const json& format) {
    return fault([&](json& l) { l["weights"][kName]["format"] = format; });
  };
  for (const json& format : {json("csc"), json("bsr"), json("bsr:0x2"), json("none"), json(1)})
    EXPECT_THAT(
        with_format(format),
        AllOf(HasSubstr(kName), HasSubstr("unknown exchange format (got " + format.dump())));
  EXPECT_THAT(with_format("coo"), HasSubstr(kName + ".rows"));
  EXPECT_THAT(with_format("bsr:2x2"), HasSubstr(kName + ".block_columns"));
  EXPECT_THAT(fault([](json& l) { l["weights"][kName].erase("format"); }),
              HasSubstr(kName + ".bitmap"));
  EXPECT_THAT(fault([](json& l) { l["weights"].erase(kName); }),
              AllOf(HasSubstr(kName + ".columns"), HasSubstr("doesn't declare")));
  EXPECT_THAT(fault([](json& l) { l["weights"][kName]["quantization"] = "int8"; }),
              HasSubstr("declared as int8 and csr"));
  EXPECT_THAT(fault([](json& l) { l["weights"][kName]["pattern"] = "dense"; }),
              HasSubstr("unknown pattern"));

  const fs::path dense = write_model({{kName, small()}}, Store::kDense);
  edit_config(dense, [](json& c) {
    c["lacuna"]["format_version"] = 3;
    c["lacuna"]["weights"][kName]["format"] = "csr";
  });
  EXPECT_THAT(open_fault(dense), HasSubstr("declared as csr, but lies there dense"));
}

TEST(Exchange, OtherFoldersKeepTheVersionTheyHad) {
  EXPECT_EQ(declared(write_model(sample_weights(), Store::kCompact))["format_version"], 1);
  EXPECT_EQ(declared(write_model(sample_weights(), Store::kDense))["format_version"], 1);
  const fs::path csr = write_model(sample_weights(), Store::kCsr);
  const json back = declared(rewrite_model(csr, Store::kDense));
  EXPECT_EQ(back["format_version"], 1);
  EXPECT_FALSE(back["weights"][kQuery].contains("format"));
}

TEST(Exchange, PartsThatAreMissingOrOfTheWrongTypeAreRefusedByName) {
  const Tensor longs{DType::kI64, {4}, Bytes::take(std::vector<int64_t>(4))},
      shorter{DType::kI64, {3}, Bytes::take(std::vector<int64_t>(3))},
      floats{DType::kF32, {4}, Bytes::take(std::vector<float>(4))};
  const struct {
    Store store;
    std::string part;
    const Tensor* change;
  } cases[] = {{Store::kCsr, ".row_offsets", nullptr},   {Store::kCsr, ".row_offsets", &shorter},
               {Store::kCsr, ".row_offsets", &floats},   {Store::kCsr, ".columns", &longs},
               {Store::kCsr, ".columns", nullptr},       {Store::kCsr, ".values", &longs},
               {Store::kCoo, ".rows", nullptr},          {Store::kCoo, ".rows", &longs},
               {Store::kCoo, ".columns", nullptr},       {Store::kCoo, ".values", nullptr},
               {Store::kBsr, ".block_columns", nullptr}, {Store::kBsr, ".values", &floats}};
  for (const auto& [store, part, change] : cases)
    EXPECT_THAT(open_fault(damaged(store, {{part, change}})), HasSubstr("\"" + kName + part + "\""))
        << store_name(store);
}

TEST(Exchange, ContentThatBreaksItsRulesIsRefusedWithRowAndColumn) {
  const auto ints = [](std::vector<int32_t> values) {
    const auto count = static_cast<int64_t>(values.size());
    return Tensor{DType::kI32, {count}, Bytes::take(std::move(values))};
  };
  const Tensor offsets{DType::kI64, {4}, Bytes::take<int64_t>({0, 2, 1, 4})};
  EXPECT_THAT(weight_fault(damaged(Store::kCsr, {{".row_offsets", &offsets}})),
              AllOf(HasSubstr("model.safetensors: weight \"" + kName + "\": row 2, column 0: "),
                    HasSubstr("row offset 2 is 1 (need 2..4, ending at 4). ")));
  const Tensor twice = ints({1, 1, 0, 3}), outside = ints({1, 3, 0, 4}), many = ints({1, 3, 0});
  for (const Store store : {Store::kCsr, Store::kCoo}) {
    EXPECT_THAT(weight_fault(damaged(store, {{".columns", &twice}})),
                HasSubstr("row 0, column 1: entry 1 follows row 0, column 1"));
    EXPECT_THAT(weight_fault(damaged(store, {{".columns", &outside}})),
                HasSubstr("row 2, column 4: entry 3 lies in row 2, column 4"));
    EXPECT_THAT(weight_fault(damaged(store, {{".columns", &many}})), HasSubstr("values holds 16"));
  }
  const Tensor unsorted = ints({0, 2, 0, 2});
  EXPECT_THAT(weight_fault(damaged(Store::kCoo, {{".rows", &unsorted}})),
              HasSubstr("row 0, column 0: entry 2 follows row 2, column 3"));
  // A sound matrix of another pattern than the declared one.
  const Tensor three = ints({0, 1, 3, 3}),
               all_in_first{DType::kI64, {4}, Bytes::take<int64_t>({0, 3, 3, 4})};
  EXPECT_THAT(
      weight_fault(damaged(Store::kCsr, {{".columns", &three}, {".row_offsets", &all_in_first}},
                           Pattern::keep_of(2, 4))),
      AllOf(HasSubstr(kName), HasSubstr("row 0, columns 0..3 hold 3 non-zeros")));
}

TEST(Exchange, EveryFlippedBitIsFoundByItsChecksumWithTensorAndChunk) {
  const struct {
    Store store;
    std::string part;
  } cases[] = {{Store::kCsr, ".row_offsets"},   {Store::kCsr, ".columns"},
               {Store::kCsr, ".values"},        {Store::kCoo, ".rows"},
               {Store::kCoo, ".columns"},       {Store::kBsr, ".block_columns"},
               {Store::kBsr, ".block_offsets"}, {Store::kBsr, ".values"}};
  for (const auto& [store, part] : cases) {
    const fs::path model = write_model(sample_weights(), store);
    const fs::path file = model / "model.safetensors";
    flip_bit(file, data_position(file, kQuery + part) + 1, 2);
    EXPECT_THAT(Checkpoint::open(model).value().verify_checksums(kQuery).value(),
                ElementsAre(AllOf(HasSubstr("\"" + kQuery + part + "\""), HasSubstr("chunk 1 of"))))
        << store_name(store) << part;
  }
  const fs::path model = write_model(
      {{kName, random_compact(700, 1000, DType::kF16, Pattern::unstructured())}}, Store::kCsr);
  const fs::path file = model / "model.safetensors";
  flip_bit(file, data_position(file, kName + ".columns") + (1 << 20), 0);
  EXPECT_THAT(Checkpoint::open(model).value().verify_checksums(kName).value(),
              ElementsAre(AllOf(HasSubstr(kName + ".columns"), HasSubstr("chunk 2 of 2"))));
}

TEST(Exchange, ATinyFileThatStandsForAHugeMatrixIsRefusedNotFatal) {
  const fs::path model = write_model({{kName, small()}}, Store::kCoo);
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  edit_config(model, [&](json& c) { c["lacuna"]["weights"][kName]["shape"] = {kMost, kMost}; });
  const auto checkpoint = Checkpoint::open(model).value();
  EXPECT_THAT(message_of(checkpoint.weight(kName), Code::kNotPossible),
              AllOf(HasSubstr(kName), HasSubstr("coo of shape"), HasSubstr("memory")));
}

TEST(Exchange, CodesHaveNoPlace) {
  const auto coded = format::quantize(random_compact(8, 8, DType::kF32, Pattern::unstructured()),
                                      {.code = format::Code::kInt8})
                         .value();
  for (const Store store : kStores) {
    auto writer =
        CheckpointWriter::create(lacuna::testing::scratch_folder("codes") / "out", {.store = store})
            .value();
    const Status added = writer.add(kName, coded);
    ASSERT_FALSE(added.ok());
    EXPECT_THAT(added.error().message,
                AllOf(HasSubstr(kName), HasSubstr("has no place for codes (got int8;")));
  }
}

}  // namespace
}  // namespace lacuna::io

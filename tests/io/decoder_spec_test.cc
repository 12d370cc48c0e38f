#include "lacuna/io/decoder_spec.h"

#include "io/sample_model.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

json llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 64},
          {"intermediate_size", 172},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 8},
          {"num_key_value_heads", 4},
          {"vocab_size", 512},
          {"torch_dtype", "float16"}};
}

json with(json config, const char* key, json value) {
  config[key] = std::move(value);
  return config;
}

json as(const char* architecture, json config) {
  return with(std::move(config), "architectures", json::array({architecture}));
}

Result<DecoderSpec> read(const json& config) { return decoder_spec(config, nullptr, "C"); }

TEST(DecoderSpec, LlamaWithTheKeysOfTransformers4) {
  json config = llama();
  config["rope_theta"] = 500000.0;
  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 32.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 4096}};
  const DecoderSpec spec = read(config).value();
  EXPECT_EQ(spec.rope.theta, 500000.0);
  EXPECT_EQ(spec.rope.type, "llama3");
  EXPECT_EQ(spec.rope.factor, 32.0);
  EXPECT_EQ(spec.rope.original_max_positions, 4096);
  EXPECT_EQ(spec.dtype, DType::kF16);
  EXPECT_EQ(spec.head_dim, 8);
  EXPECT_EQ(spec.max_positions, 2048);
  EXPECT_EQ(spec.norm_epsilon, 1e-6);
  EXPECT_EQ(spec.k.out, 32);
  EXPECT_EQ(spec.lm_head, "lm_head");
  EXPECT_FALSE(spec.sliding_window);
  EXPECT_EQ(spec.block_prefix(17), "model.layers.17.");
}

TEST(DecoderSpec, Transformers5FormMeansTheSame) {
  json config = llama();
  config.erase("torch_dtype");
  config["dtype"] = "bfloat16";
  config["rope_parameters"] = {{"rope_theta", 500000.0}, {"rope_type", "linear"}, {"factor", 2.0}};
  const DecoderSpec spec = read(config).value();
  EXPECT_EQ(spec.rope.theta, 500000.0);
  EXPECT_EQ(spec.rope.type, "linear");
  EXPECT_EQ(spec.rope.factor, 2.0);
  EXPECT_EQ(spec.dtype, DType::kBF16);
}

TEST(DecoderSpec, TheOldNameOfTheRopeTypeIsRead) {
  const auto spec =
      read(with(llama(), "rope_scaling", {{"type", "linear"}, {"factor", 4.0}})).value();
  EXPECT_EQ(spec.rope.type, "linear");
  EXPECT_EQ(spec.rope.factor, 4.0);
}

TEST(DecoderSpec, LinearsComeInTheOrderOfTheForwardPass) {
  std::vector<std::string> names;
  for (const LinearSpec& linear : read(llama()).value().block_linears())
    names.push_back(linear.name);
  EXPECT_THAT(names,
              ElementsAre("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                          "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"));
}

TEST(DecoderSpec, MistralSlidesUnlessItSaysNull) {
  const json mistral = as("MistralForCausalLM", llama());
  EXPECT_EQ(read(mistral).value().sliding_window, 4096);
  EXPECT_EQ(read(with(mistral, "sliding_window", 128)).value().sliding_window, 128);
  EXPECT_FALSE(read(with(mistral, "sliding_window", nullptr)).value().sliding_window);
}

TEST(DecoderSpec, QwenSlidesWholeOrNotAtAll) {
  json qwen = as("Qwen2ForCausalLM", llama());
  qwen["sliding_window"] = 32;
  EXPECT_TRUE(read(qwen).value().qkv_bias);
  EXPECT_FALSE(read(qwen).value().o_bias);
  EXPECT_FALSE(read(qwen).value().sliding_window);
  qwen["use_sliding_window"] = true;
  EXPECT_FALSE(read(qwen).value().sliding_window) << "layers from 28 on, and there are two";
  EXPECT_EQ(read(with(qwen, "max_window_layers", 0)).value().sliding_window, 32);
  EXPECT_THAT(message_of(read(with(qwen, "max_window_layers", 1))), HasSubstr("sliding window"));
  EXPECT_EQ(read(with(qwen, "layer_types", {"sliding_attention", "sliding_attention"}))
                .value()
                .sliding_window,
            32);
  EXPECT_THAT(message_of(read(with(qwen, "layer_types", {"sliding_attention", "full_attention"}))),
              HasSubstr("got 1 of 2"));
  EXPECT_THAT(message_of(read(with(qwen, "layer_types", {"linear_attention", "x"}))),
              HasSubstr("layer_types"));
}

TEST(DecoderSpec, Qwen3NormsItsHeads) {
  json qwen = as("Qwen3ForCausalLM", llama());
  EXPECT_EQ(read(qwen).value().head_dim, 128);
  qwen["head_dim"] = 16;
  const DecoderSpec spec = read(qwen).value();
  EXPECT_TRUE(spec.qk_norm);
  EXPECT_FALSE(spec.qkv_bias);
  EXPECT_EQ(spec.q.out, 128);
  EXPECT_EQ(spec.o.in, 128);
}

TEST(DecoderSpec, OptInItsTwoForms) {
  json opt = {{"architectures", {"OPTForCausalLM"}},
              {"hidden_size", 32},
              {"ffn_dim", 48},
              {"num_hidden_layers", 2},
              {"num_attention_heads", 4},
              {"vocab_size", 61},
              {"max_position_embeddings", 30}};
  DecoderSpec spec = read(opt).value();
  EXPECT_EQ(spec.norm, NormKind::kLayer);
  EXPECT_TRUE(spec.pre_norm && spec.final_norm && spec.tied_embedding && spec.mlp_bias);
  EXPECT_FALSE(spec.gated);
  EXPECT_EQ(spec.positions, Positions::kLearned);
  EXPECT_EQ(spec.position_offset, 2);
  EXPECT_EQ(spec.activation, Activation::kRelu);
  EXPECT_THAT(spec.project_in, IsEmpty());
  EXPECT_THAT(spec.lm_head, IsEmpty());
  opt["do_layer_norm_before"] = false;
  opt["word_embed_proj_dim"] = 20;
  spec = read(opt).value();
  EXPECT_FALSE(spec.pre_norm || spec.final_norm);
  EXPECT_EQ(spec.embedding_width, 20);
  EXPECT_EQ(spec.project_out, "model.decoder.project_out");
  opt["do_layer_norm_before"] = true;
  opt["_remove_final_layer_norm"] = true;
  EXPECT_FALSE(read(opt).value().final_norm);
}

TEST(DecoderSpec, TokensComeFromTheGenerationConfigFirst) {
  json config = with(llama(), "eos_token_id", 2);
  config["bos_token_id"] = 1;
  EXPECT_THAT(read(config).value().eos_tokens, ElementsAre(2));
  const json generation = {{"eos_token_id", {401, 409}}};
  const DecoderSpec spec = decoder_spec(config, &generation, "C").value();
  EXPECT_THAT(spec.eos_tokens, ElementsAre(401, 409));
  EXPECT_EQ(spec.bos_token, 1);
  EXPECT_FALSE(read(with(llama(), "bos_token_id", nullptr)).value().bos_token);
  EXPECT_FALSE(read(with(llama(), "bos_token_id", -1)).value().bos_token) << "-1 says: none";
  for (const int64_t id : {int64_t{-2}, int64_t{1} << 40}) {
    EXPECT_THAT(message_of(read(with(llama(), "bos_token_id", id))),
                AllOf(HasSubstr("bos_token_id"), HasSubstr("outside the vocabulary"),
                      HasSubstr(std::to_string(id))));
    EXPECT_THAT(message_of(read(with(llama(), "eos_token_id", json{2, id}))),
                AllOf(HasSubstr("eos_token_id"), HasSubstr(std::to_string(id))));
  }
}

TEST(DecoderSpec, WhatItDoesNotKnowIsNamed) {
  const struct {
    json config;
    const char *key, *value;
  } cases[] = {
      {as("MambaForCausalLM", llama()), "LlamaForCausalLM", "MambaForCausalLM"},
      {with(llama(), "hidden_act", "swishish"), "hidden_act", "swishish"},
      {with(llama(), "rope_scaling", {{"rope_type", "yarn"}, {"factor", 2.0}}), "rope_type",
       "yarn"},
      {with(llama(), "rope_scaling", {{"rope_type", "llama3"}}), "factor", "llama3"},
      {with(llama(), "rope_scaling", 5), "rope_scaling", "5"},
      {with(llama(), "partial_rotary_factor", 0.5), "partial_rotary_factor", "0.5"},
      {with(llama(), "torch_dtype", "int4"), "torch_dtype", "int4"},
      {with(llama(), "hidden_size", -64), "hidden_size", "-64"},
      {with(llama(), "hidden_size", "64"), "hidden_size", "64"},
      {with(llama(), "hidden_size", uint64_t{1} << 63), "hidden_size", "9223372036854775808"},
      {with(llama(), "vocab_size", 0), "vocab_size", "0"},
      {with(llama(), "vocab_size", nullptr), "vocab_size", "missing"},
      {with(llama(), "num_attention_heads", 7), "num_attention_heads", "64"},
      {with(llama(), "num_key_value_heads", 3), "num_key_value_heads", "3"},
      {with(llama(), "head_dim", 7), "head_dim", "7"},
      {with(llama(), "tie_word_embeddings", "yes"), "tie_word_embeddings", "yes"},
      {with(llama(), "rms_norm_eps", -1), "epsilon", "negative"},
      {with(llama(), "num_hidden_layers", 1 << 30), "layers", "1073741824"},
      {with(llama(), "intermediate_size", 1 << 30), "width", "1073741824"},
  };
  for (const auto& bad : cases)
    EXPECT_THAT(message_of(read(bad.config)),
                AllOf(HasSubstr("C: "), HasSubstr(bad.key), HasSubstr(bad.value)))
        << bad.config;
  EXPECT_THAT(message_of(read(json::array())), HasSubstr("not a JSON object"));
  EXPECT_THAT(message_of(read(json::object())), HasSubstr("unknown architecture"));
}

TEST(DecoderSpec, CountsTheParametersOfPublishedModels) {
  LACUNA_NEEDS_DATA(file, "configs/model_shapes.json");
  const json shapes = json::parse(file_text(file));
  int counted = 0;
  for (const json& shape : shapes) {
    json config = {{"model_type", shape["arch"]},
                   {"hidden_size", shape["hidden_size"]},
                   {"intermediate_size", shape["intermediate_size"]},
                   {"num_hidden_layers", shape["num_layers"]},
                   {"num_attention_heads", shape["num_heads"]},
                   {"num_key_value_heads", shape["num_kv_heads"]},
                   {"head_dim", shape["head_dim"]},
                   {"vocab_size", shape["vocab_size"]},
                   {"tie_word_embeddings", shape["tie_embeddings"]}};
    const auto spec = read(config);
    ASSERT_TRUE(spec.ok()) << shape["name"] << ": " << spec.error().message;
    EXPECT_EQ(spec->parameters(), shape["parameters"].get<int64_t>()) << shape["name"];
    ++counted;
  }
  EXPECT_GE(counted, 20);
}

/// A spec names exactly the tensors of the files, with their shapes.
void expect_tensors(const fs::path& folder) {
  const auto checkpoint = Checkpoint::open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
  const auto spec = decoder_spec(checkpoint->config(), nullptr, folder.string());
  ASSERT_TRUE(spec.ok()) << spec.error().message;
  std::set<std::string> named;
  for (const auto& [name, shape] : spec->tensors()) {
    EXPECT_TRUE(named.insert(name).second) << name;
    ASSERT_TRUE(checkpoint->contains(name)) << folder << ": " << name;
    EXPECT_EQ(checkpoint->weights().at(name).shape, shape) << folder << ": " << name;
  }
  for (const auto& [name, info] : checkpoint->weights())
    EXPECT_TRUE(named.contains(name)) << folder << ": " << name;
}

TEST(DecoderSpec, NamesTheTensorsOfEveryTinyModel) {
  int models = 0;
  for (const auto& entry :
       fs::directory_iterator(lacuna::testing::source_folder() / "tests/golden/tiny_models")) {
    if (!entry.is_directory()) continue;
    expect_tensors(entry.path());
    ++models;
  }
  EXPECT_GE(models, 10);
}

TEST(DecoderSpec, NamesTheTensorsOfRealModels) {
  for (const char* name : {"models/lab-16m", "models/lab-relu2-16m", "models/demo-5m"}) {
    LACUNA_NEEDS_DATA(folder, name);
    expect_tensors(folder);
  }
}

TEST(DecoderSpec, KnowsTheRealConfigs) {
  LACUNA_NEEDS_DATA(relu2, "models/lab-relu2-16m/config.json");
  const DecoderSpec spec = read(json::parse(file_text(relu2))).value();
  EXPECT_EQ(spec.architecture, "ArceeForCausalLM");
  EXPECT_EQ(spec.activation, Activation::kRelu2);
  EXPECT_FALSE(spec.gated);
  EXPECT_EQ(spec.block_linears().size(), 6u);
  LACUNA_NEEDS_DATA(demo, "models/demo-5m/config.json");
  EXPECT_EQ(read(json::parse(file_text(demo))).value().parameters(), 5180672);
}

}  // namespace
}  // namespace lacuna::io

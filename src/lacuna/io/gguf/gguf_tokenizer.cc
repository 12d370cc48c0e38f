#include "lacuna/io/gguf/gguf_tokenizer.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "lacuna/io/gguf/gguf_keys.h"
#include "lacuna/io/tokenizer/huggingface.h"
#include "lacuna/io/tokenizer/utf8.h"
#include "lacuna/io/tokenizer/vocabulary.h"

namespace lacuna::io {
namespace {
using nlohmann::json;

constexpr const char* kTokens = "tokenizer.ggml.tokens";
constexpr const char* kTypes = "tokenizer.ggml.token_type";
constexpr const char* kScores = "tokenizer.ggml.scores";
constexpr const char* kMerges = "tokenizer.ggml.merges";
constexpr const char* kSpace = "\xE2\x96\x81";  // U+2581, which stands for a space in pieces
constexpr int64_t kNoToken = 0xFFFFFFFF;        // how some writers say that there is none
/// Looking for the merges of a piece takes the square of its length; real ones stay below 100.
constexpr size_t kLongestPiece = 4096;

/// Values of tokenizer.ggml.token_type.
enum TokenType : int64_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

/// How text is split before merging, as tokenizer.ggml.pre says; SentencePiece doesn't split.
enum class Splitting { kNone, kGpt2, kDigitsThenGpt2, kLlama3, kQwen2 };

constexpr std::pair<std::string_view, Splitting> kPre[] = {
    {"default", Splitting::kGpt2},          {"gpt-2", Splitting::kGpt2},
    {"smollm", Splitting::kDigitsThenGpt2}, {"starcoder", Splitting::kDigitsThenGpt2},
    {"refact", Splitting::kDigitsThenGpt2}, {"llama-bpe", Splitting::kLlama3},
    {"llama-v3", Splitting::kLlama3},       {"llama3", Splitting::kLlama3},
    {"qwen2", Splitting::kQwen2},           {"deepseek-r1-qwen", Splitting::kQwen2},
};

/// All that the metadata say of the tokens, checked.
struct TokenList {
  const std::vector<std::string>* tokens = nullptr;
  std::vector<int64_t> types;
  std::optional<int64_t> bos, eos, unknown, pad;
  std::vector<int64_t> ends;  // eos and its likes
  std::set<int64_t> named;    // all of these: special whatever their type says
  bool add_bos = false, add_eos = false;

  const std::string& text(int64_t id) const { return (*tokens)[static_cast<size_t>(id)]; }
  int64_t size() const { return static_cast<int64_t>(tokens->size()); }
  int64_t type(int64_t id) const { return types[static_cast<size_t>(id)]; }
  bool special(int64_t id) const {
    return type(id) == kControl || type(id) == kUnknown || named.contains(id);
  }
  /// Writers fill gaps between ids with tokens of their own making.
  bool filler(int64_t id) const { return type(id) == kUnused && !named.contains(id); }
};

/// The id under a key, checked and noted as named.
std::optional<int64_t> named_token(GgufKeys& keys, const std::string& name, TokenList& list) {
  const std::string key = "tokenizer.ggml." + name + "_token_id";
  const auto id = keys.token_id(key);
  if (!id || *id == kNoToken) return std::nullopt;
  if (*id >= list.size()) {
    keys.fail(
        fmt::format("key \"{}\" must be the id of a token (got {} of {}).", key, *id, list.size()));
    return std::nullopt;
  }
  list.named.insert(*id);
  return id;
}

void check_tokens(GgufKeys& keys, const TokenList& list) {
  std::unordered_map<std::string_view, int64_t> seen;
  for (int64_t id = 0; id < list.size(); ++id) {
    if (!tokenizer::is_valid_utf8(list.text(id)))
      return keys.fail(fmt::format("key \"{}\": token {} is not UTF-8.", kTokens, id));
    if (list.filler(id)) continue;
    const auto [first, fresh] = seen.emplace(list.text(id), id);
    if (!fresh)
      return keys.fail(fmt::format("key \"{}\": token {} stands there twice (\"{}\", also {}).",
                                   kTokens, id, list.text(id), first->second));
  }
}

TokenList read_tokens(GgufKeys& keys, bool adds_bos) {
  TokenList list;
  list.tokens = &keys.texts(kTokens);
  if (list.tokens->empty() || list.size() > tokenizer::kMaxTokenId + 1) {
    keys.fail(fmt::format("key \"{}\" must list tokens (got {}; need 1..{}).", kTokens, list.size(),
                          tokenizer::kMaxTokenId + 1));
    return list;
  }
  list.types = keys.integers(kTypes);
  if (list.types.empty()) list.types.assign(list.tokens->size(), kNormal);
  if (list.types.size() != list.tokens->size()) {
    keys.fail(fmt::format("key \"{}\" must have a type for every token (got {}; need {}).", kTypes,
                          list.types.size(), list.size()));
    list.types.assign(list.tokens->size(), kNormal);
  }
  list.bos = named_token(keys, "bos", list);
  list.eos = named_token(keys, "eos", list);
  list.unknown = named_token(keys, "unknown", list);
  list.pad = named_token(keys, "padding", list);
  for (const auto& id : {list.eos, named_token(keys, "eot", list), named_token(keys, "eom", list)})
    if (id && std::find(list.ends.begin(), list.ends.end(), *id) == list.ends.end())
      list.ends.push_back(*id);
  list.add_bos = keys.flag_or("tokenizer.ggml.add_bos_token", adds_bos && list.bos);
  list.add_eos = keys.flag_or("tokenizer.ggml.add_eos_token", false);
  if (list.add_bos && !list.bos)
    keys.fail("key \"tokenizer.ggml.add_bos_token\" needs \"tokenizer.ggml.bos_token_id\".");
  if (list.add_eos && !list.eos)
    keys.fail("key \"tokenizer.ggml.add_eos_token\" needs \"tokenizer.ggml.eos_token_id\".");
  check_tokens(keys, list);
  return list;
}

json component(const char* type) { return {{"type", type}}; }

json sequence(const char* list_key, json list) {
  return {{"type", "Sequence"}, {list_key, std::move(list)}};
}

json replace(const char* what, const char* with) {
  return {{"type", "Replace"}, {"pattern", {{"String", what}}}, {"content", with}};
}

json byte_level(bool prefix_space, bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", prefix_space},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

json split(const char* regex) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", regex}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}

json pre_tokenizer(Splitting splitting) {
  switch (splitting) {
    case Splitting::kNone:
      break;
    case Splitting::kGpt2:
      return byte_level(false, true);
    case Splitting::kDigitsThenGpt2:
      return sequence("pretokenizers",
                      {{{"type", "Digits"}, {"individual_digits", true}}, byte_level(false, true)});
    case Splitting::kLlama3:
      return sequence("pretokenizers",
                      {split(tokenizer::kLlama3Pattern), byte_level(false, false)});
    case Splitting::kQwen2:
      return sequence("pretokenizers", {split(tokenizer::kQwen2Pattern), byte_level(false, false)});
  }
  return nullptr;
}

/// A model section with what both kinds share; vocabulary and merges are filled in by the caller.
json bpe_model() {
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"ignore_merges", false}};
}

/// Tokens stay in the model's vocabulary even where they are added tokens, too: Hugging Face
/// numbers added tokens that are not in it anew.
json vocabulary_of(const TokenList& list) {
  json vocabulary = json::object();
  for (int64_t id = 0; id < list.size(); ++id)
    if (!list.filler(id)) vocabulary[list.text(id)] = id;
  return vocabulary;
}

json added_tokens(const TokenList& list) {
  json added = json::array();
  for (int64_t id = 0; id < list.size(); ++id) {
    const bool special = list.special(id);
    if (!special && list.type(id) != kUserDefined) continue;
    added.push_back({{"id", id},
                     {"content", list.text(id)},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", special}});
  }
  return added;
}

json post_processor(const TokenList& list) {
  if (!list.add_bos && !list.add_eos) return nullptr;
  json specials = json::object();
  const auto around = [&](const char* text, int type_id) {
    json items = json::array();
    const auto add = [&](std::optional<int64_t> id) {
      const std::string& token = list.text(*id);
      items.push_back({{"SpecialToken", {{"id", token}, {"type_id", type_id}}}});
      specials[token] = {
          {"id", token}, {"ids", json::array({*id})}, {"tokens", json::array({token})}};
    };
    if (list.add_bos) add(list.bos);
    items.push_back({{"Sequence", {{"id", text}, {"type_id", type_id}}}});
    if (list.add_eos) add(list.eos);
    return items;
  };
  const json single = around("A", 0);
  json pair = single;
  for (const json& item : around("B", 1)) pair.push_back(item);
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", std::move(pair)},
          {"special_tokens", std::move(specials)}};
}

/// tokenizer.ggml.model "gpt2".
json byte_level_tokenizer(GgufKeys& keys, const TokenList& list, Splitting splitting) {
  json model = bpe_model();
  // Llama-3's vocabulary holds tokens that no merge leads to.
  model["ignore_merges"] = splitting == Splitting::kLlama3;
  model["vocab"] = vocabulary_of(list);
  const auto& merges = keys.texts(kMerges);
  if (merges.empty()) keys.fail(fmt::format("key \"{}\" is missing or empty.", kMerges));
  for (size_t i = 0; i < merges.size(); ++i)
    if (!tokenizer::is_valid_utf8(merges[i]))
      keys.fail(fmt::format("key \"{}\": merge {} is not UTF-8.", kMerges, i));
  model["merges"] = merges;
  return {{"normalizer", splitting == Splitting::kQwen2 ? component("NFC") : json()},
          {"pre_tokenizer", pre_tokenizer(splitting)},
          {"decoder", byte_level(true, true)},
          {"model", std::move(model)}};
}

/// SentencePiece joins the two neighbours whose joint piece scores best; a merge list says the same
/// when it holds every way to cut a piece into two, best score first. The order among equal scores
/// is that of Hugging Face's own conversion.
json merges_from_scores(GgufKeys& keys, const TokenList& list, const std::vector<double>& scores) {
  struct Merge {
    double score;
    int64_t whole, left, right;
  };
  std::unordered_map<std::string_view, int64_t> pieces;
  for (int64_t id = 0; id < list.size(); ++id)
    if (list.type(id) == kNormal && !list.special(id)) pieces.emplace(list.text(id), id);
  std::vector<Merge> merges;
  for (int64_t id = 0; id < list.size(); ++id) {
    const std::string_view whole = list.text(id);
    if (!pieces.contains(whole)) continue;
    if (whole.size() > kLongestPiece) {
      keys.fail(fmt::format("key \"{}\": token {} is too long (got {} bytes; need at most {}).",
                            kTokens, id, whole.size(), kLongestPiece));
      break;
    }
    for (size_t cut = 1; cut < whole.size(); ++cut) {
      const auto left = pieces.find(whole.substr(0, cut));
      if (left == pieces.end()) continue;
      const auto right = pieces.find(whole.substr(cut));
      if (right == pieces.end()) continue;
      merges.push_back({scores[static_cast<size_t>(id)], id, left->second, right->second});
    }
  }
  std::sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    if (a.score != b.score) return a.score > b.score;
    return std::tie(a.whole, a.left, a.right) < std::tie(b.whole, b.left, b.right);
  });
  json texts = json::array();
  for (const Merge& merge : merges)
    texts.push_back(fmt::format("{} {}", list.text(merge.left), list.text(merge.right)));
  return texts;
}

/// tokenizer.ggml.model "llama".
json sentencepiece_tokenizer(GgufKeys& keys, const TokenList& list) {
  const std::vector<double>& scores = keys.numbers(kScores);
  if (scores.size() != list.tokens->size()) {
    keys.fail(fmt::format("key \"{}\" must have a score for every token (got {}; need {}).",
                          kScores, scores.size(), list.size()));
    return {};
  }
  if (std::any_of(scores.begin(), scores.end(), [](double score) { return std::isnan(score); })) {
    keys.fail(fmt::format("key \"{}\" holds a score that is no number.", kScores));
    return {};
  }
  std::optional<int64_t> unknown = list.unknown;
  bool has_bytes = false;
  for (int64_t id = 0; id < list.size(); ++id) {
    if (!unknown && list.type(id) == kUnknown) unknown = id;
    has_bytes = has_bytes || list.type(id) == kByte;
  }
  const bool prefix = keys.flag_or("tokenizer.ggml.add_space_prefix", true);
  if (keys.flag_or("tokenizer.ggml.remove_extra_whitespaces", false))
    keys.fail("key \"tokenizer.ggml.remove_extra_whitespaces\" must be false for a Llama model.");
  json model = bpe_model();
  if (unknown) model["unk_token"] = list.text(*unknown);
  model["fuse_unk"] = true;
  model["byte_fallback"] = has_bytes;
  model["vocab"] = vocabulary_of(list);
  model["merges"] = merges_from_scores(keys, list, scores);
  json normalizers = json::array();
  if (prefix) normalizers.push_back({{"type", "Prepend"}, {"prepend", kSpace}});
  normalizers.push_back(replace(" ", kSpace));
  json decoders = {replace(kSpace, " "), component("ByteFallback"), component("Fuse")};
  if (prefix) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  return {{"normalizer", sequence("normalizers", std::move(normalizers))},
          {"pre_tokenizer", nullptr},
          {"decoder", sequence("decoders", std::move(decoders))},
          {"model", std::move(model)}};
}

Splitting splitting_of(GgufKeys& keys) {
  const std::string model = keys.text("tokenizer.ggml.model");
  if (model == "llama") return Splitting::kNone;
  if (model != "gpt2") {
    keys.fail(fmt::format(
        "key \"tokenizer.ggml.model\" is unknown (got \"{}\"; need gpt2 or llama).", model));
    return Splitting::kNone;
  }
  const std::string pre = keys.text("tokenizer.ggml.pre");
  std::string known;
  for (const auto& [name, splitting] : kPre) {
    if (name == pre) return splitting;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", name);
  }
  keys.fail(fmt::format("key \"tokenizer.ggml.pre\" is unknown (got \"{}\"; need one of {}).", pre,
                        known));
  return Splitting::kNone;
}

json tokenizer_config(GgufKeys& keys, const TokenList& list) {
  json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"add_bos_token", list.add_bos},
                 {"add_eos_token", list.add_eos},
                 {"clean_up_tokenization_spaces", false}};
  const auto name = [&](const char* key, std::optional<int64_t> id) {
    if (id) config[key] = list.text(*id);
  };
  name("bos_token", list.bos);
  name("eos_token", list.eos);
  name("unk_token", list.unknown);
  name("pad_token", list.pad);
  const std::string context = keys.text_or("general.architecture", "") + ".context_length";
  if (keys.has(context)) config["model_max_length"] = keys.size(context);
  const std::string chat = keys.text_or("tokenizer.chat_template", "");
  if (!chat.empty()) config["chat_template"] = chat;
  return config;
}

}  // namespace

Result<GgufTokenizer> gguf_tokenizer(const GgufFile& file) {
  GgufKeys keys(file);
  const Splitting splitting = splitting_of(keys);
  if (keys.error()) return *keys.error();
  const bool sentencepiece = splitting == Splitting::kNone;
  const TokenList list = read_tokens(keys, sentencepiece || splitting == Splitting::kLlama3);
  if (keys.error()) return *keys.error();
  json tokenizer = sentencepiece ? sentencepiece_tokenizer(keys, list)
                                 : byte_level_tokenizer(keys, list, splitting);
  const json config = tokenizer_config(keys, list);
  if (keys.error()) return *keys.error();
  tokenizer["version"] = "1.0";
  tokenizer["truncation"] = nullptr;
  tokenizer["padding"] = nullptr;
  tokenizer["added_tokens"] = added_tokens(list);
  tokenizer["post_processor"] = post_processor(list);

  GgufTokenizer made;
  made.tokenizer_json = tokenizer.dump() + "\n";
  made.tokenizer_config_json = config.dump(2) + "\n";
  made.tokens = list.size();
  made.bos = list.bos;
  made.pad = list.pad;
  made.eos = list.ends;
  // Nobody gets a folder that can't be opened: merges of tokens that are not there, and the like.
  const std::string where = file.path() + ": its tokenizer";
  LACUNA_TRY(const auto read_config,
             tokenizer::TokenizerConfig::parse(made.tokenizer_config_json, where));
  LACUNA_CHECK(tokenizer::parse_huggingface(made.tokenizer_json, read_config, where));
  return made;
}

}  // namespace lacuna::io

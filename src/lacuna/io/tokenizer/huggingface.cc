#include "lacuna/io/tokenizer/huggingface.h"

#include <algorithm>

#include "lacuna/io/tokenizer/bpe.h"
#include "lacuna/io/tokenizer/json_fields.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

constexpr int kMaxDepth = 16;  // of Sequence in Sequence

/// One section of the file ("normalizer", ...): null, one component, or a Sequence of them under
/// `list_key`. Calls `add(component, type)` for each component in order.
template <class Add>
Status for_each_component(const Json& root, const char* section, const char* list_key,
                          const std::string& file, const Add& add) {
  const auto visit = [&](const auto& self, const Json& component, int depth) -> Status {
    if (!component.is_object())
      return bad_input("{}: {} must be an object or null (got {}).", file, section,
                       component.type_name());
    LACUNA_TRY(const std::string type, field_or<std::string>(component, "type", "", file));
    if (type != "Sequence") return add(component, type);
    const auto list = component.find(list_key);
    if (list == component.end() || !list->is_array() || depth == kMaxDepth)
      return bad_input("{}: {} of type Sequence must have a list \"{}\" (at most {} deep).", file,
                       section, list_key, kMaxDepth);
    for (const Json& inner : *list) LACUNA_CHECK(self(self, inner, depth + 1));
    return {};
  };
  const auto found = root.find(section);
  if (found == root.end() || found->is_null()) return {};
  return visit(visit, *found, 0);
}

Error unknown_component(const std::string& file, const char* section, const std::string& type) {
  return bad_input(
      "{}: {} must be of a known type (got \"{}\"). Lacuna doesn't read this tokenizer.", file,
      section, type);
}

/// {"String": "x"} or {"Regex": "x"}
Result<Pattern> pattern_of(const Json& component, const std::string& file) {
  const auto found = component.find("pattern");
  if (found != component.end() && found->is_object() && found->size() == 1) {
    const auto [key, value] = std::pair(found->begin().key(), *found->begin());
    if (key == "String" && value.is_string()) return Pattern::literal(value.get<std::string>());
    if (key == "Regex" && value.is_string()) return Pattern::regex(value.get<std::string>(), file);
  }
  return bad_input("{}: a pattern must be {{\"String\": ...}} or {{\"Regex\": ...}}.", file);
}

Result<std::string> string_field(const Json& component, const char* key, const std::string& file) {
  if (!component.contains(key)) return bad_input("{}: a component must have \"{}\".", file, key);
  return field_or<std::string>(component, key, "", file);
}

Result<std::vector<Normalizer>> read_normalizer(const Json& root, const std::string& file) {
  std::vector<Normalizer> steps;
  LACUNA_CHECK(for_each_component(
      root, "normalizer", "normalizers", file,
      [&](const Json& component, const std::string& type) -> Status {
        if (type == "NFC") {
          steps.emplace_back(UnicodeForm::kNfc);
        } else if (type == "NFD") {
          steps.emplace_back(UnicodeForm::kNfd);
        } else if (type == "NFKC") {
          steps.emplace_back(UnicodeForm::kNfkc);
        } else if (type == "NFKD") {
          steps.emplace_back(UnicodeForm::kNfkd);
        } else if (type == "Prepend") {
          LACUNA_TRY(std::string text, string_field(component, "prepend", file));
          steps.emplace_back(Prepend{std::move(text)});
        } else if (type == "Replace") {
          LACUNA_TRY(Pattern pattern, pattern_of(component, file));
          LACUNA_TRY(std::string content, string_field(component, "content", file));
          steps.emplace_back(Replace{std::move(pattern), std::move(content)});
        } else {
          return unknown_component(file, "normalizer", type);
        }
        return {};
      }));
  return steps;
}

Result<SplitBehavior> behavior_of(const Json& component, const std::string& file) {
  LACUNA_TRY(const std::string name, string_field(component, "behavior", file));
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  return bad_input("{}: behavior of Split must be known (got \"{}\").", file, name);
}

Result<std::vector<PreTokenizer>> read_pre_tokenizer(const Json& root, const std::string& file) {
  std::vector<PreTokenizer> steps;
  const auto add_split = [&](Pattern pattern, SplitBehavior behavior, bool invert) {
    steps.emplace_back(Split{std::move(pattern), behavior, invert});
  };
  LACUNA_CHECK(for_each_component(
      root, "pre_tokenizer", "pretokenizers", file,
      [&](const Json& component, const std::string& type) -> Status {
        if (type == "Split") {
          LACUNA_TRY(Pattern pattern, pattern_of(component, file));
          LACUNA_TRY(const SplitBehavior behavior, behavior_of(component, file));
          LACUNA_TRY(const bool invert, field_or<bool>(component, "invert", false, file));
          add_split(std::move(pattern), behavior, invert);
        } else if (type == "Digits") {
          LACUNA_TRY(const bool individual,
                     field_or<bool>(component, "individual_digits", false, file));
          LACUNA_TRY(Pattern pattern, Pattern::regex("\\p{N}", file));
          add_split(std::move(pattern),
                    individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous, false);
        } else if (type == "ByteLevel") {
          LACUNA_TRY(const bool prefix_space,
                     field_or<bool>(component, "add_prefix_space", true, file));
          LACUNA_TRY(const bool use_regex, field_or<bool>(component, "use_regex", true, file));
          if (prefix_space) steps.emplace_back(PrefixSpace{});
          if (use_regex) {
            LACUNA_TRY(Pattern pattern, Pattern::regex(kGpt2Pattern, file));
            add_split(std::move(pattern), SplitBehavior::kIsolated, false);
          }
          steps.emplace_back(ByteLevelMap{});
        } else {
          return unknown_component(file, "pre_tokenizer", type);
        }
        return {};
      }));
  return steps;
}

Result<std::vector<TokenDecoder>> read_decoder(const Json& root, const std::string& file) {
  std::vector<TokenDecoder> steps;
  bool joined = false;  // the tokens are one text
  LACUNA_CHECK(for_each_component(
      root, "decoder", "decoders", file,
      [&](const Json& component, const std::string& type) -> Status {
        // What a joined text turns into must not hang on tokens that are still to come.
        if (joined && type != "Fuse" && type != "Strip")
          return bad_input("{}: decoder {} must stand before Fuse and ByteLevel.", file, type);
        joined = joined || type == "Fuse" || type == "ByteLevel";
        if (type == "ByteLevel") {
          steps.emplace_back(ByteLevelDecoder{});
        } else if (type == "ByteFallback") {
          steps.emplace_back(ByteFallbackDecoder{});
        } else if (type == "Fuse") {
          steps.emplace_back(FuseDecoder{});
        } else if (type == "Replace") {
          const auto pattern = component.find("pattern");
          if (pattern == component.end() || !pattern->is_object() || !pattern->contains("String"))
            return bad_input("{}: decoder Replace must have a pattern {{\"String\": ...}}.", file);
          LACUNA_TRY(std::string what, string_field(*pattern, "String", file));
          LACUNA_TRY(std::string content, string_field(component, "content", file));
          steps.emplace_back(ReplaceDecoder{std::move(what), std::move(content)});
        } else if (type == "Strip") {
          LACUNA_TRY(std::string character, string_field(component, "content", file));
          LACUNA_TRY(const int64_t start, field_or<int64_t>(component, "start", 0, file));
          LACUNA_TRY(const int64_t stop, field_or<int64_t>(component, "stop", 0, file));
          if (start < 0 || stop != 0 || character.empty() ||
              utf8_length(character[0]) != character.size())
            return bad_input(
                "{}: decoder Strip must take one character off the start only (got \"{}\", start "
                "{}, stop {}).",
                file, character, start, stop);
          steps.emplace_back(StripDecoder{std::move(character), static_cast<size_t>(start)});
        } else {
          return unknown_component(file, "decoder", type);
        }
        return {};
      }));
  return steps;
}

/// TemplateProcessing's template for one text: special tokens around the sequence "A".
Status read_template(const Json& component, const std::string& file, PipelineParts& parts) {
  const auto items = component.find("single"), specials = component.find("special_tokens");
  if (items == component.end() || !items->is_array())
    return bad_input("{}: post_processor TemplateProcessing must have a list \"single\".", file);
  bool sequence_seen = false;
  for (const Json& item : *items) {
    if (item.is_object() && item.contains("Sequence") && !sequence_seen) {
      sequence_seen = true;
      continue;
    }
    std::string name;
    if (item.is_object() && item.contains("SpecialToken") && item["SpecialToken"].is_object()) {
      LACUNA_TRY(name, field_or<std::string>(item["SpecialToken"], "id", "", file));
    }
    if (specials == component.end() || !specials->is_object() || !specials->contains(name) ||
        !(*specials)[name].is_object() || !(*specials)[name].contains("ids") ||
        !(*specials)[name]["ids"].is_array())
      return bad_input(
          "{}: post_processor TemplateProcessing must put tokens of its \"special_tokens\" around "
          "one sequence "
          "(got \"{}\").",
          file, name);
    for (const Json& id : (*specials)[name]["ids"]) {
      const int64_t number = id.is_number_integer() ? id.get<int64_t>() : -1;
      const auto token = static_cast<int32_t>(std::clamp<int64_t>(number, -1, kMaxTokenId + 1));
      if (!parts.added.find(token) && !parts.model->vocabulary().token(token))
        return bad_input("{}: ids of \"{}\" in the post_processor must be tokens' (got {}).", file,
                         name, shown(id));
      (sequence_seen ? parts.suffix : parts.prefix).push_back(token);
    }
  }
  if (!sequence_seen)
    return bad_input("{}: post_processor TemplateProcessing must contain the sequence itself.",
                     file);
  return {};
}

Status read_post_processor(const Json& root, const std::string& file, PipelineParts& parts) {
  return for_each_component(root, "post_processor", "processors", file,
                            [&](const Json& component, const std::string& type) -> Status {
                              if (type == "ByteLevel") return {};  // only touches offsets
                              if (type == "TemplateProcessing")
                                return read_template(component, file, parts);
                              return unknown_component(file, "post_processor", type);
                            });
}

/// Merges stand as ["a", "b"] or, in older files, as "a b".
Result<std::vector<MergeRule>> read_merges(const Json& list, const std::string& file) {
  std::vector<MergeRule> merges;
  merges.reserve(list.size());
  for (const Json& merge : list) {
    const auto rank = static_cast<uint32_t>(merges.size());
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      merges.push_back({merge[0].get<std::string>(), merge[1].get<std::string>(), rank});
      continue;
    }
    auto rule =
        merge.is_string() ? parse_merge(merge.get_ref<const std::string&>(), rank) : std::nullopt;
    if (!rule)
      return bad_input("{}: merge {} must be two tokens (got {}).", file, rank, shown(merge));
    merges.push_back(*std::move(rule));
  }
  return merges;
}

Result<std::shared_ptr<const Bpe>> read_model(const Json& root, const std::string& file) {
  const auto found = root.find("model");
  if (found == root.end() || !found->is_object())
    return bad_input("{}: must have an object \"model\".", file);
  const Json& model = *found;
  // Files older than the key "type" are BPE when they hold merges.
  LACUNA_TRY(const std::string type,
             field_or<std::string>(model, "type", model.contains("merges") ? "BPE" : "", file));
  if (type != "BPE") return unknown_component(file, "model", type);
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    LACUNA_TRY(const std::string affix, field_or<std::string>(model, key, "", file));
    if (!affix.empty())
      return bad_input("{}: \"{}\" must be empty (got \"{}\").", file, key, affix);
  }
  if (model.contains("dropout") && !model["dropout"].is_null() && model["dropout"] != 0.0)
    return bad_input("{}: \"dropout\" must be null (got {}). It is for training.", file,
                     shown(model["dropout"]));
  const auto vocab = model.find("vocab"), merges = model.find("merges");
  if (vocab == model.end() || !vocab->is_object() || merges == model.end() || !merges->is_array())
    return bad_input("{}: the BPE model must have an object \"vocab\" and a list \"merges\".",
                     file);
  LACUNA_TRY(Vocabulary vocabulary, read_vocabulary(*vocab, file));
  LACUNA_TRY(const std::vector<MergeRule> rules, read_merges(*merges, file));
  BpeOptions options;
  LACUNA_TRY(options.fuse_unknown, field_or<bool>(model, "fuse_unk", false, file));
  LACUNA_TRY(options.byte_fallback, field_or<bool>(model, "byte_fallback", false, file));
  LACUNA_TRY(options.ignore_merges, field_or<bool>(model, "ignore_merges", false, file));
  LACUNA_TRY(const std::string unknown, field_or<std::string>(model, "unk_token", "", file));
  if (!unknown.empty()) {
    options.unknown = vocabulary.id(unknown);
    if (!options.unknown)
      return bad_input("{}: unk_token must be in the vocabulary (got \"{}\").", file, unknown);
  }
  return Bpe::create(std::move(vocabulary), rules, options, file);
}

}  // namespace

Result<std::shared_ptr<const Tokenizer>> parse_huggingface(std::string_view json,
                                                           const TokenizerConfig& config,
                                                           const std::string& file) {
  LACUNA_TRY(const Json root, parse_json_object(json, file));
  PipelineParts parts;
  LACUNA_TRY(parts.model, read_model(root, file));
  LACUNA_TRY(parts.normalizer, read_normalizer(root, file));
  LACUNA_TRY(parts.pre_tokenizer, read_pre_tokenizer(root, file));
  LACUNA_TRY(parts.decoder, read_decoder(root, file));
  std::vector<AddedToken> added;
  if (root.contains("added_tokens") && !root["added_tokens"].is_null()) {
    if (!root["added_tokens"].is_array())
      return bad_input("{}: \"added_tokens\" must be a list.", file);
    for (const Json& item : root["added_tokens"]) {
      LACUNA_TRY(AddedToken token, added_token(item, file));
      LACUNA_TRY(token.id, field_or<int64_t>(item, "id", -1, file));
      added.push_back(std::move(token));
    }
  }
  merge_added(added, config.added_tokens(parts.model->vocabulary()));
  LACUNA_TRY(parts.added, AddedTokens::create(std::move(added), parts.model->vocabulary(),
                                              parts.normalizer, file));
  LACUNA_CHECK(read_post_processor(root, file, parts));
  if (!parts.prefix.empty()) parts.bos = parts.prefix.front();  // unless the config names one
  LACUNA_CHECK(apply_config(config, file, parts));
  return std::make_shared<const Pipeline>(std::move(parts));
}

}  // namespace lacuna::io::tokenizer

#include "lacuna/prune/targets.h"

#include <algorithm>

#include "lacuna/format/element.h"
#include "lacuna/io/misfit.h"

namespace lacuna::prune {

Result<std::vector<std::regex>> compile(const std::vector<std::string>& texts, const char* flag) {
  std::vector<std::regex> compiled;
  for (const std::string& text : texts) {
    try {
      compiled.emplace_back(text);
    } catch (const std::regex_error& error) {
      return usage_error("{}: not a regular expression (got \"{}\": {}).", flag, text,
                         error.what());
    }
  }
  return compiled;
}

bool any_matches(const std::vector<std::regex>& regexes, const std::string& name) {
  return std::any_of(regexes.begin(), regexes.end(),
                     [&](const std::regex& regex) { return std::regex_search(name, regex); });
}

Status check_all_match(const std::vector<std::string>& texts, const std::vector<std::string>& names,
                       const char* flag) {
  LACUNA_TRY(const auto regexes, compile(texts, flag));
  for (size_t i = 0; i < regexes.size(); ++i)
    if (std::ranges::none_of(
            names, [&](const std::string& name) { return std::regex_search(name, regexes[i]); }))
      return usage_error(
          "{}: \"{}\" matches no weight that it could mean. Names look like \"{}\"; several "
          "expressions are given one after the other.",
          flag, texts[i], names.front());
  return {};
}

std::vector<std::string> prunable_names(const io::DecoderSpec& spec) {
  std::vector<std::string> names;
  for (const auto& weight : spec.block_weights()) names.push_back(weight.name);
  return names;
}

namespace {

/// Of a weight that is to be stored sparse: told now, not when all blocks are pruned.
Status check_target(const io::Checkpoint& checkpoint, const io::DecoderSpec::BlockWeight& weight) {
  const auto& [name, layer, linear] = weight;
  if (const auto line = io::misfit(checkpoint, name, {linear.out, linear.in}))
    return bad_input("{}: {}. Is config.json that of these weights?", checkpoint.folder().string(),
                     *line);
  const DType dtype = checkpoint.weights().at(name).dtype;
  if (!format::storable(dtype))
    return bad_input(
        "{}: tensor \"{}\" has a type that no sparse store holds (got {}; need float32, bfloat16 "
        "or float16). Convert the model, or leave the tensor out by --exclude.",
        checkpoint.folder().string(), name, long_name(dtype));
  return {};
}

}  // namespace

Result<Targets> find_targets(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                             const PruneOptions& options) {
  LACUNA_TRY(const auto wanted, compile(options.target, "--target"));
  LACUNA_TRY(const auto unwanted, compile(options.exclude, "--exclude"));
  std::vector<std::string> names = prunable_names(spec);
  LACUNA_CHECK(check_all_match(options.target, names, "--target"));
  // What is never pruned may be left out by name, a head too that the model has tied.
  for (const auto& [name, info] : checkpoint.weights()) names.push_back(name);
  names.emplace_back("lm_head.weight");
  LACUNA_CHECK(check_all_match(options.exclude, names, "--exclude"));
  Targets targets(static_cast<size_t>(spec.layers));
  bool any = false;
  for (const auto& weight : spec.block_weights()) {
    if (!wanted.empty() && !any_matches(wanted, weight.name)) continue;
    if (any_matches(unwanted, weight.name)) continue;
    LACUNA_CHECK(check_target(checkpoint, weight));
    targets[static_cast<size_t>(weight.layer)].push_back(weight.linear.name);
    any = true;
  }
  if (!any)
    return usage_error(
        "--target, --exclude: no Linear of the model is left to prune. Names look like "
        "\"{}{}.weight\".",
        spec.block_prefix(0), spec.q.name);
  return targets;
}

Result<std::vector<std::string>> target_names(const io::Checkpoint& checkpoint,
                                              const io::DecoderSpec& spec,
                                              const PruneOptions& options) {
  LACUNA_TRY(const Targets targets, find_targets(checkpoint, spec, options));
  std::vector<std::string> names;
  for (int64_t layer = 0; layer < spec.layers; ++layer)
    for (const std::string& linear : targets[static_cast<size_t>(layer)])
      names.push_back(spec.weight_name(layer, linear));
  return names;
}

}  // namespace lacuna::prune

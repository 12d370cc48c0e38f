#include "lacuna/kernels/select.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>

#include "lacuna/kernels/measured.h"

namespace lacuna::kernels {
namespace {

struct ValuesName {
  Values values;
  std::string_view text;
  std::optional<DType> dtype;
};
constexpr std::array<ValuesName, 6> kValues = {{{Values::kF32, "f32", DType::kF32},
                                                {Values::kBF16, "bf16", DType::kBF16},
                                                {Values::kF16, "f16", DType::kF16},
                                                {Values::kInt8, "int8", std::nullopt},
                                                {Values::kInt4G64, "int4g64", std::nullopt},
                                                {Values::kFP8, "fp8", std::nullopt}}};
constexpr int64_t kLargestExtent = int64_t{1} << 31;

/// Cuts the text before `separator` off the front of `rest`.
std::string_view take_field(std::string_view& rest, char separator) {
  const size_t at = rest.find(separator);
  const std::string_view field = rest.substr(0, at);
  rest = at == std::string_view::npos ? std::string_view{} : rest.substr(at + 1);
  return field;
}

/// The whole of `text` as a number.
template <class T>
std::optional<T> number(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<Values> parse_values(std::string_view name) {
  for (const ValuesName& known : kValues)
    if (known.text == name) return known.values;
  const auto code = format::Quantization::parse(name);  // "int4" is int4g64
  return code.ok() ? values_of(*code) : std::nullopt;
}

DType default_activations(Values values) { return dtype_of(values).value_or(DType::kBF16); }

std::optional<double> fraction(std::string_view text) {
  const auto value = number<double>(text);
  return value && *value >= 0 && *value <= 1 ? value : std::nullopt;
}

bool parse_sparsity(std::string_view text, Problem& problem) {
  if (const auto share = fraction(text)) {
    problem.pattern = format::Pattern::unstructured();
    problem.sparsity = *share;
    return true;
  }
  if (text.starts_with("block")) {
    const std::string_view extents = take_field(text, '@').substr(5);
    auto pattern = format::Pattern::parse(fmt::format("block:{}", extents));
    const auto share = fraction(text);
    if (!pattern.ok() || !share) return false;
    problem.pattern = *pattern;
    problem.sparsity = *share;
    return true;
  }
  auto pattern = format::Pattern::parse(text);
  if (!pattern.ok() || pattern->kind != format::PatternKind::kKeepOf) return false;
  problem.pattern = *pattern;
  problem.sparsity = pattern->sparsity();
  return true;
}

}  // namespace

std::string_view text(Values values) { return kValues[static_cast<size_t>(values)].text; }
bool walked_by_rows(Values values) { return dtype_of(values) || values == Values::kFP8; }

std::optional<DType> dtype_of(Values values) { return kValues[static_cast<size_t>(values)].dtype; }

Values values_of(DType dtype) {
  for (const ValuesName& known : kValues)
    if (known.dtype == dtype) return known.values;
  return Values::kBF16;
}

std::optional<Values> values_of(const format::Quantization& quantization) {
  if (quantization == format::Quantization{.code = format::Code::kInt8}) return Values::kInt8;
  if (quantization == format::Quantization{.code = format::Code::kFP8}) return Values::kFP8;
  if (quantization == format::Quantization{.code = format::Code::kInt4, .group = 64})
    return Values::kInt4G64;
  return std::nullopt;
}

Result<Problem> Problem::parse(std::string_view text) {
  const auto wrong = [&](std::string_view rule, std::string_view got) {
    return usage_error(
        "problem \"{}\": {} (got \"{}\"). Write OPERATION:VALUES[/ACTIVATIONS]:NxKxT[:SPARSITY], "
        "as in linear_bitmap:bf16:14336x4096x1:0.5.",
        text, rule, got);
  };
  std::string_view rest = text;
  Problem problem;
  problem.operation = take_field(rest, ':');
  if (problem.operation.empty()) return wrong("no operation", "");
  if (rest.empty()) return wrong("no values and no shape behind the operation", text);

  std::string_view types = take_field(rest, ':');
  const std::string_view stored = take_field(types, '/');
  const auto values = parse_values(stored);
  if (!values) return wrong("unknown values, need f32, bf16, f16, int8, int4g64 or fp8", stored);
  problem.values = *values;
  problem.activations = default_activations(*values);
  if (!types.empty()) {
    const auto given = parse_values(types);
    const auto dtype = given ? dtype_of(*given) : std::nullopt;
    if (!dtype) return wrong("unknown activations, need f32, bf16 or f16", types);
    problem.activations = *dtype;
  }

  std::string_view shape = take_field(rest, ':');
  for (int64_t* extent : {&problem.outputs, &problem.inputs, &problem.tokens}) {
    const std::string_view field = take_field(shape, 'x');
    const auto value = number<int64_t>(field);
    if (!value || *value < 1 || *value > kLargestExtent)
      return wrong("an extent is not a number of 1..2^31", field);
    *extent = *value;
  }
  if (!shape.empty()) return wrong("more than three extents", shape);
  if (!rest.empty() && !parse_sparsity(rest, problem))
    return wrong("unknown sparsity, need a share of 0..1, KEEP:OF or blockRxC@SHARE", rest);
  return problem;
}

std::string Problem::text() const {
  std::string out = fmt::format("{}:{}", operation, kernels::text(values));
  if (activations != default_activations(values))
    out += fmt::format("/{}", kernels::text(values_of(activations)));
  out += fmt::format(":{}x{}x{}", outputs, inputs, tokens);
  switch (pattern.kind) {
    case format::PatternKind::kDense:
      break;
    case format::PatternKind::kUnstructured:
      out += fmt::format(":{}", sparsity);
      break;
    case format::PatternKind::kKeepOf:
      out += fmt::format(":{}", pattern.text());
      break;
    case format::PatternKind::kBlock:
      out += fmt::format(":block{}x{}@{}", pattern.block_rows, pattern.block_columns, sparsity);
      break;
  }
  return out;
}

const Device& Device::this_cpu() {
  static const Device device{.cpu = cpu_features(), .gpu = std::nullopt};
  return device;
}

const Device& Device::this_gpu() {
  static const Device device{.cpu = cpu_features(),
                             .gpu = gpus().empty() ? GpuFacts{} : gpus().front()};
  return device;
}

Support Support::all(std::initializer_list<Support> conditions) {
  for (const Support& condition : conditions)
    if (!condition) return condition;
  return yes();
}

Support needs(bool condition, std::string_view what) {
  return condition ? Support::yes() : Support::no("needs {}", what);
}

std::optional<std::string> forced_candidate(std::string_view operation, const Device& device) {
  const char* variable = std::getenv("LACUNA_FORCE");
  if (variable == nullptr) return std::nullopt;
  for (std::string_view rest = variable; !rest.empty();) {
    std::string_view entry = take_field(rest, ',');
    if (take_field(entry, ':') == operation && entry.starts_with("cuda_") == device.gpu.has_value())
      return std::string(entry);
  }
  return std::nullopt;
}

std::string_view text(ChosenBy by) {
  switch (by) {
    case ChosenBy::kForce:
      return "LACUNA_FORCE";
    case ChosenBy::kMeasured:
      return "measured table";
    default:
      return "order of the list";
  }
}

namespace detail {
namespace {

/// What the measured table says; it knows CPUs alone.
std::optional<std::string> measured(const Problem& problem, const Device& device) {
  return device.gpu ? std::nullopt : measured_winner(problem);
}

}  // namespace

Result<Choice> choose(const std::vector<const Candidate*>& candidates, const Problem& problem,
                      const Device& device) {
  const auto forced = forced_candidate(problem.operation, device);
  if (const auto winner = measured(problem, device); winner && !forced)
    for (size_t i = 0; i < candidates.size(); ++i)
      if (candidates[i]->name == *winner && candidates[i]->supports(problem, device))
        return Choice{i, ChosenBy::kMeasured};
  std::string names, refusals;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const Candidate& candidate = *candidates[i];
    names += (i ? ", " : "") + candidate.name;
    if (forced && *forced != candidate.name) continue;
    const Support support = candidate.supports(problem, device);
    if (support) return Choice{i, forced ? ChosenBy::kForce : ChosenBy::kOrder};
    if (forced)
      return not_possible("{}: LACUNA_FORCE asks for {}, which {}. Unset it to run another.",
                          problem.text(), candidate.name, support.refusal());
    refusals += fmt::format("{}{} {}", i ? "; " : "", candidate.name, support.refusal());
  }
  if (forced)
    return usage_error("{}: LACUNA_FORCE names an unknown candidate (got \"{}\"; need {}).",
                       problem.text(), *forced, names);
  return not_possible("{}: no kernel supports this problem ({}).", problem.text(), refusals);
}

std::vector<Explanation> explain(const std::vector<const Candidate*>& candidates,
                                 const Problem& problem, const Device& device) {
  const auto chosen = choose(candidates, problem, device);
  const auto winner = measured(problem, device);
  std::vector<Explanation> lines;
  for (size_t i = 0; i < candidates.size(); ++i) {
    Explanation line{candidates[i]->name, candidates[i]->supports(problem, device),
                     chosen.ok() && chosen->index == i};
    if (line.chosen) {
      line.note = fmt::format("chosen by: {}", text(chosen->by));
    } else if (line.candidate == winner) {
      line.note = line.support ? "named by the measured table, but LACUNA_FORCE goes first"
                               : "named by the measured table, which is ignored here";
    }
    lines.push_back(std::move(line));
  }
  const bool known = !winner || std::any_of(lines.begin(), lines.end(), [&](const auto& line) {
    return line.candidate == *winner;
  });
  if (!known)
    lines.push_back({*winner,
                     Support::no("is no candidate of {}, though the measured table names it",
                                 problem.operation),
                     false, "ignored; run `lacuna tune` again"});
  return lines;
}

}  // namespace detail

Result<LinearPlan> plan_linear(const LinearCandidates& candidates, const Problem& problem,
                               const Device& device) {
  LACUNA_TRY(const LinearCandidate* candidate, candidates.choose(problem, device));
  return LinearPlan{problem, candidate, candidate->workspace_bytes(problem)};
}

Support supports_rows(const Problem& problem, const Device& device) {
  return Support::all(
      {needs(!device.gpu, "weights in host memory"),
       needs(dtype_of(problem.values).has_value(), "f32, bf16 or f16 values"),
       needs(problem.tokens <= format::kMaxTokens,
             "at most 16 tokens (for more, expand the weight and take a dense product)")});
}

Support supports_rows_or_fp8(const Problem& problem, const Device& device) {
  if (problem.values != Values::kFP8) return supports_rows(problem, device);
  Problem with_numbers = problem;
  with_numbers.values = Values::kF32;
  return supports_rows(with_numbers, device);
}

Support supports_bf16_dot(const Problem& problem, const Device& device) {
  return Support::all(
      {supports_rows(problem, device),
       needs(device.cpu.avx512_vbmi2 && device.cpu.avx512_bf16, "AVX-512 VBMI2 and BF16"),
       needs(problem.values == Values::kBF16 && problem.activations == DType::kBF16,
             "bf16 values and bf16 activations")});
}

Support needs_vbmi2(const Device& device) {
  return needs(device.cpu.avx512_vbmi2, "AVX-512 with VBMI2");
}

Support needs_avx2(const Device& device) {
  return needs(device.cpu.avx2 && device.cpu.fma, "AVX2 and FMA");
}

Support needs_avx2_f16c(const Device& device) {
  return needs(device.cpu.avx2 && device.cpu.fma && device.cpu.f16c, "AVX2, FMA and F16C");
}

LinearCandidate reference_candidate(Support (*supports)(const Problem&, const Device&)) {
  return {{"reference", supports},
          [](const Problem&) -> size_t { return 0; },
          [](const format::RowsView& rows, const format::RowProduct& product, void*,
             const Executor&) { format::run_reference_row_product(rows, product); }};
}

}  // namespace lacuna::kernels

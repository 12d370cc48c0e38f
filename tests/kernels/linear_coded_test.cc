// Products of quantised weights against the definition, in integers and float64.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>

#include "format/random_matrix.h"
#include "lacuna/core/cpu.h"
#include "lacuna/format/codes.h"
#include "lacuna/format/element.h"
#include "lacuna/format/quantize.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/kernels/linear_coded/stream_chunk.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Pattern;
using format::Quantization;
using lacuna::testing::bits_of;
using lacuna::testing::random_matrix;

/// Values with exact float32 products of scale and code: dequantised, they are what codes stand
/// for.
format::CompactMatrix coded(int64_t rows, int64_t columns, const Pattern& pattern, const char* code,
                            double sparsity = 0.5, uint64_t seed = 7) {
  const auto matrix =
      random_matrix(DType::kF32, rows, columns, pattern, sparsity, seed, [&](int64_t r, int64_t c) {
        return static_cast<float>(random_normal(seed, 1, static_cast<uint64_t>(r * columns + c)));
      });
  const auto quantization = Quantization::parse(code).value();
  if (pattern.kind == format::PatternKind::kDense)
    return format::quantize(matrix.tensor(), quantization).value();
  return format::quantize(format::compress(matrix.tensor(), pattern).value(), quantization).value();
}

std::vector<float> random_x(int64_t tokens, int64_t columns, uint64_t seed = 3) {
  std::vector<float> x(static_cast<size_t>(tokens * columns));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random_normal(seed, 2, i));
  return x;
}

Problem problem_of(const format::CompactMatrix& m, int64_t tokens, DType activations) {
  return {.operation = "linear_bitmap",
          .values = m.quantization.code == format::Code::kInt8 ? Values::kInt8 : Values::kInt4G64,
          .activations = activations,
          .outputs = m.rows,
          .inputs = m.columns,
          .tokens = tokens,
          .pattern = m.pattern,
          .sparsity = 0.5};
}

std::vector<float> run_candidate(const CodedCandidate& candidate, const format::CompactMatrix& m,
                                 const std::vector<float>& x, int64_t tokens,
                                 const std::vector<float>* bias = nullptr,
                                 const Executor& executor = Executor::serial(),
                                 std::optional<Masks> masks = std::nullopt) {
  const Stream stream = Stream::pack(m, executor, masks).value();
  const CodedPlan planned = plan_for(candidate, problem_of(m, tokens, DType::kF32));
  std::vector<std::byte> workspace(planned.workspace_bytes);
  std::vector<float> y(static_cast<size_t>(tokens * m.rows), std::nanf(""));
  run(planned, stream,
      {.dtype = DType::kF32,
       .tokens = tokens,
       .x = x.data(),
       .x_stride = m.columns,
       .y = y.data(),
       .y_stride = m.rows,
       .bias = bias ? bias->data() : nullptr},
      workspace.data(), executor);
  return y;
}

bool runs_here(const CodedCandidate& candidate, const format::CompactMatrix& m,
               int64_t tokens = 1) {
  return static_cast<bool>(
      candidate.supports(problem_of(m, tokens, DType::kF32), Device::this_cpu()));
}

/// The first that this CPU has the instructions for; the portable one always runs.
const CodedCandidate& best_here(const format::CompactMatrix& m) {
  for (const CodedCandidate& candidate : candidates())
    if (runs_here(candidate, m)) return candidate;
  ADD_FAILURE() << "no candidate runs here";
  return *candidates().begin();
}

/// |y - exact| <= bound, exact from the dequantised weight and rounded x; the same bits from every
/// candidate and from both ways to mask.
void expect_right(const format::CompactMatrix& m, const std::vector<float>& x) {
  const auto tokens = static_cast<int64_t>(x.size()) / m.columns;
  std::vector<float> bias(static_cast<size_t>(m.rows));
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = 0.25f * static_cast<float>(i % 7);
  const auto what = [&](const char* candidate) {
    return fmt::format("{} {}x{}x{} {} {}", candidate, m.rows, m.columns, tokens, m.pattern.text(),
                       m.quantization.text());
  };
  const auto y = run_candidate(best_here(m), m, x, tokens, &bias);
  for (const CodedCandidate& candidate : candidates()) {
    // Another CPU's, or for other numbers of tokens; the portable one always runs.
    if (!runs_here(candidate, m, tokens)) continue;
    for (const Masks masks : {Masks::kOwn, Masks::kShared})
      ASSERT_EQ(run_candidate(candidate, m, x, tokens, &bias, Executor::serial(), masks), y)
          << what(candidate.name.c_str());
  }
  const Tensor dense = format::expand(m);
  const float* w = dense.bytes.as<float>();
  const double groups =
      static_cast<double>(m.quantization.groups(m.columns) + m.columns / kChunk + 1);
  std::vector<int8_t> codes(static_cast<size_t>(m.columns));
  for (int64_t t = 0; t < tokens; ++t) {
    const float scale =
        quantize_token(DType::kF32, x.data() + t * m.columns, m.columns, codes.data());
    for (int64_t n = 0; n < m.rows; ++n) {
      double exact = 0, magnitude = 0;
      for (int64_t k = 0; k < m.columns; ++k) {
        exact += double{w[n * m.columns + k]} * codes[static_cast<size_t>(k)];
        magnitude +=
            std::fabs(w[n * m.columns + k]) * (std::abs(codes[static_cast<size_t>(k)]) + 256.0);
      }
      const double expected = exact * scale + bias[static_cast<size_t>(n)];
      // One float32 sum over the groups, a few products.
      const double bound = (groups + 6) * 0x1p-24 * (magnitude * scale + std::fabs(expected));
      ASSERT_NEAR(y[static_cast<size_t>(t * m.rows + n)], expected, bound)
          << what("row ") << n << " of token " << t;
    }
  }
}

void expect_right(const format::CompactMatrix& m, int64_t tokens) {
  expect_right(m, random_x(tokens, m.columns));
}

TEST(LinearCoded, CandidatesTakeWhatTheySayAndNothingElse) {
  struct Expected {
    const char* name;
    std::vector<bool CpuFeatures::*> needs;
    bool few, many, many_f32;
  };
  const std::vector<Expected> expected = {
      {"cpu_amx_tiled_dot",
       {&CpuFeatures::amx_int8, &CpuFeatures::avx512_vbmi2, &CpuFeatures::gfni},
       false,
       true,
       true},
      {"cpu_avx512_stream_dot",
       {&CpuFeatures::avx512_vbmi2, &CpuFeatures::avx512_vnni, &CpuFeatures::gfni},
       true,
       true,
       true},
      {"cpu_avx2_vnni_buffer_dot",
       {&CpuFeatures::avx2, &CpuFeatures::fma, &CpuFeatures::avx_vnni},
       true,
       true,
       false},
      {"cpu_avx2_buffer_dot", {&CpuFeatures::avx2, &CpuFeatures::fma}, true, true, false},
      {"cpu_portable", {}, true, false, false}};
  ASSERT_EQ(std::distance(candidates().begin(), candidates().end()),
            static_cast<int64_t>(expected.size()));
  for (const auto& [name, needs, few, many, many_f32] : expected) {
    const CodedCandidate* candidate = candidates().find(name);
    ASSERT_NE(candidate, nullptr) << name;
    Device able;
    for (const auto feature : needs) able.cpu.*feature = true;
    Problem problem = problem_of(coded(4, 64, Pattern::unstructured(), "int8"), 1, DType::kBF16);
    for (const Values values :
         {Values::kF32, Values::kBF16, Values::kF16, Values::kInt8, Values::kInt4G64, Values::kFP8})
      for (int64_t tokens = 1; tokens <= kMaxTokens + 1; ++tokens) {
        problem.values = values;
        problem.tokens = tokens;
        const bool codes = values == Values::kInt8 || values == Values::kInt4G64;
        for (const DType activations : {DType::kBF16, DType::kF32}) {
          problem.activations = activations;
          const bool takes_many = activations == DType::kF32 ? many_f32 : many;
          EXPECT_EQ(static_cast<bool>(candidate->supports(problem, able)),
                    codes && (tokens <= kMaxTokens ? few : takes_many))
              << name << " " << problem.text();
        }
        for (const auto feature : needs) {
          Device lacking = able;
          lacking.cpu.*feature = false;
          EXPECT_FALSE(candidate->supports(problem, lacking)) << name << " " << problem.text();
        }
      }
  }
}

TEST(LinearCoded, EqualsTheDefinitionForEveryShapeAndPattern) {
  for (const char* code :
       {"int8", "int8g64", "int4", "int4g32", "int4g128", "int4g64z", "int4g32z", "int4row"})
    for (const Pattern& pattern : {Pattern{}, Pattern::unstructured(), Pattern::keep_of(2, 4),
                                   Pattern::keep_of(1, 4), Pattern::block(8, 8)})
      for (const int64_t columns : {1, 7, 63, 64, 65, 128, 200, 257})
        for (const int64_t rows : {1, 9, 15, 16, 17, 33}) {
          const auto m = coded(rows, columns, pattern, code);
          expect_right(m, columns == 200 ? 7 : 1);
          if (columns >= 63 && rows % 16 < 2) expect_right(m, 17 + rows);
          if (::testing::Test::HasFatalFailure()) return;
        }
}

TEST(LinearCoded, TakesEveryNumberOfTokens) {
  for (const char* code : {"int8", "int4", "int4g64z"})
    for (int64_t tokens = 1; tokens <= kMaxTokens; ++tokens)
      expect_right(coded(70, 192, Pattern::unstructured(), code), tokens);
  for (const char* code : {"int8", "int8g64", "int4", "int4g32"})
    for (const int64_t tokens : {17, 31, 32, 33, 47, 64, 65, 129, 257, 300})
      expect_right(coded(70, 192, Pattern::unstructured(), code), tokens);
}

TEST(LinearCoded, TakesManyTokensInEveryBlocking) {
  // More rows than a panel, more columns and more tokens than a block.
  for (const char* code : {"int8", "int4", "int4g32"}) {
    expect_right(coded(530, 1100, Pattern::unstructured(), code), 40);
    expect_right(coded(33, 4200, Pattern::unstructured(), code), 20);
    expect_right(coded(48, 1090, Pattern{}, code), 280);
  }
}

/// y of any type, from what `candidate` makes of x rounded to it.
std::vector<uint16_t> half_outputs(const CodedCandidate& candidate, const format::CompactMatrix& m,
                                   DType dtype, int64_t tokens) {
  const auto wide = random_x(tokens, m.columns);
  const auto count = static_cast<int64_t>(wide.size());
  std::vector<uint16_t> x(wide.size()), bias(static_cast<size_t>(m.rows));
  format::write_floats(x.data(), dtype, 0, wide.data(), count);
  format::write_floats(bias.data(), dtype, 0, wide.data(), m.rows);
  const Stream stream = Stream::pack(m).value();
  const CodedPlan planned = plan_for(candidate, problem_of(m, tokens, dtype));
  std::vector<std::byte> workspace(planned.workspace_bytes);
  const int64_t stride = m.rows + 3;  // what lies between is left alone
  std::vector<uint16_t> y(static_cast<size_t>(tokens * stride), 0x1234);
  run(planned, stream,
      {.dtype = dtype,
       .tokens = tokens,
       .x = x.data(),
       .x_stride = m.columns,
       .y = y.data(),
       .y_stride = stride,
       .bias = bias.data()},
      workspace.data(), Executor::serial());
  return y;
}

TEST(LinearCoded, GivesTheSameBitsInEveryTypeOfY) {
  for (const char* code : {"int8", "int4"})
    for (const DType dtype : {DType::kBF16, DType::kF16})
      for (const int64_t rows : {5, 16, 27, 64}) {
        const auto m = coded(rows, 300, Pattern::unstructured(), code);
        const auto expected = half_outputs(*candidates().find("cpu_portable"), m, dtype, 37);
        for (int64_t t = 0; t < 37; ++t)
          for (int64_t i = m.rows; i < m.rows + 3; ++i)
            ASSERT_EQ(expected[static_cast<size_t>(t * (m.rows + 3) + i)], 0x1234);
        for (const CodedCandidate& candidate : candidates())
          if (candidate.supports(problem_of(m, 37, dtype), Device::this_cpu())) {
            EXPECT_EQ(half_outputs(candidate, m, dtype, 37), expected) << candidate.name;
          }
      }
}

TEST(QuantizeToken, IsTheSameOnEveryCpu) {
#if defined(__x86_64__)
  if (!cpu_features().avx512) {
    std::printf("[ NOT RUN  ] quantize_token_avx512: this CPU can't\n");
    return;
  }
  const float inf = std::numeric_limits<float>::infinity();
  for (const int64_t columns : {0, 1, 15, 16, 17, 100, 1024, 1500})
    for (uint64_t kind = 0; kind < 8; ++kind) {
      auto x = random_x(1, columns, kind);
      for (size_t i = 0; i < x.size(); ++i) {
        if (kind == 1) x[i] = 0;
        if (kind == 2) x[i] *= 1e-40f;
        if (kind == 3) x[i] = std::round(x[i] * 8) / 2;  // halves of a step
        if (kind == 4) x[i] *= 1e30f;
      }
      if (kind == 3 && columns > 0) x[0] = 127;
      if (kind == 5 && columns > 0) x.back() = inf;
      if (kind == 6 && columns > 0) x[x.size() / 2] = -inf;
      if (kind == 7 && columns > 0) x[0] = std::nanf("");
      for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
        std::vector<std::byte> bits(x.size() * size_bytes(dtype));
        format::write_floats(bits.data(), dtype, 0, x.data(), columns);
        std::vector<int8_t> here(x.size() + 1, 99), portable(x.size() + 1, 99);
        const float a = quantize_token_avx512(dtype, bits.data(), columns, here.data());
        const float b = quantize_token_portable(dtype, bits.data(), columns, portable.data());
        EXPECT_EQ(std::bit_cast<uint32_t>(a), std::bit_cast<uint32_t>(b)) << kind << " " << columns;
        EXPECT_EQ(here, portable) << kind << " " << columns;
      }
    }
#endif
}

TEST(LinearCoded, TakesEmptyFullAndVerySparseWeights) {
  for (const char* code : {"int8", "int4", "int4g64z"})
    for (const double sparsity : {0.0, 0.9, 0.99, 1.0})
      expect_right(coded(66, 320, Pattern::unstructured(), code, sparsity), 3);
}

TEST(LinearCoded, NoSumSaturates) {
  // The largest codes of either sign meet the largest x. A pair of products cut off at 16 bits
  // would be off by 32,000, far more than the bound allows.
  for (const char* code : {"int8", "int8g64", "int4", "int4g32"}) {
    const bool int4 = std::string_view(code).substr(0, 4) == "int4";
    const auto dense = random_matrix(
        DType::kF32, 32, 4096, Pattern::unstructured(), 0.3, 5, [&](int64_t r, int64_t c) {
          const bool up = r % 4 < 2 ? r % 2 == 0 : c % 3 == 0;
          return up ? (int4 ? 7.0f : 127.0f) : (int4 ? -8.0f : -127.0f);
        });
    const auto m =
        format::quantize(format::compress(dense.tensor(), Pattern::unstructured()).value(),
                         Quantization::parse(code).value())
            .value();
    std::vector<float> x(static_cast<size_t>(3 * m.columns));
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = i < 4096 ? 127.0f : i < 8192 ? -127.0f : i % 2 ? 127.0f : -127.0f;
    expect_right(m, x);
    for (int more = 0; more < 4; ++more) x.insert(x.end(), x.begin(), x.begin() + 3 * 4096);
    expect_right(m, {x.begin(), x.begin() + 18 * 4096});
  }
}

TEST(LinearCoded, BitsDependNeitherOnThreadsNorOnOtherTokens) {
  const auto m = coded(301, 384, Pattern::unstructured(), "int4");
  const auto x = random_x(16, m.columns);
  for (const CodedCandidate& candidate : candidates()) {
    if (!runs_here(candidate, m)) continue;
    const auto all = run_candidate(candidate, m, x, 16);
    for (int threads : {2, 3, 7}) {
      ThreadPool pool(threads);
      EXPECT_EQ(run_candidate(candidate, m, x, 16, nullptr, pool.executor()), all);
    }
    for (int64_t t : {0, 5, 15}) {
      const std::vector<float> one(x.begin() + t * m.columns, x.begin() + (t + 1) * m.columns);
      const auto y = run_candidate(candidate, m, one, 1);
      for (int64_t n = 0; n < m.rows; ++n)
        EXPECT_EQ(y[static_cast<size_t>(n)], all[static_cast<size_t>(t * m.rows + n)]);
    }
  }
}

TEST(LinearCoded, BitsOfManyTokensAreThoseOfOne) {
  for (const char* code : {"int8", "int4"}) {
    const auto m = coded(301, 384, Pattern::unstructured(), code);
    const auto x = random_x(70, m.columns);
    std::vector<float> one_by_one;
    for (int64_t t = 0; t < 70; ++t) {
      const std::vector<float> one(x.begin() + t * m.columns, x.begin() + (t + 1) * m.columns);
      const auto y = run_candidate(best_here(m), m, one, 1);
      one_by_one.insert(one_by_one.end(), y.begin(), y.end());
    }
    for (const CodedCandidate& candidate : candidates()) {
      if (!runs_here(candidate, m, 70)) continue;
      for (int threads : {1, 2, 3, 7}) {
        ThreadPool pool(threads);
        EXPECT_EQ(run_candidate(candidate, m, x, 70, nullptr, pool.executor()), one_by_one)
            << candidate.name;
      }
    }
  }
}

TEST(LinearCoded, ANotFiniteTokenIsNaNAndTheOthersAreUntouched) {
  const auto m = coded(9, 100, Pattern::unstructured(), "int8");
  for (const int64_t tokens : {3, 20})
    for (const CodedCandidate& candidate : candidates()) {
      if (!runs_here(candidate, m, tokens)) continue;
      auto x = random_x(tokens, m.columns);
      const auto clean = run_candidate(candidate, m, x, tokens);
      x[150] = std::numeric_limits<float>::infinity();
      const auto y = run_candidate(candidate, m, x, tokens);
      for (int64_t i = 0; i < tokens * m.rows; ++i) {
        const auto at = static_cast<size_t>(i);
        if (i / m.rows == 1)
          EXPECT_TRUE(std::isnan(y[at]));
        else
          EXPECT_EQ(y[at], clean[at]);
      }
    }
}

TEST(Stream, ExpandsToWhatTheMatrixStandsFor) {
  for (const char* code : {"int8", "int4", "int4g32", "int4g32z", "int4g128z"})
    for (const Pattern& pattern : {Pattern{}, Pattern::unstructured(), Pattern::block(16, 4)}) {
      const auto m = coded(67, 150, pattern, code);
      for (const Masks masks : {Masks::kOwn, Masks::kShared}) {
        ThreadPool pool(masks == Masks::kOwn ? 1 : 3);
        const Stream stream = Stream::pack(m, pool.executor(), masks).value();
        const Tensor dense = format::expand(m);
        std::vector<float> rows(static_cast<size_t>(kTileRows * m.columns));
        for (int64_t tile = 0; tile < stream.tiles(); ++tile) {
          stream.expand_tile(tile, rows.data());
          for (int64_t i = 0; i < kTileRows * m.columns; ++i) {
            const int64_t row = tile * kTileRows + i / m.columns;
            if (row < m.rows) {
              ASSERT_EQ(rows[static_cast<size_t>(i)],
                        dense.bytes.as<float>()[row * m.columns + i % m.columns]);
            }
          }
        }
      }
    }
}

/// What a packer makes of one random chunk, whose rows keep `density` of their weights.
struct PackedChunk {
  std::vector<uint8_t> masks, codes;
  std::vector<int32_t> sums;
  std::vector<int64_t> taken;  // bytes of each row
  bool operator==(const PackedChunk&) const = default;
};

PackedChunk pack_chunk(const ChunkPacker& packer, format::Code code, Masks kind, double density,
                       uint64_t seed) {
  uint64_t masks[kTileRows];
  std::vector<uint8_t> codes[kTileRows];
  ChunkRows rows{.masks = masks};
  for (uint64_t r = 0; r < kTileRows; ++r) {
    masks[r] = 0;
    for (uint64_t c = 0; c < kChunk; ++c)
      masks[r] |= uint64_t{random_uniform(seed, r, c) < density} << c;
    if (r == 5) masks[r] = 0;  // a row past the last
    const auto kept = static_cast<int64_t>(std::popcount(masks[r]));
    codes[r].assign(static_cast<size_t>(format::code_bytes(code, kept) + kCodeRoom), 0xa5);
    for (uint64_t i = 0; i < static_cast<uint64_t>(kept); ++i) {
      const auto bits = random_bits(seed, 100 + r, i);
      if (code == format::Code::kInt8)
        codes[r][i] = static_cast<uint8_t>(static_cast<int>(bits % 255) - 127);
      else
        codes[r][i / 2] =
            static_cast<uint8_t>(i % 2 ? (codes[r][i / 2] & 15) | bits << 4 : bits & 15);
    }
    rows.codes[r] = codes[r].data();
  }
  PackedChunk out{.masks = std::vector<uint8_t>(kBlocks * 8, 0x11),
                  .codes = std::vector<uint8_t>(kMostCodeBytes, 0x22)};
  ChunkSums sums;
  const int64_t bytes = packer.pack(code, kind, rows, out.masks.data(), out.codes.data(), sums);
  out.codes.resize(static_cast<size_t>(bytes));
  out.sums.assign(&sums[0][0], &sums[0][0] + 2 * kTileRows);
  for (int64_t r = 0; r < kTileRows; ++r) out.taken.push_back(rows.codes[r] - codes[r].data());
  return out;
}

TEST(ChunkPackers, WriteTheSameBytes) {
  const ChunkPacker& portable = chunk_packers().back();
  for (const ChunkPacker& packer : chunk_packers()) {
    if (!packer.runs_here) {
      std::printf("[ NOT RUN  ] pack_chunk %s: this CPU can't\n", packer.name);
      continue;
    }
    for (const auto& [code, kind] : {std::pair{format::Code::kInt8, Masks::kNone},
                                     {format::Code::kInt8, Masks::kOwn},
                                     {format::Code::kInt4, Masks::kNone},
                                     {format::Code::kInt4, Masks::kOwn},
                                     {format::Code::kInt4, Masks::kShared}})
      for (const double density : {0.0, 0.02, 0.3, 0.5, 0.9, 1.0})
        for (uint64_t seed = 0; seed < 40; ++seed)
          ASSERT_EQ(pack_chunk(packer, code, kind, density, seed),
                    pack_chunk(portable, code, kind, density, seed))
              << packer.name << " masks " << static_cast<int>(kind) << " density " << density;
  }
}

TEST(Stream, IsTheSameForAnyExecutor) {
  for (const char* code : {"int8", "int8g32", "int4"})
    for (const Pattern& pattern : {Pattern{}, Pattern::unstructured(), Pattern::block(16, 4)}) {
      const auto m = coded(333, 200, pattern, code);
      const Stream one = Stream::pack(m).value();
      ThreadPool pool(5);
      const Stream many = Stream::pack(m, pool.executor()).value();
      ASSERT_EQ(one.tiles(), 21);
      const int64_t bytes = one.bytes_before(one.tiles());
      ASSERT_EQ(many.bytes_before(many.tiles()), bytes);
      const uint8_t* const first = one.chunks_of(0) - one.head_bytes();
      EXPECT_TRUE(std::equal(first, first + bytes, many.chunks_of(0) - many.head_bytes()))
          << code << " " << pattern.text();
    }
}

TEST(Stream, SharesTheMasksOfVerySparseInt4AndOfAllWhereExpandingIsDear) {
  const auto masks = [](const char* code, const Pattern& pattern, double sparsity) {
    return Stream::pack(coded(64, 512, pattern, code, sparsity)).value().masks();
  };
  EXPECT_EQ(masks("int4", Pattern::unstructured(), 0.5),
            cpu_features().avx512_vbmi2 ? Masks::kOwn : Masks::kShared);
  EXPECT_EQ(masks("int4", Pattern::unstructured(), 0.9), Masks::kShared);
  EXPECT_EQ(masks("int8", Pattern::unstructured(), 0.9), Masks::kOwn);
  EXPECT_EQ(masks("int4", Pattern{}, 0), Masks::kNone);
}

TEST(Stream, TakesZeroPointsOffWhilePacking) {
  // Weights far from 0 on one side: zero points at the ends, and between.
  for (const auto& [low, high] : {std::pair{0.5, 8.0}, {-8.0, -0.5}, {-1.0, 6.0}, {-3.0, 3.0}}) {
    const auto dense = random_matrix(
        DType::kF32, 40, 200, Pattern::unstructured(), 0.4, 5, [&](int64_t r, int64_t c) {
          return static_cast<float>(low + (high - low) * random_uniform(9, static_cast<uint64_t>(r),
                                                                        static_cast<uint64_t>(c)));
        });
    const auto m =
        format::quantize(format::compress(dense.tensor(), Pattern::unstructured()).value(),
                         Quantization::parse("int4g64z").value())
            .value();
    EXPECT_EQ(Stream::pack(m)->code(), format::Code::kInt8);
    expect_right(m, 3);
  }
}

TEST(Stream, RefusesWhatItCantHold) {
  EXPECT_EQ(Stream::pack(coded(4, 64, Pattern::unstructured(), "fp8")).error().code,
            ::lacuna::Code::kNotPossible);
}

}  // namespace
}  // namespace lacuna::kernels::linear_coded

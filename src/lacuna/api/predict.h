// What a token will take in a model's Linears, from the measured table of this machine.
#pragma once

#include <functional>
#include <string>

#include "lacuna/api/jobs.h"
#include "lacuna/bench/speed_table.h"
#include "lacuna/core/status.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/model/decoder.h"

namespace lacuna::api {

/// Of a loaded model: all of its Linears and the output matrix, one token of one sequence. What
/// lies between them (attention, norms) is not in it.
/// @errors kNotPossible: a device without a table; a product that no table has (named); problems
/// that were not measured (the command that measures all of them)
Result<double> predicted_milliseconds(const model::Decoder& decoder,
                                      const bench::SpeedTable& table);

/// The same of weights that are still to be pruned: Linears that read one input and become sparse
/// together are one product, of which each takes the share of its rows.
struct LayerTimes {
  std::function<Result<double>(const std::string& weight, double sparsity)> pruned;
  double others = 0;  ///< milliseconds of what stays dense
};
/// Sparse products must have been measured at 30, 50, 70 and 90 % zeros.
/// @param pruned  whether a weight will be
/// @errors kNotPossible: something is missing (the command that measures all of it)
Result<LayerTimes> layer_times(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                               const format::Pattern& pattern,
                               const std::function<bool(const std::string&)>& pruned,
                               const bench::SpeedTable& table);

}  // namespace lacuna::api

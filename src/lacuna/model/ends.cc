#include "lacuna/model/decoder.h"
#include "lacuna/model/parts.h"

namespace lacuna::model {

struct Ends::State {
  Linear embedding;               // [vocab, embedding_width]
  at::Tensor position_embedding;  // [max_positions + offset, hidden]
  int64_t position_offset = 0;
  std::optional<Linear> project_in, project_out;
  std::optional<Norm> final_norm;
  Linear head;  // shares the embedding when tied
  bool tied = false;
};

namespace {

/// Codes stay codes on a CPU, for a step looks few rows up; everything else is held densely, and
/// where it lies unless it is the output matrix too.
Result<Linear> read_embedding(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                              const Compute& compute) {
  const std::string name = spec.embedding + ".weight";
  const auto found = checkpoint.weights().find(name);
  const bool coded = found != checkpoint.weights().end() && !found->second.quantization.none();
  if (coded && compute.device.is_cpu())
    return read_linear(checkpoint, "", {spec.embedding, spec.vocab, spec.embedding_width}, compute);
  LACUNA_TRY(at::Tensor table,
             read_tensor(checkpoint, name, {spec.vocab, spec.embedding_width}, compute));
  if (!spec.tied_embedding) return Linear::dense(std::move(table), {});
  LACUNA_TRY(std::vector<Linear> one, Linear::together({{std::move(table), {}}}, compute));
  return std::move(one.front());
}

}  // namespace

Result<Ends> Ends::load(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                        const Compute& compute) {
  auto state = std::make_shared<State>();
  const int64_t width = spec.embedding_width;
  LACUNA_TRY(state->embedding, read_embedding(checkpoint, spec, compute));
  if (spec.positions == io::Positions::kLearned) {
    state->position_offset = spec.position_offset;
    LACUNA_TRY(state->position_embedding,
               read_tensor(checkpoint, spec.position_embedding + ".weight",
                           {spec.max_positions + spec.position_offset, spec.hidden}, compute));
  }
  if (!spec.project_in.empty()) {
    LACUNA_TRY(state->project_in,
               read_linear(checkpoint, "", {spec.project_in, spec.hidden, width}, compute));
  }
  if (!spec.project_out.empty()) {
    LACUNA_TRY(state->project_out,
               read_linear(checkpoint, "", {spec.project_out, width, spec.hidden}, compute));
  }
  if (spec.final_norm) {
    LACUNA_TRY(state->final_norm, Norm::read(checkpoint, spec.final_norm_name, spec.norm,
                                             spec.norm_epsilon, spec.hidden, compute));
  }
  state->tied = spec.tied_embedding;
  if (state->tied) {
    state->head = state->embedding;
  } else {
    LACUNA_TRY(state->head,
               read_linear(checkpoint, "", {spec.lm_head, spec.vocab, width}, compute));
  }
  Ends ends;
  ends.state_ = std::move(state);
  return ends;
}

at::Tensor Ends::embed(const at::Tensor& ids, int64_t first) const {
  const State& s = *state_;
  at::Tensor hidden = s.embedding.rows(ids);
  if (s.project_in) hidden = s.project_in->forward(hidden);
  if (s.position_embedding.defined())
    hidden = hidden + s.position_embedding.narrow(0, first + s.position_offset, ids.size(1));
  return hidden;
}

at::Tensor Ends::logits(const at::Tensor& hidden) const {
  const State& s = *state_;
  at::Tensor x = s.final_norm ? s.final_norm->forward(hidden) : hidden;
  if (s.project_out) x = s.project_out->forward(x);
  return s.head.forward(x).to(at::kFloat);
}

const Linear& Ends::embedding() const { return state_->embedding; }
const at::Tensor& Ends::position_embedding() const { return state_->position_embedding; }
const Linear* Ends::project_in() const {
  return state_->project_in ? &*state_->project_in : nullptr;
}
const Linear* Ends::project_out() const {
  return state_->project_out ? &*state_->project_out : nullptr;
}
const Norm* Ends::final_norm() const { return state_->final_norm ? &*state_->final_norm : nullptr; }
const Linear& Ends::head() const { return state_->head; }

std::vector<const Linear*> Ends::linears() const {
  std::vector<const Linear*> all;
  for (const Linear* projection : {project_in(), project_out()})
    if (projection != nullptr) all.push_back(projection);
  all.push_back(&state_->head);
  return all;
}

size_t Ends::weight_bytes() const {
  const State& s = *state_;
  size_t bytes = s.embedding.weight_bytes();
  if (s.position_embedding.defined()) bytes += s.position_embedding.nbytes();
  for (const auto* linear : {&s.project_in, &s.project_out})
    if (*linear) bytes += (*linear)->weight_bytes();
  if (s.final_norm) bytes += s.final_norm->bytes();
  if (!s.tied) bytes += s.head.weight_bytes();
  return bytes;
}

}  // namespace lacuna::model

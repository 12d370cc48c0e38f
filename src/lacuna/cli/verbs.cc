#include "lacuna/cli/tool.h"

namespace lacuna::cli {

void add_inspect(Tool&);
void add_prune(Tool&);
void add_sweep(Tool&);
void add_verify(Tool&);
void add_eval(Tool&);
void add_generate(Tool&);
void add_convert(Tool&);
void add_diff(Tool&);
void add_apply(Tool&);
void add_tokenize(Tool&);
void add_synth(Tool&);
void add_report(Tool&);
void add_bench(Tool&);
void add_tune(Tool&);
void add_doctor(Tool&);

const std::vector<AddVerb>& verbs() {
  static const std::vector<AddVerb> all = {add_inspect, add_prune,    add_sweep,   add_verify,
                                           add_eval,    add_generate, add_convert, add_diff,
                                           add_apply,   add_tokenize, add_synth,   add_report,
                                           add_bench,   add_tune,     add_doctor};
  return all;
}

}  // namespace lacuna::cli

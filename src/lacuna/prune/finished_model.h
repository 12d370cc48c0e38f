// OUT: written from the journal, or finished before.
#pragma once

#include "lacuna/prune/journal.h"
#include "lacuna/prune/run.h"

namespace lacuna::prune {

/// Refuses a folder that can't be written to before the work, not after it.
Status probe_out(const Run& run);
/// Writes OUT and finishes the report. @param instead  weights by name, in place of the journal's
Status write_model(Run& run, const Journal& journal, const std::map<std::string, Tensor>& instead);
/// The report of what OUT holds, if that is finished and what this run would write: then the
/// journal goes. @errors kBadInput: it is another model, and is not to be replaced
Result<std::optional<PruneReport>> finished_before(Run& run, const Journal& journal,
                                                   bool overwrite);

}  // namespace lacuna::prune

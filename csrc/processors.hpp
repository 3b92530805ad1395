// How many processors the system leaves to this process.
#pragma once

#include <string>

namespace batchnorm {

// Those that the calling thread may run on, by its affinity and the set of its container; fewer where a control group
// has a quota of their time, rounded up. The files of the system are read under `root`.
int processors(const std::string& root = "");

}  // namespace batchnorm

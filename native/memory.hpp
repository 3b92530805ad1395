// Memory: what the kernels use themselves, and what they are given to write to.
#pragma once

#include <cstdint>

namespace batchnorm {

// Memory that a thread keeps from call to call: one piece for what spans the tasks of a call, one for a single task.
enum class Slot : int { call, task };
void* scratch(Slot slot, int64_t bytes);

// Tell the system that all of this memory will be written. Where it is new, and large, it then comes in huge pages, of
// which there are 512 times fewer to provide and to look up.
void will_write(void* data, int64_t bytes);

// Whether an array is so large that writing it past the caches is better, for it would not stay in them until it is read.
bool exceeds_caches(int64_t bytes);

}  // namespace batchnorm

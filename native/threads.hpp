// A small pool of threads, shared by all callers.
#pragma once

#include <cstdint>

namespace batchnorm {

// Run task(context, i) for every i in [0, tasks), on the calling thread and, if they are free, on those of the pool.
// Which thread runs which task is left open, so tasks must be independent. What one of them throws is thrown here, when
// all have ended.
void parallel(int64_t tasks, void (*task)(void*, int64_t), void* context);

int num_threads();
void set_num_threads(int threads);  // taken as the nearest of 1 to 1024

// Memory that a thread keeps from call to call: one piece for what spans the tasks of a call, one for a single task.
enum class Slot : int { call, task };
void* scratch(Slot slot, int64_t bytes);

}  // namespace batchnorm

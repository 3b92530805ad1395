// A small pool of threads, shared by all callers.
#pragma once

#include <cstdint>

namespace batchnorm {

constexpr int64_t ALONE = 1 << 15;  // values below which waking another thread takes longer than the work

// Run task(context, i) for every i in [0, tasks), on the calling thread and, if they are free, on those of the pool.
// Which thread runs which task is left open, so tasks must be independent. What one of them throws is thrown here, when
// all have ended.
void parallel(int64_t tasks, void (*task)(void*, int64_t), void* context);

// The same for a callable, in order on this thread alone where the work is too little to share.
template <class Task>
void run_tasks(int64_t tasks, bool alone, Task&& task) {
  if (alone)
    for (int64_t i = 0; i < tasks; i++) task(i);
  else
    parallel(tasks, [](void* context, int64_t i) { (*static_cast<Task*>(context))(i); }, &task);
}

int num_threads();                  // at first OMP_NUM_THREADS, or else as many as there are processors for us
void set_num_threads(int threads);  // taken as the nearest of 1 to 1024

// While one of these lives, the calling thread uses so many threads, of a team of OpenMP's in the place of the pool:
// that of a framework whose threads wait for work by spinning, and would take the processors from ours. `parallel` is
// GOMP_parallel, or null to keep to the pool.
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);
class Team {
 public:
  Team(OpenMP parallel, int threads);
  ~Team();
  Team(const Team&) = delete;
};

}  // namespace batchnorm

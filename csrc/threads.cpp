#include "threads.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "processors.hpp"

namespace batchnorm {
namespace {

constexpr int MOST = 1024;  // threads that are ever asked for

int within(int threads) { return threads < 1 ? 1 : threads > MOST ? MOST : threads; }

int default_threads() {
  if (const char* asked = std::getenv("OMP_NUM_THREADS")) {
    int threads = std::atoi(asked);  // of a list for nested levels, the first
    if (threads > 0) return within(threads);
  }
  return within(processors());
}

std::atomic<int> wanted{0};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// The team of the calling thread, if it has one, and how many threads it asks for, if any.
thread_local OpenMP team = nullptr;
thread_local int team_threads = 0;

struct Shared {
  int64_t tasks;
  void (*task)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
};

void drain_shared(void* data) {
  auto& shared = *static_cast<Shared*>(data);
  try {
    for (int64_t i; (i = shared.next.fetch_add(1)) < shared.tasks;) shared.task(shared.context, i);
  } catch (...) {  // none may leave a region of OpenMP
    std::lock_guard<std::mutex> lock(shared.mutex);
    if (!shared.failure) shared.failure = std::current_exception();
    shared.next.store(shared.tasks);
  }
}

class Pool {
  static constexpr int SPINS = 2000;  // tens of microseconds

 public:
  explicit Pool(int workers) {
    threads_.reserve(static_cast<size_t>(workers));
    try {
      for (int i = 0; i < workers; i++) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // no more threads are to be had, so those there are do it
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void run(int64_t tasks, void (*task)(void*, int64_t), void* context) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task;
      context_ = context;
      tasks_ = tasks;
      next_.store(0);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    drain(task, context, tasks);
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = nullptr;           // a worker that wakes only now has nothing to join
    if (joined_.load() > 0) {  // for its last task: being woken would take longer than most of those
      lock.unlock();
      for (int spin = 0; spin < SPINS && joined_.load() > 0; spin++) pause();
      lock.lock();
    }
    done_.wait(lock, [this] { return joined_.load() == 0; });
    if (std::exception_ptr failure = std::exchange(failure_, nullptr)) {
      lock.unlock();
      std::rethrow_exception(failure);
    }
  }

 private:
  void drain(void (*task)(void*, int64_t), void* context, int64_t tasks) {
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < tasks;) task(context, i);
    } catch (...) {  // for the caller, once no thread works for it any more
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      next_.store(tasks);
    }
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      // A call has several phases, so the next one is likely to come within microseconds.
      for (int spin = 0; spin < SPINS && generation_.load() == seen; spin++) pause();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      seen = generation_.load();
      if (stopping_) return;
      if (task_ == nullptr) continue;
      auto task = task_;
      auto context = context_;
      auto tasks = tasks_;
      joined_.fetch_add(1);
      lock.unlock();
      drain(task, context, tasks);
      lock.lock();
      if (joined_.fetch_sub(1) == 1) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> generation_{0};
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int> joined_{0};
  std::exception_ptr failure_;
  bool stopping_ = false;
};

// Held by the one caller that has the pool; others run their tasks themselves rather than wait.
std::mutex& pool_mutex() {
  static std::mutex* mutex = new std::mutex;
  return *mutex;
}
Pool* pool = nullptr;  // never destroyed at exit, when other threads may still compute
int pool_workers = 0;

void forget_pool_in_child() {  // a forked process has no threads but its own
  pool = nullptr;
  pool_workers = 0;
  new (&pool_mutex()) std::mutex;
}

}  // namespace

Team::Team(OpenMP parallel, int threads) {
  team = parallel;
  team_threads = within(threads);
}
Team::~Team() {
  team = nullptr;
  team_threads = 0;
}

int num_threads() {
  if (team_threads > 0) return team_threads;
  int threads = wanted.load(std::memory_order_relaxed);
  if (threads == 0) {
    threads = default_threads();
    int expected = 0;
    if (!wanted.compare_exchange_strong(expected, threads)) threads = expected;
  }
  return threads;
}

void set_num_threads(int threads) { wanted.store(within(threads), std::memory_order_relaxed); }

void parallel(int64_t tasks, void (*task)(void*, int64_t), void* context) {
  int threads = num_threads();
  if (tasks > 1 && threads > 1 && team != nullptr) {
    Shared shared;
    shared.tasks = tasks;
    shared.task = task;
    shared.context = context;
    team(drain_shared, &shared, static_cast<unsigned>(tasks < threads ? tasks : threads), 0);
    if (shared.failure) std::rethrow_exception(shared.failure);
    return;
  }
  if (tasks > 1 && threads > 1) {
    std::unique_lock<std::mutex> mine(pool_mutex(), std::try_to_lock);
    if (mine) {
      if (pool == nullptr || pool_workers != threads - 1) {
        static std::once_flag watched;
        std::call_once(watched, [] { pthread_atfork(nullptr, nullptr, forget_pool_in_child); });
        delete pool;
        pool = nullptr;
        pool_workers = threads - 1;
        pool = new Pool(pool_workers);
      }
      pool->run(tasks, task, context);
      return;
    }
  }
  for (int64_t i = 0; i < tasks; i++) task(context, i);
}

}  // namespace batchnorm

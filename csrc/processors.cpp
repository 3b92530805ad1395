#include "processors.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <thread>

#ifdef __linux__
#include <sched.h>

#include <vector>
#endif

namespace batchnorm {
namespace {

int allowed() {
#ifdef __linux__
  for (size_t sets = 1; sets <= 64; sets *= 2) {  // a system of more than 1,024 processors wants a longer set
    std::vector<cpu_set_t> set(sets);
    size_t bytes = sets * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, set.data()) == 0) return CPU_COUNT_S(bytes, set.data());
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

// The processors' worth of time that a control group has, of either version; infinite where it has no limit.
double quota_of(const std::string& folder) {
  long long quota, period;
  std::ifstream second(folder + "/cpu.max");
  if (!(second >> quota >> period)) {  // "max" is no number
    std::ifstream quota_us(folder + "/cpu.cfs_quota_us"), period_us(folder + "/cpu.cfs_period_us");
    if (!(quota_us >> quota && period_us >> period)) quota = -1;
  }
  if (quota <= 0 || period <= 0) return std::numeric_limits<double>::infinity();
  return static_cast<double>(quota) / static_cast<double>(period);
}

// The least of this process's groups and of those above them. Where a container sees its own group as the root, it is
// found there, whatever the path says.
double quota(const std::string& root) {
  double least = std::numeric_limits<double>::infinity();
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // hierarchy:controllers:path
    size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",", path = line.substr(second + 1);
    bool named = controllers != ",,";  // those of version 1
    if (named && controllers.find(",cpu,") == std::string::npos) continue;
    std::string mounted = root + "/sys/fs/cgroup" + (named ? "/cpu" : "");
    for (;;) {
      least = std::min(least, quota_of(mounted + path));
      size_t cut = path.rfind('/');
      if (cut == std::string::npos) break;
      path.resize(cut);
    }
  }
  return least;
}

}  // namespace

int processors(const std::string& root) {
  double time = std::ceil(quota(root));
  int count = allowed();
  return std::max(1, time < count ? static_cast<int>(time) : count);
}

}  // namespace batchnorm

// The kernels for XLA on CPUs, through its foreign function interface: batchnorm_forward and batchnorm_backward.
//
// No header of XLA, jaxlib or TensorFlow is needed to build this: the few structures that cross are declared here. They
// are the same in the versions 0.1 to 0.3 of the interface, which is jaxlib 0.4.38 to 0.10.2, and TensorFlow 2.21.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "boundary.hpp"
#include "kernels.hpp"
#include "threads.hpp"

// Every structure begins with its own size in bytes, set by whoever makes it, and a chain of extensions. A newer
// version may lengthen it at its end, so a size may be larger than ours, and never smaller.
namespace xla {

enum Stage : int32_t { EXECUTE = 3 };
enum DataType : int32_t { PRED = 1, S32 = 4, S64 = 5, F16 = 10, F32 = 11, F64 = 12, BF16 = 16 };
enum Kind : int32_t { BUFFER = 1, SCALAR = 3 };
enum Code : int32_t { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, INTERNAL = 13 };
enum Extended : int32_t { METADATA = 1 };

struct Error;    // owned by whoever receives it
struct Context;  // of one execution

struct Extension {
  size_t size;
  int32_t type;
  Extension* next;
};
struct Version {
  size_t size;
  Extension* extensions;
  int32_t major, minor;
};
struct Buffer {
  size_t size;
  Extension* extensions;
  int32_t type;
  void* data;
  int64_t rank;
  int64_t* dims;
};
struct Buffers {
  size_t size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  Buffer** items;
};
struct Text {  // without a null at its end
  const char* data;
  size_t length;
};
struct Scalar {
  int32_t type;
  void* value;
};
struct Attributes {
  size_t size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  Text** names;
  void** items;
};
struct ErrorArguments {
  size_t size;
  Extension* extensions;
  const char* message;
  int32_t code;
};
struct MessageArguments {
  size_t size;
  Extension* extensions;
  Error* error;
  const char* message;  // out: lives as long as the error
};
struct DestroyArguments {
  size_t size;
  Extension* extensions;
  Error* error;
};
struct CallFrame;
using Handler = Error*(CallFrame*);
struct RegisterArguments {
  size_t size;
  Extension* extensions;
  Text name, platform;
  Handler *instantiate, *prepare, *initialize, *execute;  // the last one is needed
  uint32_t traits;
};
struct Api {  // the beginning of XLA's table of functions
  size_t size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(ErrorArguments*);
  void (*get_message)(MessageArguments*);
  void (*destroy_error)(DestroyArguments*);
  Error* (*register_handler)(RegisterArguments*);
};
struct CallFrame {
  size_t size;
  Extension* extensions;
  const Api* api;
  Context* context;
  int32_t stage;
  Buffers arguments, results;
  Attributes attributes;
};
// At registration XLA calls a handler with this extension, and without arguments, to learn its version.
struct Metadata {
  size_t size;
  Version version;
  uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

constexpr int MAJOR = 0, OLDEST = 1, NEWEST = 3;  // the versions that were tried

static_assert(sizeof(CallFrame) == 168 && sizeof(Buffer) == 48 && sizeof(Version) == 24 && sizeof(Metadata) == 40);
static_assert(sizeof(RegisterArguments) == 88 && offsetof(Api, register_handler) == 72);

}  // namespace xla

namespace {

using namespace batchnorm;
using namespace xla;

constexpr int64_t APART = 1 << 17;  // values below which a call is not worth sharing out, if others can go beside it
constexpr int64_t MANY = 4;         // calls for each thread from which all threads end at about the same time

struct Failure {
  Code code;
  std::string message;
};
[[noreturn]] void refuse(const std::string& message) { throw Failure{INVALID_ARGUMENT, message}; }

Error* failure(const Api* api, Code code, const std::string& message) {
  std::string text = "batchnorm: " + message;
  ErrorArguments arguments{sizeof arguments, nullptr, text.c_str(), code};
  return api->create_error(&arguments);
}

// An older runtime takes only its own version, and sends no table of functions here; a newer one takes a range. So this
// says the runtime's own, as far as that is one that was tried.
bool tells_version(const CallFrame& frame) {
  for (Extension* e = frame.extensions; e != nullptr; e = e->next) {
    if (e->type != METADATA) continue;
    int minor = OLDEST;
    if (frame.api != nullptr && frame.api->version.major == MAJOR)
      minor = std::clamp(static_cast<int>(frame.api->version.minor), OLDEST, NEWEST);
    Metadata* metadata = reinterpret_cast<MetadataExtension*>(e)->metadata;
    metadata->version = {sizeof(Version), nullptr, MAJOR, minor};
    metadata->traits = 0;
    return true;
  }
  return false;
}

int64_t elements(const Buffer& buffer) {
  int64_t count = 1;
  for (int64_t axis = 0; axis < buffer.rank; axis++) count *= buffer.dims[axis];
  return count;
}

// What one call has sent, of which XLA checks nothing. The arrays hold `lead` calls one after the other.
//
// How x is seen are attributes, or else one argument more, six numbers, where whoever made the program did not know
// sizes. Such an x may be empty, with no virtual batches, either.
class Call {
 public:
  Call(const CallFrame& frame, int64_t arguments, int64_t results) : frame_(frame) {
    if (frame.size < sizeof(CallFrame) || frame.stage != EXECUTE) throw Failure{INTERNAL, "a call of an unknown kind"};
    bool told = frame.arguments.count == arguments + 1;
    check(frame.arguments, arguments + told);
    check(frame.results, results);
    const Buffer& x = *frame.arguments.items[0];
    switch (x.type) {
      case F32: type = Type::float32; break;
      case F64: type = Type::float64; break;
      case F16: type = Type::float16; break;
      case BF16: type = Type::bfloat16; break;
      default: refuse("x must be float32, float64, float16 or bfloat16");
    }
    int64_t size = elements(x);
    empty = told && size == 0;
    if (empty) return;
    if (told) {
      const Buffer& numbers = *frame.arguments.items[arguments];
      if (numbers.type != S64 || elements(numbers) != 6) refuse("a view must have 6 elements of type int64");
      const auto* at = static_cast<const int64_t*>(numbers.data);
      view = {at[0], at[1], at[2], at[3], at[4], at[5] != 0};
    } else {
      view = {integer("rows"), integer("groups"), integer("span"), integer("features"), integer("inner")};
      view.grouped_parameters = integer("grouped_parameters") != 0;
    }
    if (const char* wrong = fault(view)) refuse(wrong);
    if (view.rows == 0 || size < view.size() || size % view.size()) refuse("x must have the size of its view");
    lead = size / view.size();
    epsilon = number("epsilon");
  }

  void* values(const Buffers& from, int64_t i) const {
    const Buffer& buffer = *from.items[i];
    if (buffer.type != frame_.arguments.items[0]->type || elements(buffer) != lead * view.size())
      refuse("arrays must have the shape and type of x");
    return buffer.data;
  }
  // An array with a number of elements for each call, or with none, which stands for an absent one.
  Values numbers(const Buffers& from, int64_t i, int64_t count, bool optional = true) const {
    const Buffer& buffer = *from.items[i];
    bool doubles = type == Type::float64;
    if (buffer.type != (doubles ? F64 : F32)) refuse("statistics must be float32, or float64 if x is");
    int64_t received = elements(buffer);
    if (received == 0 && optional) return {};
    if (received != lead * count) refuse("a statistic must have one element for each feature");
    return {buffer.data, doubles};
  }

  // What positions weigh: booleans, or real numbers; with no elements all weigh 1.
  Weights weights(int64_t i) const {
    const Buffer& buffer = *frame_.arguments.items[i];
    int64_t received = elements(buffer);
    if (received == 0) return {};
    if (received != lead * view.positions()) refuse("weights must have one element for each position");
    switch (buffer.type) {
      case PRED: return {buffer.data, Weights::bytes};
      case F32: return {buffer.data, Weights::floats};
      case F64: return {buffer.data, Weights::doubles};
      default: refuse("weights must be booleans, float32 or float64");
    }
  }

  // Of an empty x all sums are 0.
  void zero() const {
    for (int64_t i = 1; i < frame_.results.count; i++) {
      const Buffer& buffer = *frame_.results.items[i];
      if (buffer.type != F32 && buffer.type != F64) refuse("statistics must be float32 or float64");
      size_t bytes = static_cast<size_t>(elements(buffer)) * (buffer.type == F64 ? 8 : 4);
      if (bytes > 0) std::memset(buffer.data, 0, bytes);
    }
  }

  const Buffers& arguments() const { return frame_.arguments; }
  const Buffers& results() const { return frame_.results; }

  Type type;
  bool empty;
  View view{};
  int64_t lead;
  double epsilon;

 private:
  static void check(const Buffers& buffers, int64_t count) {
    if (buffers.count != count) refuse("wrong number of arguments or results");
    for (int64_t i = 0; i < count; i++)
      if (buffers.kinds[i] != BUFFER) refuse("arguments and results must be arrays");
  }
  const Scalar& attribute(const char* name) const {
    const Attributes& from = frame_.attributes;
    size_t length = std::strlen(name);
    for (int64_t i = 0; i < from.count; i++)
      if (from.kinds[i] == SCALAR && from.names[i]->length == length && !std::memcmp(from.names[i]->data, name, length))
        return *static_cast<const Scalar*>(from.items[i]);
    refuse(std::string(name) + " is missing");
  }
  int64_t integer(const char* name) const {
    const Scalar& scalar = attribute(name);
    if (scalar.type == S64) return *static_cast<const int64_t*>(scalar.value);
    if (scalar.type == S32) return *static_cast<const int32_t*>(scalar.value);
    refuse(std::string(name) + " must be an integer");
  }
  double number(const char* name) const {
    const Scalar& scalar = attribute(name);
    if (scalar.type == F64) return *static_cast<const double*>(scalar.value);
    if (scalar.type == F32) return *static_cast<const float*>(scalar.value);
    refuse(std::string(name) + " must be a number");
  }

  const CallFrame& frame_;
};

// Several calls on whole batches are one, whose groups have parameters and weights of their own. So are calls on arrays
// that begin with a feature axis, unless these have weights, which the groups of each share.
void join(Call& call, const Weights& weights) {
  View& v = call.view;
  bool whole = v.groups == 1, begins = v.grouped_parameters && v.rows == v.groups * v.span;
  if (call.lead == 1 || !(whole || (begins && !weights))) return;
  v.span = v.group_rows();
  v.groups *= call.lead;
  v.rows *= call.lead;
  v.grouped_parameters = v.grouped_weights = true;
  call.lead = 1;
}

// Runs the calls that are left: several at once, each on one thread, where they are many or small; or else one after
// the other, each on all threads.
template <class One>
void each_call(const Call& call, One&& one) {
  if (call.lead == 1) return one(0);
  bool apart = call.lead >= MANY * num_threads() || call.view.size() < APART;
  run_tasks(call.lead, !apart || call.lead * call.view.size() < ALONE, [&](int64_t i) {
    if (!apart) return one(i);
    Team alone(nullptr, 1);
    one(i);
  });
}

Values at(const Values& values, int64_t i) { return values ? Values{values.at(i), values.doubles} : values; }
Weights at(Weights weights, int64_t i) {
  if (!weights) return weights;
  int64_t size = weights.kind == Weights::bytes ? 1 : weights.kind == Weights::floats ? 4 : 8;
  weights.data = static_cast<const char*>(weights.data) + i * size;
  return weights;
}
void* at(const void* data, const Call& call, int64_t i) {
  return static_cast<char*>(const_cast<void*>(data)) + i * call.view.bytes(call.type);
}

// x, weights, factor, offset, renorm_mean, renorm_stddev, limits[, view] -> y, mean, variance, rest, count, r, d
//
// The mean is mean + rest, for in one float it loses what gradients want; JAX has no double by default.
void forward(const CallFrame& frame) {
  Call call(frame, 7, 7);
  if (call.empty) return call.zero();
  int64_t parameters = call.view.parameters(), statistics = call.view.statistics();
  int64_t counts = call.view.counts(), positions = call.view.positions();
  const Buffers &in = call.arguments(), &out = call.results();
  Forward all{};
  all.type = call.type;
  all.epsilon = call.epsilon;
  all.x = call.values(in, 0);
  all.y = call.values(out, 0);
  all.weights = call.weights(1);
  all.factor = call.numbers(in, 2, parameters);
  all.offset = call.numbers(in, 3, parameters);
  all.renorm_mean = call.numbers(in, 4, parameters);
  all.renorm_stddev = call.numbers(in, 5, parameters);
  Values limits = call.numbers(in, 6, 3);
  Values mean = call.numbers(out, 1, statistics, false), rest = call.numbers(out, 3, statistics, false);
  std::vector<double> exact(static_cast<size_t>(call.lead * statistics));
  all.mean = {exact.data(), true};
  all.variance = call.numbers(out, 2, statistics, false);
  all.count = call.numbers(out, 4, counts, false);
  all.r = call.numbers(out, 5, parameters);
  all.d = call.numbers(out, 6, parameters);
  bool renorm = static_cast<bool>(all.renorm_mean);
  for (bool given : {static_cast<bool>(all.renorm_stddev), static_cast<bool>(limits), static_cast<bool>(all.r),
                     static_cast<bool>(all.d)})
    if (given != renorm) refuse("what renorm needs goes together");
  if (!all.weights) {  // of calls that become one, each has a count
    for (int64_t i = 0; i < call.lead * counts; i++)
      all.count.set(i, static_cast<double>(call.view.group_rows(i % counts) * call.view.inner));
    all.count = {};
  }
  bool same = true;
  for (int64_t i = 3; limits && i < 3 * call.lead; i++) same = same && limits.get(i) == limits.get(i % 3);
  if (same) join(call, all.weights);
  all.view = call.view;
  each_call(call, [&](int64_t i) {
    Forward p = all;
    p.x = at(all.x, call, i);
    p.y = at(all.y, call, i);
    for (Values Forward::* field :
         {&Forward::factor, &Forward::offset, &Forward::renorm_mean, &Forward::renorm_stddev, &Forward::r, &Forward::d})
      p.*field = at(all.*field, i * parameters);
    p.mean = at(all.mean, i * statistics);
    p.variance = at(all.variance, i * statistics);
    p.weights = at(all.weights, i * positions);
    p.count = at(all.count, i * counts);
    if (renorm) p.rmin = limits.get(3 * i), p.rmax = limits.get(3 * i + 1), p.dmax = limits.get(3 * i + 2);
    kernels().forward(p);
  });
  for (size_t i = 0; i < exact.size(); i++) {
    auto k = static_cast<int64_t>(i);
    mean.set(k, exact[i]);
    rest.set(k, exact[i] - mean.get(k));
  }
}

// x, dy, weights, mean, variance, rest, count, factor, r, d[, view] -> dx, dfactor, doffset
void backward(const CallFrame& frame) {
  Call call(frame, 10, 3);
  if (call.empty) return call.zero();
  int64_t parameters = call.view.parameters(), statistics = call.view.statistics();
  int64_t counts = call.view.counts(), positions = call.view.positions();
  const Buffers &in = call.arguments(), &out = call.results();
  Backward all{};
  all.type = call.type;
  all.epsilon = call.epsilon;
  all.x = call.values(in, 0);
  all.dy = call.values(in, 1);
  all.dx = call.values(out, 0);
  all.weights = call.weights(2);
  Values mean = call.numbers(in, 3, statistics, false), rest = call.numbers(in, 5, statistics, false);
  std::vector<double> exact(static_cast<size_t>(call.lead * statistics));
  for (size_t i = 0; i < exact.size(); i++) {
    auto k = static_cast<int64_t>(i);
    exact[i] = mean.get(k) + rest.get(k);
  }
  all.mean = {exact.data(), true};
  all.variance = call.numbers(in, 4, statistics, false);
  all.count = call.numbers(in, 6, counts, false);
  all.factor = call.numbers(in, 7, parameters);
  all.r = call.numbers(in, 8, parameters);
  all.d = call.numbers(in, 9, parameters);
  all.dfactor = call.numbers(out, 1, parameters);
  all.doffset = call.numbers(out, 2, parameters);
  if (static_cast<bool>(all.r) != static_cast<bool>(all.d)) refuse("r and d go together");
  join(call, all.weights);
  all.view = call.view;
  each_call(call, [&](int64_t i) {
    Backward p = all;
    p.x = at(all.x, call, i);
    p.dy = at(all.dy, call, i);
    p.dx = at(all.dx, call, i);
    for (Values Backward::* field :
         {&Backward::factor, &Backward::r, &Backward::d, &Backward::dfactor, &Backward::doffset})
      p.*field = at(all.*field, i * parameters);
    p.mean = at(all.mean, i * statistics);
    p.variance = at(all.variance, i * statistics);
    p.weights = at(all.weights, i * positions);
    p.count = at(all.count, i * counts);
    kernels().backward(p);
  });
}

// XLA is C here, so nothing that is thrown may pass.
Error* serve(CallFrame* frame, void (*operation)(const CallFrame&)) {
  if (tells_version(*frame)) return nullptr;
  try {
    operation(*frame);
    return nullptr;
  } catch (const Failure& wrong) {
    return failure(frame->api, wrong.code, wrong.message);
  } catch (const std::exception& error) {
    return failure(frame->api, RESOURCE_EXHAUSTED, error.what());
  }
}

// Give a handler to XLA; what it says against that, or nothing.
std::string refusal(const Api& api, const char* name, Handler* handler) {
  constexpr Text HOST{"Host", 4};
  RegisterArguments arguments{sizeof arguments, nullptr, {name, std::strlen(name)}, HOST, nullptr, nullptr, nullptr,
                              handler,          0};
  Error* error = api.register_handler(&arguments);
  if (error == nullptr) return {};
  MessageArguments said{sizeof said, nullptr, error, nullptr};
  api.get_message(&said);
  std::string message = said.message;
  DestroyArguments done{sizeof done, nullptr, error};
  api.destroy_error(&done);
  return message;
}

}  // namespace

extern "C" {
[[gnu::visibility("default")]] Error* batchnorm_forward(CallFrame* frame) { return serve(frame, forward); }
[[gnu::visibility("default")]] Error* batchnorm_backward(CallFrame* frame) { return serve(frame, backward); }
// Registers both with the XLA whose table of functions it is given, for TensorFlow, which has no other way from Python.
// What is wrong, or null.
[[gnu::visibility("default")]] const char* batchnorm_register(const Api* api) {
  static std::string wrong;
  if (api->version.major != MAJOR || api->size < offsetof(Api, register_handler) + sizeof api->register_handler)
    return "its foreign function interface is of an unknown version";
  wrong = refusal(*api, "batchnorm_forward", batchnorm_forward);
  if (wrong.empty()) wrong = refusal(*api, "batchnorm_backward", batchnorm_backward);
  return wrong.empty() ? nullptr : wrong.c_str();
}
// This library has a pool of its own, which follows the one number of the package through these.
[[gnu::visibility("default")]] int batchnorm_num_threads() { return batchnorm::num_threads(); }
[[gnu::visibility("default")]] void batchnorm_set_num_threads(int threads) { batchnorm::set_num_threads(threads); }
}

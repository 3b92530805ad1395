// The operations for TensorFlow, through its C API: BatchnormForward and BatchnormBackward, for the CPU.
//
// No header of TensorFlow is needed to build this. The few functions used are declared here and looked up when the
// library is loaded into a process that has TensorFlow.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>

#include "boundary.hpp"
#include "kernels.hpp"
#include "threads.hpp"

extern "C" {
struct TF_OpDefinitionBuilder;
struct TF_Status;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
struct TF_Tensor;
struct TF_ShapeInferenceContext;
struct TF_ShapeHandle;
}

namespace {

using namespace batchnorm;

enum DataType { FLOAT = 1, DOUBLE = 2, BOOL = 10, BFLOAT16 = 14, HALF = 19 };
constexpr int INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8;

void* resolved(const char* name) {
  static void* library = dlopen("libtensorflow_framework.so.2", RTLD_NOW | RTLD_NOLOAD);
  void* function = library ? dlsym(library, name) : nullptr;
  if (function == nullptr) std::fprintf(stderr, "batchnorm: this TensorFlow has no %s\n", name);
  return function;
}

#define TF_FUNCTION(result, name, ...) \
  result (*const name)(__VA_ARGS__) = reinterpret_cast<result (*)(__VA_ARGS__)>(resolved(#name));

TF_FUNCTION(TF_Status*, TF_NewStatus)
TF_FUNCTION(void, TF_DeleteStatus, TF_Status*)
TF_FUNCTION(void, TF_SetStatus, TF_Status*, int, const char*)
TF_FUNCTION(int, TF_GetCode, const TF_Status*)
TF_FUNCTION(const char*, TF_Message, const TF_Status*)
TF_FUNCTION(TF_OpDefinitionBuilder*, TF_NewOpDefinitionBuilder, const char*)
TF_FUNCTION(void, TF_OpDefinitionBuilderAddInput, TF_OpDefinitionBuilder*, const char*)
TF_FUNCTION(void, TF_OpDefinitionBuilderAddOutput, TF_OpDefinitionBuilder*, const char*)
TF_FUNCTION(void, TF_OpDefinitionBuilderAddAttr, TF_OpDefinitionBuilder*, const char*)
TF_FUNCTION(void, TF_OpDefinitionBuilderSetShapeInferenceFunction, TF_OpDefinitionBuilder*,
            void (*)(TF_ShapeInferenceContext*, TF_Status*))
TF_FUNCTION(void, TF_RegisterOpDefinition, TF_OpDefinitionBuilder*, TF_Status*)
TF_FUNCTION(TF_ShapeHandle*, TF_NewShapeHandle)
TF_FUNCTION(void, TF_DeleteShapeHandle, TF_ShapeHandle*)
TF_FUNCTION(void, TF_ShapeInferenceContextGetInput, TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*)
TF_FUNCTION(void, TF_ShapeInferenceContextSetOutput, TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*)
TF_FUNCTION(TF_KernelBuilder*, TF_NewKernelBuilder, const char*, const char*, void* (*)(TF_OpKernelConstruction*),
            void (*)(void*, TF_OpKernelContext*), void (*)(void*))
TF_FUNCTION(void, TF_KernelBuilder_TypeConstraint, TF_KernelBuilder*, const char*, int, TF_Status*)
TF_FUNCTION(void, TF_RegisterKernelBuilder, const char*, TF_KernelBuilder*, TF_Status*)
TF_FUNCTION(void, TF_OpKernelConstruction_GetAttrType, TF_OpKernelConstruction*, const char*, int*, TF_Status*)
TF_FUNCTION(void, TF_OpKernelConstruction_Failure, TF_OpKernelConstruction*, TF_Status*)
TF_FUNCTION(void, TF_OpKernelContext_Failure, TF_OpKernelContext*, TF_Status*)
TF_FUNCTION(void, TF_GetInput, TF_OpKernelContext*, int, TF_Tensor**, TF_Status*)
TF_FUNCTION(TF_Tensor*, TF_AllocateOutput, TF_OpKernelContext*, int, int, const int64_t*, int, size_t, TF_Status*)
TF_FUNCTION(TF_Tensor*, TF_ForwardInputOrAllocateOutput, TF_OpKernelContext*, const int*, int, int, const int64_t*, int,
            int*, TF_Status*)
TF_FUNCTION(void*, TF_TensorData, const TF_Tensor*)
TF_FUNCTION(int64_t, TF_TensorElementCount, const TF_Tensor*)
TF_FUNCTION(int, TF_NumDims, const TF_Tensor*)
TF_FUNCTION(int64_t, TF_Dim, const TF_Tensor*, int)
TF_FUNCTION(void, TF_DeleteTensor, TF_Tensor*)

struct Status {
  TF_Status* raw = TF_NewStatus();
  Status() = default;
  Status(const Status&) = delete;
  ~Status() { TF_DeleteStatus(raw); }
  bool ok() const { return TF_GetCode(raw) == 0; }
};

// Types of an operation of the graph: of x, of statistics, of weights.
struct Types {
  int x, statistics, weights;

  Type element() const {
    switch (x) {
      case DOUBLE: return Type::float64;
      case HALF: return Type::float16;
      case BFLOAT16: return Type::bfloat16;
      default: return Type::float32;
    }
  }
};

void* create(TF_OpKernelConstruction* construction) {
  Status status;
  auto* types = new Types;
  TF_OpKernelConstruction_GetAttrType(construction, "T", &types->x, status.raw);
  TF_OpKernelConstruction_GetAttrType(construction, "U", &types->statistics, status.raw);
  TF_OpKernelConstruction_GetAttrType(construction, "W", &types->weights, status.raw);
  if (!status.ok()) TF_OpKernelConstruction_Failure(construction, status.raw);
  return types;
}
void destroy(void* kernel) { delete static_cast<Types*>(kernel); }

// The tensors of one computation, freed at its end; the first thing that is wrong fails it.
class Computation {
 public:
  Computation(TF_OpKernelContext* context, const Types& types) : context_(context), types_(types) {}
  Computation(const Computation&) = delete;
  ~Computation() {
    for (int i = 0; i < count_; i++) TF_DeleteTensor(tensors_[i]);
    if (!status_.ok()) TF_OpKernelContext_Failure(context_, status_.raw);
  }

  bool ok() const { return status_.ok(); }
  void refuse(const std::string& message) {
    if (ok()) TF_SetStatus(status_.raw, INVALID_ARGUMENT, message.c_str());
  }

  // TensorFlow is C here, so nothing that is thrown may pass.
  template <class P>
  void run(void (*operation)(const P&), const P& p) {
    try {
      operation(p);
    } catch (const std::exception& error) {
      TF_SetStatus(status_.raw, RESOURCE_EXHAUSTED, error.what());
    }
  }

  // x, and how it is seen.
  const void* viewed(int i, int view_input) {
    TF_Tensor *x = take(i), *tensor = take(view_input);
    if (tensor == nullptr) return nullptr;
    rank_ = TF_NumDims(x);
    size_ = TF_TensorElementCount(x);
    if (rank_ > MOST) return refuse("x must have a rank of at most 24"), nullptr;
    for (int axis = 0; axis < rank_; axis++) shape_[axis] = TF_Dim(x, axis);
    if (TF_TensorElementCount(tensor) != 6) return refuse("view must have 6 elements"), nullptr;
    const auto* numbers = static_cast<const int64_t*>(TF_TensorData(tensor));
    view = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5] != 0};
    if (size_ == 0) {  // an empty batch has no virtual batches, either
      for (int k = 0; k < 5; k++)
        if (numbers[k] < 0) refuse("a view must have sizes of at least 0");
      if (!countable(view)) refuse("a view must have fewer than 2**57 values and statistics");
    } else if (const char* wrong = fault(view)) {
      refuse(wrong);
    }
    if (ok() && view.size() != size_) refuse("x must have the size of its view");
    return ok() ? TF_TensorData(x) : nullptr;
  }
  const void* upstream(int i) {
    TF_Tensor* tensor = take(i);
    if (tensor == nullptr) return nullptr;
    if (TF_TensorElementCount(tensor) != size_) refuse("dy must have the shape of x");
    return TF_TensorData(tensor);
  }
  // What positions weigh; with no elements all weigh 1.
  Weights weights(int i) {
    Values values = numbers(i, size_ == 0 ? 0 : view.positions(), "weights");
    Weights::Kind kind = types_.weights == BOOL     ? Weights::bytes
                         : types_.weights == DOUBLE ? Weights::doubles
                                                    : Weights::floats;
    return {values.data, kind};
  }

  // Means, variances or counts, double whatever the type: a float that holds a mean loses what the gradient wants.
  Values moments(int i, int64_t count, const char* name) { return {numbers(i, count, name, false).data, true}; }
  Values output_moments(int i) {
    int64_t shape[2] = {view.groups, view.features};
    return {allocate(i, DOUBLE, shape, 2, 8), true};
  }
  Values output_count(int i) {
    int64_t count = view.virtual_batches();
    return {allocate(i, DOUBLE, &count, 1, 8), true};
  }

  // An input with a number of elements, or with none, which stands for an absent one.
  Values numbers(int i, int64_t count, const char* name, bool optional = true) {
    TF_Tensor* tensor = take(i);
    if (tensor == nullptr) return {};
    int64_t received = TF_TensorElementCount(tensor);
    if (received == 0 && (optional || count == 0)) return {};
    if (received != count) {
      refuse(std::string(name) + " must have " + std::to_string(count) + " elements; received " +
             std::to_string(received));
      return {};
    }
    return {TF_TensorData(tensor), types_.statistics == DOUBLE};
  }

  void* output(int i) { return allocate(i, types_.x, shape_, rank_, size_of(types_.element())); }
  // The same, in the memory of an input of that size if nobody else needs it any more. `data` is where that input lies.
  void* output_over(int i, int candidate, const void** data) {
    if (!ok()) return nullptr;
    int forwarded = -1;
    TF_Tensor* tensor =
        TF_ForwardInputOrAllocateOutput(context_, &candidate, 1, i, shape_, rank_, &forwarded, status_.raw);
    if (!ok()) return nullptr;
    tensors_[count_++] = tensor;
    *data = forwarded == candidate ? TF_TensorData(tensor) : upstream(candidate);
    return TF_TensorData(tensor);
  }
  Values output_numbers(int i, int64_t count) {
    bool doubles = types_.statistics == DOUBLE;
    return {allocate(i, types_.statistics, &count, 1, doubles ? 8 : 4), doubles};
  }

  View view{};

 private:
  static constexpr int MOST = 24;

  TF_Tensor* take(int i) {
    if (!ok()) return nullptr;
    TF_Tensor* tensor = nullptr;
    TF_GetInput(context_, i, &tensor, status_.raw);
    if (!ok()) return nullptr;
    return tensors_[count_++] = tensor;
  }

  void* allocate(int i, int type, const int64_t* shape, int rank, int64_t element) {
    if (!ok()) return nullptr;
    int64_t elements = 1;
    for (int axis = 0; axis < rank; axis++) elements *= shape[axis];
    TF_Tensor* tensor =
        TF_AllocateOutput(context_, i, type, shape, rank, static_cast<size_t>(elements * element), status_.raw);
    if (!ok()) return nullptr;
    tensors_[count_++] = tensor;
    return TF_TensorData(tensor);
  }

  TF_OpKernelContext* context_;
  const Types& types_;
  Status status_;
  TF_Tensor* tensors_[MOST];
  int count_ = 0;
  int64_t shape_[MOST];
  int rank_ = 0;
  int64_t size_ = 0;
};

void zero(const Values& values, int64_t count) {
  for (int64_t i = 0; i < count; i++) values.set(i, 0);
}

// x, view, weights, factor, offset, renorm_mean, renorm_stddev, numbers -> y, mean, variance, count, r, d
void forward(void* kernel, TF_OpKernelContext* context) {
  const auto& types = *static_cast<Types*>(kernel);
  Computation c(context, types);
  Forward p{};
  p.type = types.element();
  p.x = c.viewed(0, 1);
  if (!c.ok()) return;
  int64_t parameters = c.view.parameters(), statistics = c.view.statistics();
  p.weights = c.weights(2);
  p.factor = c.numbers(3, parameters, "factor");
  p.offset = c.numbers(4, parameters, "offset");
  p.renorm_mean = c.numbers(5, parameters, "renorm_mean");
  p.renorm_stddev = c.numbers(6, parameters, "renorm_stddev");
  Values numbers = c.numbers(7, 4, "numbers", false);
  p.y = c.output(0);
  p.mean = c.output_moments(1);
  p.variance = c.output_moments(2);
  p.count = c.output_count(3);
  int64_t corrected = p.renorm_mean ? parameters : 0;
  p.r = c.output_numbers(4, corrected);
  p.d = c.output_numbers(5, corrected);
  if (!c.ok()) return;
  if (static_cast<bool>(p.renorm_mean) != static_cast<bool>(p.renorm_stddev))
    return c.refuse("renorm_mean and renorm_stddev go together");
  if (c.view.size() == 0) {  // an empty batch: nothing to compute, and no moments
    zero(p.mean, statistics);
    zero(p.variance, statistics);
    zero(p.count, c.view.virtual_batches());
    zero(p.r, corrected);
    zero(p.d, corrected);
    return;
  }
  p.view = c.view;
  p.epsilon = numbers.get(0);
  p.rmin = numbers.get(1);
  p.rmax = numbers.get(2);
  p.dmax = numbers.get(3);
  c.run(kernels().forward, p);
}

// x, dy, view, weights, numbers, mean, variance, count, factor, r, d -> dx, dfactor, doffset
void backward(void* kernel, TF_OpKernelContext* context) {
  const auto& types = *static_cast<Types*>(kernel);
  Computation c(context, types);
  Backward p{};
  p.type = types.element();
  p.x = c.viewed(0, 2);
  p.dx = c.output_over(0, 1, &p.dy);
  if (!c.ok()) return;
  int64_t parameters = c.view.parameters(), statistics = c.view.statistics();
  p.weights = c.weights(3);
  Values numbers = c.numbers(4, 4, "numbers", false);
  p.mean = c.moments(5, statistics, "mean");
  p.variance = c.moments(6, statistics, "variance");
  p.count = c.moments(7, c.view.virtual_batches(), "count");
  p.factor = c.numbers(8, parameters, "factor");
  p.r = c.numbers(9, parameters, "r");
  p.d = c.numbers(10, parameters, "d");
  p.dfactor = c.output_numbers(1, parameters);
  p.doffset = c.output_numbers(2, parameters);
  if (!c.ok()) return;
  if (static_cast<bool>(p.r) != static_cast<bool>(p.d)) return c.refuse("r and d go together");
  if (c.view.size() == 0) {
    zero(p.dfactor, parameters);
    zero(p.doffset, parameters);
    return;
  }
  p.view = c.view;
  p.epsilon = numbers.get(0);
  c.run(kernels().backward, p);
}

// The first output has the shape of the first input; of the others only the rank depends on nothing else, and whoever
// builds the operation knows their shapes.
void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeHandle* shape = TF_NewShapeHandle();
  TF_ShapeInferenceContextGetInput(context, 0, shape, status);
  if (TF_GetCode(status) == 0) TF_ShapeInferenceContextSetOutput(context, 0, shape, status);
  TF_DeleteShapeHandle(shape);
}

template <size_t I, size_t O>
void define(const char* name, const char* const (&inputs)[I], const char* const (&outputs)[O],
            void (*compute)(void*, TF_OpKernelContext*)) {
  Status status;
  TF_OpDefinitionBuilder* builder = TF_NewOpDefinitionBuilder(name);
  for (const char* input : inputs) TF_OpDefinitionBuilderAddInput(builder, input);
  for (const char* output : outputs) TF_OpDefinitionBuilderAddOutput(builder, output);
  // The last two only say what it is, for derivatives.
  for (const char* attribute : {"T: {half, bfloat16, float, double}", "U: {float, double}", "W: {bool, float, double}",
                                "axes: list(int)", "virtual_batch_size: int >= 0"})
    TF_OpDefinitionBuilderAddAttr(builder, attribute);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(builder, infer_shapes);
  TF_RegisterOpDefinition(builder, status.raw);
  if (status.ok())
    TF_RegisterKernelBuilder(name, TF_NewKernelBuilder(name, "CPU", create, compute, destroy), status.raw);
  if (!status.ok()) std::fprintf(stderr, "batchnorm: %s: %s\n", name, TF_Message(status.raw));
}

struct Registration {
  Registration() {
    if (TF_NewStatus == nullptr || TF_AllocateOutput == nullptr || TF_ForwardInputOrAllocateOutput == nullptr ||
        TF_ShapeInferenceContextSetOutput == nullptr)
      return;
    define("BatchnormForward",
           {"x: T", "view: int64", "weights: W", "factor: U", "offset: U", "renorm_mean: U", "renorm_stddev: U",
            "numbers: U"},
           {"y: T", "mean: double", "variance: double", "count: double", "r: U", "d: U"}, forward);
    define("BatchnormBackward",
           {"x: T", "dy: T", "view: int64", "weights: W", "numbers: U", "mean: double", "variance: double",
            "count: double", "factor: U", "r: U", "d: U"},
           {"dx: T", "dfactor: U", "doffset: U"}, backward);
  }
} registration;

}  // namespace

// This library has a pool of its own, which follows the one number of the package through these.
extern "C" {
[[gnu::visibility("default")]] int batchnorm_num_threads() { return batchnorm::num_threads(); }
[[gnu::visibility("default")]] void batchnorm_set_num_threads(int threads) { batchnorm::set_num_threads(threads); }
}

// The operations for one instruction set. CMake compiles this file once for each, with BATCHNORM_ISA its name.
#include "driver.hpp"

namespace batchnorm {
namespace {

template <class E, class Operation>
void by_layout(const Operation& p) {
  if (Columns<E>::serves(p.view)) return run<Columns<E>>(p);
  if (p.view.inner > 1) return run<ChannelsFirst<E>>(p);
  if (p.view.groups == 1) return run<WholeBatch<E>>(p);
  run<Groups<E>>(p);
}

template <class Operation>
void by_type(const Operation& p) {
  switch (p.type) {
    case Type::float32: return by_layout<Float32>(p);
    case Type::float64: return by_layout<Float64>(p);
    case Type::float16: return by_layout<Float16>(p);
    case Type::bfloat16: return by_layout<BFloat16>(p);
  }
}

}  // namespace

// Only the preprocessor makes names and text of a name.
#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)

extern const Kernels NAME(BATCHNORM_ISA);
const Kernels NAME(BATCHNORM_ISA) = {
    TEXT(BATCHNORM_ISA), by_type<Forward>,      by_type<Backward>,        by_type<Moments>,
    by_type<Normalize>,  by_type<GradientSums>, by_type<GradientCombine>,
};

}  // namespace batchnorm

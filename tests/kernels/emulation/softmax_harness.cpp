// The softmax kernels, launched in the emulator as csrc/cuda/ensemble_softmax_kernel.cu does.
// clang-format off
#include "cuda_emulation.h"  // before what it emulates
// clang-format on

#include <algorithm>
#include <vector>

#include "cuda/softmax_launch.h"
#include "harness.h"

using namespace fastfreeze;

namespace {

struct EmulatedLaunch {
  int64_t most_blocks;
  uint64_t seed;

  template <typename Job>
  void operator()(void (*kernel)(Job), int64_t blocks, int threads, const Job& job) const {
    emulation::emulate(std::min(blocks, most_blocks), 1, threads, seed, kernel, job);
  }
};

template <typename T>
SoftmaxJob<T> job_of(const emulation::Arguments& args) {
  SoftmaxJob<T> job{};
  job.num_members = static_cast<int32_t>(args.count<int64_t>(1));
  for (int m = 0; m < job.num_members; ++m) {
    job.data[m] = reinterpret_cast<const void*>(args.buffer<const int64_t>(0)[m]);
    job.stride[m] = args.buffer<const int64_t>(1)[m];
    job.weight[m] = static_cast<T>(args.buffer<const double>(2)[m]);
  }
  job.out = args.buffer<void>(3);
  job.before = args.buffer<const T>(4);
  job.labels = args.buffer<const int64_t>(5);
  job.max_probability = args.buffer<T>(6);
  job.argmax = args.buffer<int64_t>(7);
  job.entropy = args.buffer<T>(8);
  job.mutual_information = args.buffer<T>(9);
  job.nll = args.buffer<T>(10);
  job.entropy_sum = args.buffer<T>(11);
  job.out_is_sum = args.integer(2) != 0;
  job.rows = args.integer(3);
  job.classes = args.integer(4);
  job.inverse_temperature = static_cast<T>(args.real(6));
  return job;
}

}  // namespace

// buffers: addresses, row strides and weights of the members, then what SoftmaxJob points to, then
// the members. scalars: dtype, mode, out_is_sum, rows, classes, most blocks, 1 / temperature.
EMULATED(softmax) {
  emulation::with_type(args.integer(0), [&](auto zero) {
    using In = decltype(zero);
    auto job = job_of<SoftmaxMath<In>>(args);
    job.splits = softmax_splits<In>(job);
    std::vector<unsigned char> workspace(workspace_bytes(job), 0xff);  // NaN
    if (job.splits > 0) set_workspace(job, workspace.data());
    launch_softmax<In>(static_cast<SoftmaxMode>(args.integer(1)), job,
                       EmulatedLaunch{args.integer(5), args.seed});
  });
}

// The host's side of the softmax operators on a CUDA device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "cuda/launch.h"
#include "cuda/softmax_launch.h"
#include "softmax_arguments.h"

namespace fastfreeze {
namespace {

// The members, and pointers of any dtype to what SoftmaxJob wants; null for what is not wanted.
struct Request {
  SoftmaxMode mode;
  const std::vector<Tensor>& members;
  std::vector<double> weights;
  double inverse_temperature;
  void* out;
  bool out_is_sum = false;
  const void* before = nullptr;
  const int64_t* labels = nullptr;
  void* max_probability = nullptr;
  int64_t* argmax = nullptr;
  void* entropy = nullptr;
  void* mutual_information = nullptr;
  void* nll = nullptr;
  void* entropy_sum = nullptr;
};

struct StreamLaunch {
  cudaStream_t stream;

  template <typename Job>
  void operator()(void (*kernel)(Job), int64_t blocks, int threads, const Job& job) const {
    constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();
    const auto grid = static_cast<unsigned>(std::min(blocks, kMostBlocks));
    kernel<<<grid, threads, 0, stream>>>(job);
    check_launch("a softmax kernel");
  }
};

template <typename In>
void run(const Request& request) {
  using T = SoftmaxMath<In>;
  const Tensor& first = request.members[0];
  const DeviceGuard guard(first.get_device_index());
  SoftmaxJob<T> job{};
  std::vector<Tensor> kept;  // until the launches; the allocator orders what follows on the stream
  job.num_members = static_cast<int32_t>(request.members.size());
  for (int32_t m = 0; m < job.num_members; ++m) {
    const Rows rows = rows_of(request.members[m], kept);
    job.data[m] = rows.data, job.stride[m] = rows.stride;
    job.weight[m] = static_cast<T>(request.weights[m]);
  }
  job.out = request.out, job.out_is_sum = request.out_is_sum;
  job.before = static_cast<const T*>(request.before);
  job.labels = request.labels, job.argmax = request.argmax;
  job.max_probability = static_cast<T*>(request.max_probability);
  job.entropy = static_cast<T*>(request.entropy);
  job.mutual_information = static_cast<T*>(request.mutual_information);
  job.nll = static_cast<T*>(request.nll);
  job.entropy_sum = static_cast<T*>(request.entropy_sum);
  job.inverse_temperature = static_cast<T>(request.inverse_temperature);
  job.classes = num_classes(first);
  job.rows = first.numel() / job.classes;
  job.splits = softmax_splits<In>(job);
  if (job.rows == 0) return;
  if (job.splits > 0) {
    const std::vector<int64_t> size = {workspace_bytes(job)};
    kept.push_back(torch::stable::new_empty(first, size, ScalarType::Byte));
    set_workspace(job, kept.back().mutable_data_ptr());
  }
  launch_softmax<In>(request.mode, job, StreamLaunch{current_stream(first.get_device_index())});
}

void run(const Request& request) {
  const size_t members = request.members.size();
  STD_TORCH_CHECK(members <= kMaxMembers, "the CUDA kernels take at most ", kMaxMembers,
                  " members, got ", members);
  switch (request.members[0].scalar_type()) {
    case ScalarType::Float:
      return run<float>(request);
    case ScalarType::Double:
      return run<double>(request);
    case ScalarType::Half:
      return run<__half>(request);
    default:
      return run<__nv_bfloat16>(request);
  }
}

Tensor ensemble_softmax(std::vector<Tensor> members, std::optional<std::vector<double>> weights,
                        double temperature, bool log) {
  check_members(members);
  const SoftmaxMode mode = log ? SoftmaxMode::log : SoftmaxMode::sum;
  Request request{mode, members, checked_weights(weights, members.size()),
                  checked_inverse(temperature)};
  Tensor out = torch::stable::new_empty(members[0], members[0].sizes());
  request.out = out.mutable_data_ptr();
  run(request);
  return out;
}

Statistics ensemble_statistics(std::vector<Tensor> members,
                               std::optional<std::vector<double>> weights, double temperature,
                               std::optional<Tensor> labels) {
  check_members(members);
  Request request{SoftmaxMode::statistics, members, checked_weights(weights, members.size()),
                  checked_inverse(temperature)};
  if (labels.has_value()) {
    check_labels(*labels, members[0]);
    labels = torch::stable::contiguous(*labels);
    request.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  Statistics results = new_statistics(members[0], labels.has_value());
  auto& [probabilities, max_probability, argmax, entropy, mutual_information, nll] = results;
  request.out = probabilities.mutable_data_ptr();
  request.max_probability = max_probability.mutable_data_ptr();
  request.argmax = static_cast<int64_t*>(argmax.mutable_data_ptr());
  request.entropy = entropy.mutable_data_ptr();
  request.mutual_information = mutual_information.mutable_data_ptr();
  request.nll = labels.has_value() ? nll.mutable_data_ptr() : nullptr;
  run(request);
  return results;
}

void softmax_add(Tensor result, std::optional<Tensor> entropy, std::optional<Tensor> total,
                 Tensor logits, double weight, double temperature) {
  check_addition(result, entropy, total, logits);
  const SoftmaxMode mode = entropy.has_value() ? SoftmaxMode::statistics : SoftmaxMode::sum;
  const std::vector<Tensor> members = {logits};
  Request request{mode, members, {weight}, checked_inverse(temperature)};
  request.out = result.mutable_data_ptr();
  request.out_is_sum = true;
  request.before = total.has_value() ? total->const_data_ptr() : nullptr;
  request.entropy_sum = entropy.has_value() ? entropy->mutable_data_ptr() : nullptr;
  run(request);
}

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CUDA, m) {
  m.impl("ensemble_softmax", TORCH_BOX(&fastfreeze::ensemble_softmax));
  m.impl("ensemble_statistics", TORCH_BOX(&fastfreeze::ensemble_statistics));
  m.impl("softmax_add", TORCH_BOX(&fastfreeze::softmax_add));
}

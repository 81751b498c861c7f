// Softmax over the last dimension, summed over any number of members, in one parallel region.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "softmax_arguments.h"

namespace fastfreeze {
namespace {

constexpr int64_t kNarrow = 16;           // classes up to which a vector is as many rows
constexpr int64_t kBlock = 2048;          // classes; logits and exponentials fit in the L1 cache
constexpr int64_t kGroup = 16;            // rows in work at a time, of up to as many elements:
constexpr int64_t kGroupElements = 8192;  // 32 KB of fp32
constexpr int64_t kElementsPerThread =
    16384;  // below this a second thread costs more than it saves

enum class Mode { mean, log, statistics, sum, sum_and_entropy };

// The weighted mean over members of softmax(z / temperature), its logarithm, or it with statistics;
// or a sum: out = before + it. All but the members are contiguous. Those that a mode has no use for
// are null.
struct SoftmaxJob {
  Mode mode;
  std::vector<Rows> members;
  std::vector<double> weights;
  std::vector<double> log_weights;
  double inverse_temperature;
  ScalarType dtype;  // of the members and the mean; the others are fp32, or fp64 with fp64 members
  int64_t classes;
  void* out;
  const void* before = nullptr;  // null for zeros
  void* entropy = nullptr;       // of the mean; or of the member, added to what is there
  void* max_probability = nullptr;
  void* mutual_information = nullptr;
  void* nll = nullptr;
  int64_t* argmax = nullptr;
  const int64_t* labels = nullptr;
};

template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  ~AlignedArray() { ::operator delete(data_, kAlignment); }
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

#define FASTFREEZE_LOOPS "cpu/ensemble_softmax_loops.h"
#include "cpu/each_isa.h"

using RowsFn = void (*)(const SoftmaxJob&, int64_t, int64_t);

RowsFn rows_for(Isa isa) { return FASTFREEZE_OF_ISA(isa, softmax_rows); }

void run(SoftmaxJob& job, const std::vector<Tensor>& members) {
  std::vector<Tensor> copies;
  for (const Tensor& member : members) job.members.push_back(rows_of(member, copies));
  for (const double weight : job.weights) job.log_weights.push_back(std::log(weight));
  job.dtype = members[0].scalar_type();
  job.classes = num_classes(members[0]);
  const int64_t rows = members[0].numel() / job.classes;
  const int64_t work = static_cast<int64_t>(members.size()) * job.classes;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / work);
  const RowsFn softmax_rows = rows_for(current_isa());
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { softmax_rows(job, begin, end); });
}

Tensor ensemble_softmax(std::vector<Tensor> members, std::optional<std::vector<double>> weights,
                        double temperature, bool log) {
  check_members(members);
  Tensor out = torch::stable::new_empty(members[0], members[0].sizes());
  SoftmaxJob job;
  job.mode = log ? Mode::log : Mode::mean;
  job.weights = checked_weights(weights, members.size());
  job.inverse_temperature = checked_inverse(temperature);
  job.out = out.mutable_data_ptr();
  run(job, members);
  return out;
}

Statistics ensemble_statistics(std::vector<Tensor> members,
                               std::optional<std::vector<double>> weights, double temperature,
                               std::optional<Tensor> labels) {
  check_members(members);
  if (labels.has_value()) {
    check_labels(*labels, members[0]);
    labels = torch::stable::contiguous(*labels);
  }
  Statistics out = new_statistics(members[0], labels.has_value());
  const auto& [probabilities, max_probability, argmax, entropy, mutual_information, nll] = out;
  SoftmaxJob job;
  job.mode = Mode::statistics;
  job.weights = checked_weights(weights, members.size());
  job.inverse_temperature = checked_inverse(temperature);
  job.out = probabilities.mutable_data_ptr();
  job.max_probability = max_probability.mutable_data_ptr();
  job.argmax = argmax.mutable_data_ptr<int64_t>();
  job.entropy = entropy.mutable_data_ptr();
  job.mutual_information = mutual_information.mutable_data_ptr();
  job.nll = nll.mutable_data_ptr();
  job.labels = labels.has_value() ? labels->const_data_ptr<int64_t>() : nullptr;
  run(job, members);
  return out;
}

void softmax_add(Tensor result, std::optional<Tensor> entropy, std::optional<Tensor> total,
                 Tensor logits, double weight, double temperature) {
  check_addition(result, entropy, total, logits);
  SoftmaxJob job;
  job.mode = entropy.has_value() ? Mode::sum_and_entropy : Mode::sum;
  job.weights = {weight};
  job.inverse_temperature = checked_inverse(temperature);
  job.out = result.mutable_data_ptr();
  job.before = total.has_value() ? total->const_data_ptr() : nullptr;
  job.entropy = entropy.has_value() ? entropy->mutable_data_ptr() : nullptr;
  run(job, {logits});
}

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CPU, m) {
  m.impl("ensemble_softmax", TORCH_BOX(&fastfreeze::ensemble_softmax));
  m.impl("ensemble_statistics", TORCH_BOX(&fastfreeze::ensemble_statistics));
  m.impl("softmax_add", TORCH_BOX(&fastfreeze::softmax_add));
}

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

#include "checks.h"
#include "cpu/isa.h"

namespace fastfreeze {
namespace {

constexpr int64_t kNarrow = 16;           // classes up to which a vector is as many rows
constexpr int64_t kBlock = 2048;          // classes; logits and exponentials fit in the L1 cache
constexpr int64_t kGroup = 16;            // rows in work at a time, of up to as many elements:
constexpr int64_t kGroupElements = 8192;  // 32 KB of fp32
constexpr int64_t kElementsPerThread =
    16384;  // below this a second thread costs more than it saves

// A member's rows: unit stride within, `stride` elements from one to the next.
struct Rows {
  const void* data;
  int64_t stride;
};

// out = before + share * the sum over members of their softmax. before and out are contiguous.
struct SoftmaxJob {
  std::vector<Rows> members;
  ScalarType dtype;
  ScalarType out_dtype;  // dtype, or fp32
  int64_t classes;
  double share;
  const void* before;  // fp32, or fp64 with fp64 members; null for zeros
  void* out;
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

namespace baseline {
#define FASTFREEZE_ISA_LEVEL 0
#include "cpu/ensemble_softmax_loops.h"
#undef FASTFREEZE_ISA_LEVEL
}  // namespace baseline

#if FASTFREEZE_X86
FASTFREEZE_AVX2_BEGIN
namespace avx2 {
#define FASTFREEZE_ISA_LEVEL 1
#include "cpu/ensemble_softmax_loops.h"
#undef FASTFREEZE_ISA_LEVEL
}  // namespace avx2
FASTFREEZE_TARGET_END

FASTFREEZE_AVX512_BEGIN
namespace avx512 {
#define FASTFREEZE_ISA_LEVEL 2
#include "cpu/ensemble_softmax_loops.h"
#undef FASTFREEZE_ISA_LEVEL
}  // namespace avx512
FASTFREEZE_TARGET_END
#endif

using RowsFn = void (*)(const SoftmaxJob&, int64_t, int64_t);

RowsFn rows_for(Isa isa) {
#if FASTFREEZE_X86
  if (isa == Isa::avx512) return avx512::softmax_rows;
  if (isa == Isa::avx2) return avx2::softmax_rows;
#endif
  return baseline::softmax_rows;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  return std::ranges::equal(a.sizes(), b.sizes());
}

void check_logits(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) >= 1, name, " must have a class dimension");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  name, " must be float16, bfloat16, float32 or float64");
}

void check_sum(const Tensor& t, const Tensor& logits, const char* name) {
  const ScalarType dtype =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(same_shape(t, logits), name, " must have the shape of logits");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype_name(dtype));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// The distance between rows if the tensor's rows have unit stride and are evenly spaced, else -1.
int64_t row_stride(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t last = t.dim() - 1;
  if (sizes[last] > 1 && strides[last] != 1) return -1;
  int64_t stride = sizes[last];
  int64_t outer = -1;  // the stride that continues the dimensions seen so far
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (outer < 0) stride = strides[d];
    if (outer >= 0 && strides[d] != outer) return -1;
    outer = strides[d] * sizes[d];
  }
  return stride;
}

// Copies a tensor that has no such rows; `copies` keeps it.
Rows rows_of(const Tensor& t, std::vector<Tensor>& copies) {
  const int64_t stride = row_stride(t);
  if (stride >= 0) return {t.const_data_ptr(), stride};
  copies.push_back(torch::stable::contiguous(t));
  return {copies.back().const_data_ptr(), t.size(t.dim() - 1)};
}

// before: contiguous, or none. out: contiguous, of the members' shape.
void sum_softmax(const std::vector<Tensor>& members, double share, const Tensor* before,
                 Tensor& out) {
  const Tensor& first = members[0];
  std::vector<Tensor> copies;
  SoftmaxJob job;
  for (const Tensor& member : members) job.members.push_back(rows_of(member, copies));
  job.dtype = first.scalar_type();
  job.out_dtype = out.scalar_type();
  job.classes = first.size(first.dim() - 1);
  job.share = share;
  job.before = before == nullptr ? nullptr : before->const_data_ptr();
  job.out = out.mutable_data_ptr();
  const int64_t rows = out.numel() / job.classes;
  const int64_t work = static_cast<int64_t>(members.size()) * job.classes;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / work);
  const RowsFn softmax_rows = rows_for(current_isa());
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { softmax_rows(job, begin, end); });
}

// The mean over members of softmax(member), rounded once to their dtype. An empty list does not get
// here: it has no device to dispatch on.
Tensor ensemble_softmax(std::vector<Tensor> members) {
  const Tensor& first = members[0];
  check_logits(first, "members");
  for (const Tensor& member : members) {
    STD_TORCH_CHECK(same_shape(member, first) && member.scalar_type() == first.scalar_type(),
                    "members must have one shape and one dtype");
  }
  Tensor out = torch::stable::new_empty(first, first.sizes());
  sum_softmax(members, 1.0 / static_cast<double>(members.size()), nullptr, out);
  return out;
}

// result = total + softmax(logits), or softmax(logits) without a total. result and total are not
// the same tensor; both have the shape of logits, are fp32 (fp64 for fp64 logits), and contiguous.
void softmax_add(Tensor result, std::optional<Tensor> total, Tensor logits) {
  check_logits(logits, "logits");
  check_sum(result, logits, "result");
  if (total.has_value()) check_sum(*total, logits, "total");
  sum_softmax({logits}, 1.0, total.has_value() ? &*total : nullptr, result);
}

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CPU, m) {
  m.impl("ensemble_softmax", TORCH_BOX(&fastfreeze::ensemble_softmax));
  m.impl("softmax_add", TORCH_BOX(&fastfreeze::softmax_add));
}

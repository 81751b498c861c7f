// Arguments and results of the softmax operators (schemas in fastfreeze/kernels/library.py), for
// the host code of every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace fastfreeze {

// The probabilities, their maximum, argmax, entropy, mutual information, NLL.
using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A member's rows: unit stride within, `stride` elements from one to the next.
struct Rows {
  const void* data;
  int64_t stride;
};

inline int64_t num_classes(const Tensor& logits) { return logits.size(logits.dim() - 1); }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return std::ranges::equal(a.sizes(), b.sizes());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Whether t has a place for each row of logits.
inline bool has_shape_of_rows(const Tensor& t, const Tensor& logits) {
  const auto rows = logits.sizes().slice(0, logits.dim() - 1);
  return std::ranges::equal(t.sizes(), rows);
}

inline void check_logits(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() >= 1 && num_classes(t) >= 1, name, " must have a class dimension");
  check_floating(t, name);
}

// An empty list does not get here: it has no device to dispatch on.
inline void check_members(const std::vector<Tensor>& members) {
  const Tensor& first = members[0];
  check_logits(first, "members");
  for (const Tensor& member : members) {
    STD_TORCH_CHECK(same_shape(member, first) && member.scalar_type() == first.scalar_type() &&
                        same_device(member, first),
                    "members must have one shape, one dtype and one device");
  }
}

// What a row, or with `whole` a class, of the logits has a sum in.
inline void check_sum(const Tensor& t, const Tensor& logits, const char* name, bool whole = true) {
  STD_TORCH_CHECK(whole ? same_shape(t, logits) : has_shape_of_rows(t, logits), name,
                  " must have the shape of ", whole ? "logits" : "logits' rows");
  STD_TORCH_CHECK(t.scalar_type() == sum_dtype(logits), name, " must be ",
                  dtype_name(sum_dtype(logits)));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(same_device(t, logits), name, " must be on the device of logits");
}

inline void check_addition(const Tensor& result, const std::optional<Tensor>& entropy,
                           const std::optional<Tensor>& total, const Tensor& logits) {
  check_logits(logits, "logits");
  check_sum(result, logits, "result");
  if (total.has_value()) check_sum(*total, logits, "total");
  if (entropy.has_value()) check_sum(*entropy, logits, "entropy", false);
}

inline void check_labels(const Tensor& labels, const Tensor& logits) {
  STD_TORCH_CHECK(has_shape_of_rows(labels, logits), "labels must have the shape of members' rows");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  STD_TORCH_CHECK(same_device(labels, logits), "labels must be on the members' device");
}

// Beyond these bounds fp32 could not hold the temperature or its inverse.
inline double checked_inverse(double temperature) {
  STD_TORCH_CHECK(temperature >= 1e-30 && temperature <= 1e30,
                  "temperature must be from 1e-30 to 1e30, got ", temperature);
  return 1.0 / temperature;
}

// One for each member: those given, or 1/M each.
inline std::vector<double> checked_weights(const std::optional<std::vector<double>>& weights,
                                           size_t num_members) {
  if (!weights.has_value()) {
    return std::vector<double>(num_members, 1.0 / static_cast<double>(num_members));
  }
  STD_TORCH_CHECK(weights->size() == num_members, "weights must be one for each of ", num_members,
                  " members, got ", weights->size());
  return *weights;
}

// The distance between rows if the tensor's rows have unit stride and are evenly spaced, else -1.
inline int64_t row_stride(const Tensor& t) {
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
inline Rows rows_of(const Tensor& t, std::vector<Tensor>& copies) {
  const int64_t stride = row_stride(t);
  if (stride >= 0) return {t.const_data_ptr(), stride};
  copies.push_back(torch::stable::contiguous(t));
  return {copies.back().const_data_ptr(), num_classes(t)};
}

// Memory for the statistics of logits like `first`.
inline Statistics new_statistics(const Tensor& first, bool with_nll) {
  using torch::stable::new_empty;
  const auto rows = first.sizes().slice(0, first.dim() - 1);
  const std::vector<int64_t> none = {0};
  const ScalarType dtype = sum_dtype(first);
  return {new_empty(first, first.sizes()),
          new_empty(first, rows, dtype),
          new_empty(first, rows, ScalarType::Long),
          new_empty(first, rows, dtype),
          new_empty(first, rows, dtype),
          with_nll ? new_empty(first, rows, dtype) : new_empty(first, none, dtype)};
}

}  // namespace fastfreeze

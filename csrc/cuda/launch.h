// What every launch needs from the host, through the stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace fastfreeze {

using torch::stable::accelerator::DeviceGuard;

// The stream that torch's own kernels would run on.
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  // torch's own macro for this has another name in each of its versions.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch tells no stream of CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "launch of ", kernel, ": ", cudaGetErrorString(error));
}

}  // namespace fastfreeze

// A driver without a device: enough of libcuda.so.1 for Triton to load kernels and launch them.
// Kernels do not run; `on_launch` is told of each.
#include <cuda.h>
#include <string.h>

int modules_loaded = 0;
void (*on_launch)(const CUlaunchConfig*, CUfunction, void** parameters) = 0;

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  if (on_launch) on_launch(config, function, parameters);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)(size_t)++modules_loaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {  // of an H100
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = 227 * 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;  // memory of the host stands for the device's
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_IMAGE ? "not a cubin" : "an error of the stub driver";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

// What Triton's C code names and these tests do not reach: it must be there for that to load.
CUresult unused(void) { return CUDA_ERROR_NOT_SUPPORTED; }
#define UNUSED(name) __asm__(".globl " #name "\n.set " #name ", unused\n")
UNUSED(cuCtxGetDevice);
UNUSED(cuCtxGetLimit);
UNUSED(cuCtxSetCurrent);
UNUSED(cuCtxSetLimit);
UNUSED(cuDeviceGet);
UNUSED(cuDevicePrimaryCtxRetain);
UNUSED(cuDriverGetVersion);
UNUSED(cuFuncSetAttribute);
UNUSED(cuFuncSetCacheConfig);
UNUSED(cuLaunchKernel);
UNUSED(cuStreamIsCapturing);

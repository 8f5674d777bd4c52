// Programmatic dependent launch (sm_90 and later): a kernel may start while the one before it runs.
#ifndef ESPARSE_FFI_CUDA_DEPENDENT_LAUNCH_H_
#define ESPARSE_FFI_CUDA_DEPENDENT_LAUNCH_H_

namespace esparse::cuda {

// Every block waits for the kernel before before it reads what may come from there, and before it
// writes anything. A kernel that requests nothing early waits before everything, and lets the next
// one start only then, so that a next one may always request its weights early: whatever came
// before both has ended. The second launch of a prefill product is the exception: it reads x and
// writes its own tiles of y while the first one runs, which has seen the kernel before it end and
// let it start only then, and waits for the first one before it ends; it lets nobody start before
// that.
__device__ __forceinline__ void LetNextStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void WaitForPrevious() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_DEPENDENT_LAUNCH_H_

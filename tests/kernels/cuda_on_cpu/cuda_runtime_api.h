// CUDA C++ on the CPU, for tests: as much of the language as csrc/ uses, with g++ alone.
//
// The threads of a block are fibers that take turns and change only at __syncthreads and in
// shuffles; blocks run one after the other. A barrier that is missing shows: a thread then runs on
// before the next ones have begun.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(most_threads)

using std::min;

struct dim3 {
  uint32_t x;
  explicit dim3(uint32_t x = 1) : x(x) {}
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;

inline dim3 threadIdx(0), blockIdx(0);

namespace cuda_on_cpu {

inline constexpr size_t kStackBytes = 64 * 1024;
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  bool done;
};
inline std::vector<Fiber> fibers;
inline std::vector<float> shuffled;
inline ucontext_t scheduler;
inline void (*body)();  // calls the kernel that runs, with its arguments
inline int num_launches = 0;

inline void wait_for_the_others() {
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void run_fiber() {
  body();
  fibers[threadIdx.x].done = true;
}

inline void run_block(uint32_t num_threads) {
  while (fibers.size() < num_threads) fibers.emplace_back();
  shuffled.assign(num_threads, 0.f);
  for (uint32_t i = 0; i < num_threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (uint32_t i = 0; i < num_threads; ++i) {
      if (fibers[i].done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
      running |= !fibers[i].done;
    }
  }
}

template <typename... Arguments>
struct Launched {
  static inline void (*kernel)(Arguments...);
  static inline std::tuple<Arguments...> arguments;
  static void call() { std::apply(kernel, arguments); }
};

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_for_the_others(); }

inline float __shfl_xor_sync(uint32_t, float value, int lane) {
  cuda_on_cpu::shuffled[threadIdx.x] = value;
  cuda_on_cpu::wait_for_the_others();
  const float other = cuda_on_cpu::shuffled[threadIdx.x ^ lane];
  cuda_on_cpu::wait_for_the_others();
  return other;
}

template <typename T>
T __ldg(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) return T{NAN};  // a fault on a GPU
  return *pointer;
}

template <typename... Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments...), dim3 grid, dim3 block, void** pointers,
                             size_t, cudaStream_t) {
  using Launched = cuda_on_cpu::Launched<Arguments...>;
  Launched::kernel = kernel;
  Launched::arguments = [&]<size_t... I>(std::index_sequence<I...>) {
    return std::tuple<Arguments...>(*static_cast<Arguments*>(pointers[I])...);
  }(std::index_sequence_for<Arguments...>());
  cuda_on_cpu::body = Launched::call;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) cuda_on_cpu::run_block(block.x);
  ++cuda_on_cpu::num_launches;
  return cudaSuccess;
}

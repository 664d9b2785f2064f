/* A pretended H100: CUDA's runtime and driver as far as PyTorch and Triton call them.
 *
 * Memory is the host's, 80 GiB at most, of which only what is copied becomes real. Copies of less
 * than 64 MiB are made. Kernels do nothing, and say so where their grid could not be launched.
 * Streams and events are always done; a stream that is being captured must not be waited for. What
 * a host would wait for is counted: synchronizations, and copies from or to pageable memory.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <cuda.h>
#include <cuda_runtime_api.h>

typedef cudaError_t err;
typedef enum cudaMemcpyKind direction;
#define OK return 0

static const size_t CAPACITY = 80UL << 30, COPIED = 64UL << 20, CLEARED = 1UL << 20;
static long launches, triton_launches;

long pretended_launches(void) { return launches; }
long pretended_triton_launches(void) { return triton_launches; }

/* Of what would make the host wait: streams, events, the device, and copies. */
enum { STREAM, EVENT, DEVICE, COPY };
static void (*on_wait)(int kind);

void pretended_on_wait(void (*call)(int kind)) { on_wait = call; }

static void count_wait(int kind) {
  if (on_wait) on_wait(kind);
}

static enum cudaStreamCaptureStatus capturing;

static err wait_for(int kind, const char *what) {
  count_wait(kind);
  if (!capturing) OK;
  fprintf(stderr, "pretended GPU: %s while a stream is captured\n", what);
  return cudaErrorStreamCaptureUnsupported;
}

/* ------------------------------------------------------------------------------- memory */

static struct { char *at; size_t size; int kind; } ranges[65536];
static int num_ranges;
static size_t in_use;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *take(size_t size, int kind) {
  void *at = NULL;
  int device = kind == cudaMemoryTypeDevice, i = 0;
  size = size ? (size + 4095) & ~4095UL : 4096;
  pthread_mutex_lock(&lock);
  while (i < num_ranges && ranges[i].at) i++;
  if (i < 65536 && !(device && in_use + size > CAPACITY)) {
    at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) at = NULL;
  }
  if (at) {
    if (i == num_ranges) num_ranges++;
    ranges[i].at = at, ranges[i].size = size, ranges[i].kind = kind;
    if (device) in_use += size;
  }
  pthread_mutex_unlock(&lock);
  return at;
}

static void drop(void *at, int unmap) {
  pthread_mutex_lock(&lock);
  for (int i = 0; at && i < num_ranges; i++) {
    if (ranges[i].at != at) continue;
    if (unmap) munmap(at, ranges[i].size);
    if (ranges[i].kind == cudaMemoryTypeDevice) in_use -= ranges[i].size;
    ranges[i].at = NULL;
    break;
  }
  pthread_mutex_unlock(&lock);
}

/* The caller's own memory, from now on as good as pinned. */
static err pin(void *at, size_t size) {
  err result = cudaErrorMemoryAllocation;
  int i = 0;
  pthread_mutex_lock(&lock);
  while (i < num_ranges && ranges[i].at) i++;
  if (i < 65536) {
    if (i == num_ranges) num_ranges++;
    ranges[i].at = at, ranges[i].size = size, ranges[i].kind = cudaMemoryTypeHost;
    result = cudaSuccess;
  }
  pthread_mutex_unlock(&lock);
  return result;
}

static int kind_of(const void *pointer) {
  const char *at = pointer;
  for (int i = 0; i < num_ranges; i++)
    if (ranges[i].at && at >= ranges[i].at && at < ranges[i].at + ranges[i].size)
      return ranges[i].kind;
  return cudaMemoryTypeUnregistered;
}

static err copy(void *to, const void *from, size_t size) {
  if (size < COPIED) memmove(to, from, size);
  OK;
}

/* The host waits where one end is pageable; between two such ends no device takes part. */
static err copy_async(void *to, const void *from, size_t size) {
  int pageable = kind_of(to) == cudaMemoryTypeUnregistered;
  if (pageable != (kind_of(from) == cudaMemoryTypeUnregistered)) count_wait(COPY);
  return copy(to, from, size);
}

/* The host waits where one end is the host's, pinned or not. */
static err copy_now(void *to, const void *from, size_t size) {
  int of_host = kind_of(to) != cudaMemoryTypeDevice;
  if (of_host || kind_of(from) != cudaMemoryTypeDevice) count_wait(COPY);
  return copy(to, from, size);
}

static err fill(void *at, int value, size_t size) {
  if (size < CLEARED) memset(at, value, size);
  OK;
}

err cudaMalloc(void **at, size_t size) {
  *at = take(size, cudaMemoryTypeDevice);
  return *at ? cudaSuccess : cudaErrorMemoryAllocation;
}
err cudaHostAlloc(void **at, size_t size, unsigned flags) {
  *at = take(size, cudaMemoryTypeHost);
  return *at ? cudaSuccess : cudaErrorMemoryAllocation;
}
err cudaMallocAsync(void **at, size_t size, cudaStream_t s) { return cudaMalloc(at, size); }
err cudaMallocHost(void **at, size_t size) { return cudaHostAlloc(at, size, 0); }
err cudaFree(void *at) { drop(at, 1); OK; }
err cudaFreeAsync(void *at, cudaStream_t s) { drop(at, 1); OK; }
err cudaFreeHost(void *at) { drop(at, 1); OK; }
err cudaHostRegister(void *at, size_t size, unsigned flags) { return pin(at, size); }
err cudaHostUnregister(void *at) { drop(at, 0); OK; }
err cudaMemcpy(void *to, const void *from, size_t n, direction d) { return copy_now(to, from, n); }
err cudaMemcpyAsync(void *to, const void *from, size_t n, direction d, cudaStream_t s) { return copy_async(to, from, n); }
err cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, cudaStream_t s) { return copy(to, from, n); }
err cudaMemcpyToSymbol(const void *to, const void *from, size_t n, size_t offset, direction d) { OK; }
err cudaMemset(void *at, int value, size_t size) { return fill(at, value, size); }
err cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t s) { return fill(at, value, size); }
err cudaMemGetInfo(size_t *free, size_t *total) { *total = CAPACITY, *free = CAPACITY - in_use; OK; }
err cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *at) {
  memset(of, 0, sizeof *of);
  of->type = kind_of(at);
  of->devicePointer = of->hostPointer = (void *)at;
  OK;
}
err cudaGetSymbolAddress(void **at, const void *symbol) { static char area[65536]; *at = area; OK; }
err cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int d) { *pool = (void *)1; OK; }
err cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) { OK; }
err cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) { OK; }
err cudaMemPoolSetAccess(cudaMemPool_t p, const struct cudaMemAccessDesc *d, size_t n) { OK; }
err cudaMemPoolTrimTo(cudaMemPool_t p, size_t n) { OK; }

/* ------------------------------------------------------------------------------- device */

static int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 0x7fffffff;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 228 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 227 << 10;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    default: return 0;
  }
}

err cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "pretended H100");
  p->major = 9, p->totalGlobalMem = CAPACITY, p->multiProcessorCount = 132, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32, p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10, p->l2CacheSize = 50 << 20, p->memoryBusWidth = 5120;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  OK;
}
err cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int d) { *value = attribute(which); OK; }
err cudaGetDeviceCount(int *n) { *n = 1; OK; }
err cudaGetDevice(int *d) { *d = 0; OK; }
err cudaSetDevice(int d) { return d ? cudaErrorInvalidDevice : cudaSuccess; }
err cudaGetLastError(void) { OK; }
err cudaPeekAtLastError(void) { OK; }
const char *cudaGetErrorString(err e) { return e ? "pretended error" : "no error"; }
const char *cudaGetErrorName(err e) { return e ? "pretended" : "cudaSuccess"; }
err cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; OK; }
err cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; OK; }
err cudaDeviceSynchronize(void) { return wait_for(DEVICE, "cudaDeviceSynchronize"); }
err cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; OK; }
err cudaDeviceEnablePeerAccess(int a, unsigned flags) { OK; }
err cudaDeviceGetPCIBusId(char *text, int size, int d) { snprintf(text, size, "0000:01:00.0"); OK; }
err cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0, *most = -5; OK; }
err cudaProfilerStart(void) { OK; }
err cudaProfilerStop(void) { OK; }

/* -------------------------------------------------------------- streams, events, graphs */

static unsigned long long num_captures;

err cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { *s = malloc(8); OK; }
err cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { *s = malloc(8); OK; }
err cudaStreamCreate(cudaStream_t *s) { *s = malloc(8); OK; }
err cudaStreamDestroy(cudaStream_t s) { OK; }
err cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; OK; }
err cudaStreamSynchronize(cudaStream_t s) { return wait_for(STREAM, "cudaStreamSynchronize"); }
err cudaStreamQuery(cudaStream_t s) { OK; }
err cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { OK; }
err cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void *with, unsigned flags) { call(s, 0, with); OK; }
err cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void *with) { call(with); OK; }
err cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) { *status = capturing; OK; }
err cudaStreamGetCaptureInfo(
    cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *num_nodes) {
  *status = capturing;
  if (id) *id = num_captures;
  if (graph) *graph = (void *)8;
  if (nodes) *nodes = NULL;
  if (num_nodes) *num_nodes = 0;
  OK;
}
err cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  capturing = cudaStreamCaptureStatusActive;
  num_captures++;
  OK;
}
err cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  capturing = cudaStreamCaptureStatusNone;
  *graph = malloc(8);
  OK;
}
err cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { OK; }
err cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t graph, unsigned long long flags) { *x = malloc(8); OK; }
err cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) { OK; }
err cudaGraphDestroy(cudaGraph_t graph) { OK; }
err cudaGraphExecDestroy(cudaGraphExec_t x) { OK; }
err cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) { *n = 1; OK; }

err cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = calloc(1, sizeof(struct timespec)); OK; }
err cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
err cudaEventDestroy(cudaEvent_t e) { OK; }
err cudaEventQuery(cudaEvent_t e) { OK; }
err cudaEventSynchronize(cudaEvent_t e) { return wait_for(EVENT, "cudaEventSynchronize"); }
err cudaEventRecord(cudaEvent_t e, cudaStream_t s) { clock_gettime(CLOCK_MONOTONIC, (struct timespec *)e); OK; }
err cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
err cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
  struct timespec *a = (struct timespec *)begin, *b = (struct timespec *)end;
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) * 1e-6;
  OK;
}

/* ------------------------------------------------------------------------------ kernels */

static int impossible(unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned shared) {
  int bad = !gx || !gy || !gz || gy > 65535 || gz > 65535 || !threads || threads > 1024 || shared > 227 << 10;
  if (bad)
    fprintf(stderr, "pretended GPU: a grid of %u x %u x %u, %u threads, %u bytes\n", gx, gy, gz, threads, shared);
  return bad;
}

static err launch(dim3 grid, dim3 block, size_t shared) {
  launches++;
  return impossible(grid.x, grid.y, grid.z, block.x * block.y * block.z, shared) ? cudaErrorInvalidConfiguration : cudaSuccess;
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configured;

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void **h, const char *f, char *d, const char *n, int l, void *a, void *b, void *c, void *e, int *g) {}
void __cudaRegisterVar(void **h, char *v, char *d, const char *n, int e, size_t s, int c, int g) {}
err __cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (void *)f; OK; }
err __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t shared, cudaStream_t s) { return launch(g, b, shared); }
err cudaLaunchKernel(const void *k, dim3 g, dim3 b, void **a, size_t shared, cudaStream_t s) { return launch(g, b, shared); }
err cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launch(c->gridDim, c->blockDim, c->dynamicSmemBytes); }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  configured.grid = grid, configured.block = block, configured.shared = shared, configured.stream = stream;
  return 0;
}
err __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared;
  *(void **)stream = configured.stream;
  OK;
}
err cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
  OK;
}
err cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int value) { OK; }
err cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned x) { *n = 4; OK; }

/* --------------------------------------------------------------- the driver, for Triton */

CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *v) { *v = CUDA_VERSION; OK; }
CUresult cuDeviceGetCount(int *n) { *n = 1; OK; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; OK; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice d) { *value = attribute((int)which); OK; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0, *active = 1; OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (void *)16; OK; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (void *)16; OK; }
CUresult cuCtxSetCurrent(CUcontext c) { OK; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; OK; }
CUresult cuCtxSynchronize(void) { count_wait(DEVICE); OK; }
CUresult cuCtxGetLimit(size_t *value, CUlimit which) { *value = 0; OK; }
CUresult cuCtxSetLimit(CUlimit which, size_t value) { OK; }
CUresult cuGetErrorString(CUresult e, const char **text) { *text = "pretended"; OK; }
CUresult cuGetErrorName(CUresult e, const char **text) { *text = "pretended"; OK; }
CUresult cuModuleLoad(CUmodule *m, const char *file) { *m = (void *)24; OK; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (void *)24; OK; }
CUresult cuModuleUnload(CUmodule m) { OK; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (void *)strdup(name); OK; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  OK;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) { OK; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { OK; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **a, void **x) {
  triton_launches++;
  unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  return impossible(c->gridDimX, c->gridDimY, c->gridDimZ, threads, c->sharedMemBytes) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuLaunchKernel(
    CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, CUstream s, void **a, void **x) {
  triton_launches++;
  return impossible(gx, gy, gz, bx * by * bz, shared) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr at) {
  if (kind_of((void *)at) == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = at;
  OK;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; OK; }
CUresult cuGetProcAddress(const char *name, void **f, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *found) {
  *f = dlsym(RTLD_DEFAULT, name);
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
err cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (found) *found = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  OK;
}

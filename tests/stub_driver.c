/* A CUDA driver for tests: no device, no memory, only a record of what it was asked. Built by tests/stub.py into a shared
 * library that is opened in libcuda's place. Settings and the record are plain exported variables. */
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
enum { LAUNCHES = 64, PARAMS = 256, DEVICES = 2 };

typedef struct {
  unsigned long long function, context, stream;
  unsigned grid[3], block[3], smem;
  int overlap; /* 1 where it came through cuLaunchKernelEx with programmatic stream serialisation */
  unsigned char params[PARAMS];
} Launch;

EXPORT int stub_version = 12080, stub_init = 0, stub_load = 0, stub_launch = 0, stub_fail_at = -1;
EXPORT int stub_major[DEVICES] = {9, 9}, stub_minor[DEVICES] = {0, 0}, stub_shared = 232448, stub_static = 0;
EXPORT int stub_params = 0; /* how many bytes of a launch's parameters to keep */
EXPORT Launch stub_launches[LAUNCHES];
EXPORT int stub_launched = 0, stub_loaded = 0, stub_allowed = 0, stub_pushed = 0, stub_popped = 0, stub_relaxed = 0;
EXPORT unsigned long long stub_load_context = 0;
EXPORT char stub_image[16]; /* the first bytes of the last image */

static __thread void* current = 0;
static __thread void* stack[16];
static __thread int depth = 0;
static __thread int mode = 0;

EXPORT int cuInit(unsigned flags) { return flags ? 1 : stub_init; }
EXPORT int cuDriverGetVersion(int* v) { *v = stub_version; return 0; }
EXPORT int cuDeviceGet(int* d, int i) { *d = i + 40; return i < 0 || i >= DEVICES ? 101 : 0; } /* handle is not the index */
EXPORT int cuDeviceGetAttribute(int* v, int a, int d) {
  d -= 40;
  if (d < 0 || d >= DEVICES) return 101;
  if (a == 75) *v = stub_major[d];
  else if (a == 76) *v = stub_minor[d];
  else if (a == 16) *v = 132; /* multiprocessors */
  else if (a == 97) *v = stub_shared;
  else return 1;
  return 0;
}
EXPORT int cuDeviceGetCount(int* n) { *n = DEVICES; return 0; }
EXPORT int cuDeviceTotalMem_v2(unsigned long long* n, int d) { *n = 24ULL << 30; return d < 40; }
EXPORT int cuDeviceGetName(char* s, int n, int d) { strncpy(s, d == 40 ? "Stub A" : "Stub B", n); return 0; }
EXPORT int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)(unsigned long long)(0xC000 + d - 40); return 0; }
EXPORT int cuCtxGetCurrent(void** c) { *c = current; return 0; }
EXPORT int cuCtxPushCurrent_v2(void* c) {
  if (!c || depth == 16) return 201;
  stack[depth++] = current;
  current = c;
  __sync_fetch_and_add(&stub_pushed, 1);
  return 0;
}
EXPORT int cuCtxPopCurrent_v2(void** c) {
  if (!depth) return 201;
  *c = current;
  current = stack[--depth];
  __sync_fetch_and_add(&stub_popped, 1);
  return 0;
}
EXPORT void stub_set_current(void* c) { current = c; }
EXPORT int cuThreadExchangeStreamCaptureMode(int* m) {
  int old = mode;
  mode = *m;
  *m = old;
  return 0;
}
EXPORT int cuModuleLoadDataEx(void** m, const char* image, unsigned n, int* options, void** values) {
  for (unsigned i = 0; i < n; ++i)
    if (options[i] == 5 && stub_load) strcpy((char*)values[i], "stub: no");
  if (stub_load) return stub_load;
  memcpy(stub_image, image, sizeof stub_image);
  stub_load_context = (unsigned long long)current;
  stub_relaxed += mode == 2;
  *m = (void*)(unsigned long long)(0xA000 + 0x100 * ++stub_loaded);
  return 0;
}
EXPORT int cuModuleGetFunction(void** f, void* m, const char* name) {
  if (strstr(name, "absent")) return 500;
  unsigned sum = 0; /* another handle for each name and module */
  for (; *name; ++name) sum = sum * 7 + *name;
  *f = (void*)((unsigned long long)m << 32 | sum);
  return 0;
}
EXPORT int cuFuncGetAttribute(int* v, int a, void* f) { (void)f; *v = stub_static; return a == 1 ? 0 : 1; }
EXPORT int cuFuncSetAttribute(void* f, int a, int v) { (void)f; stub_allowed = v; return a == 8 ? 0 : 1; }
EXPORT int cuGetErrorName(int e, const char** s) { *s = e == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_STUB"; return 0; }
EXPORT int cuGetErrorString(int e, const char** s) { (void)e; *s = "as the stub was told"; return 0; }

static int record(void* f, const unsigned* grid, const unsigned* block, unsigned smem, void* stream, void** params, int overlap) {
  int at = __sync_fetch_and_add(&stub_launched, 1);
  if (stub_launch && (stub_fail_at < 0 || stub_fail_at == at)) return stub_launch;
  Launch* l = &stub_launches[at % LAUNCHES];
  l->function = (unsigned long long)f;
  l->context = (unsigned long long)current;
  l->stream = (unsigned long long)stream;
  memcpy(l->grid, grid, sizeof l->grid);
  memcpy(l->block, block, sizeof l->block);
  l->smem = smem;
  l->overlap = overlap;
  memcpy(l->params, params[0], stub_params);
  return 0;
}
EXPORT int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned smem,
                          void* stream, void** params, void** extra) {
  unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return extra ? 1 : record(f, grid, block, smem, stream, params, 0);
}
/* Offsets are those of cuda.h, written down independently of both launchers. */
EXPORT int cuLaunchKernelEx(const char* config, void* f, void** params, void** extra) {
  unsigned words[7], count;
  void *stream, *attributes;
  int id, value;
  memcpy(words, config, 28);
  memcpy(&stream, config + 32, 8);
  memcpy(&attributes, config + 40, 8);
  memcpy(&count, config + 48, 4);
  if (extra || count != 1) return 1;
  memcpy(&id, attributes, 4);
  memcpy(&value, (char*)attributes + 8, 4);
  return record(f, words, words + 3, words[6], stream, params, id == 6 && value == 1);
}
EXPORT int nvmlInit_v2(void) { return 0; }
EXPORT int nvmlSystemGetDriverVersion(char* s, unsigned n) { strncpy(s, "571.23", n); return 0; }

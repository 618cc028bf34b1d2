// sageattention_launcher: hands a plan's launches to the CUDA driver in one call from Python.
//
// The driver library is opened at run time, so nothing of CUDA is needed to build this and one binary serves every driver.
// It only launches: images are found, verified and loaded by sageattention/driver.py. The interface, and what the fields of a
// launch mean, is written down in sageattention/launcher.py.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace py = pybind11;

namespace {

// Declarations after cuda.h, of which only these are used.
using Result = int;       // CUresult, 0 is success
struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  int pad;
  int value;  // the member of a 64-byte union
  char rest[60];
};
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, value) == 8, "CUlaunchAttribute");
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3];
  unsigned block[3];
  unsigned smem;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32, "CUlaunchConfig");
constexpr int kProgrammaticStreamSerialization = 6;  // CUlaunchAttributeID

struct Driver {
  Result (*ctx_get)(void**) = nullptr;
  Result (*ctx_push)(void*) = nullptr;
  Result (*ctx_pop)(void**) = nullptr;
  Result (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) = nullptr;
  Result (*launch_ex)(const LaunchConfig*, void*, void**, void**) = nullptr;
};
Driver driver;

void* open_library(const std::string& path) {  // UTF-8
#ifdef _WIN32
  std::wstring wide(MultiByteToWideChar(CP_UTF8, 0, path.c_str(), -1, nullptr, 0), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, path.c_str(), -1, wide.data(), static_cast<int>(wide.size()));
  if (path.find_first_of("/\\") != std::string::npos) return reinterpret_cast<void*>(LoadLibraryW(wide.c_str()));
  // A bare name means the driver: the copy that the process has loaded, else System32's. The current folder is never searched.
  HMODULE loaded = GetModuleHandleW(wide.c_str());
  return reinterpret_cast<void*>(loaded ? loaded : LoadLibraryExW(wide.c_str(), nullptr, LOAD_LIBRARY_SEARCH_SYSTEM32));
#else
  return dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
#endif
}

void* find(void* library, const char* name) {
#ifdef _WIN32
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

template <class F>
bool bind(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(find(library, name));
  return function != nullptr;
}

// Binds the driver's calls; returns what is wrong, or an empty text. Python calls it `open`, a name that <io.h>, which Windows'
// Python.h includes, declares in C++ too.
std::string open_driver(const std::string& path) {
  void* library = open_library(path);
  if (!library) return path + " can't be opened";
  Driver found;
  const bool all = bind(library, "cuCtxGetCurrent", found.ctx_get) && bind(library, "cuCtxPushCurrent_v2", found.ctx_push) &&
                   bind(library, "cuCtxPopCurrent_v2", found.ctx_pop) && bind(library, "cuLaunchKernel", found.launch) &&
                   bind(library, "cuLaunchKernelEx", found.launch_ex);
  if (!all) return path + " lacks a call of CUDA 12's driver";
  driver = found;
  return {};
}

struct Launch {
  void* function;
  unsigned grid[3];
  unsigned threads;
  unsigned smem;
  void* params;
  bool overlap;
};

struct Failure {
  size_t index = 0;
  const char* call = nullptr;
  Result code = 0;
};

template <class T = unsigned>
T number(PyObject* value) {
  const unsigned long long n = PyLong_AsUnsignedLongLong(value);
  if (n == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw py::error_already_set();
  if (n > static_cast<T>(-1)) throw py::value_error("launch: " + std::to_string(n) + " does not fit its field");
  return static_cast<T>(n);
}

void* handle(PyObject* value) { return reinterpret_cast<void*>(number<uintptr_t>(value)); }

PyObject* item(PyObject* tuple, Py_ssize_t index, Py_ssize_t at_least, const char* what) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) < at_least) throw py::type_error(std::string("launch: expected ") + what);
  return PyTuple_GET_ITEM(tuple, index);
}

Launch parse(PyObject* launch) {
  PyObject* kernel = item(launch, 0, 6, "tuples (kernel, x, y, z, params, overlap)");
  const size_t size = number<size_t>(item(kernel, 3, 6, "a Kernel"));
  PyObject* params = PyTuple_GET_ITEM(launch, 4);
  if (!PyBytes_Check(params)) throw py::type_error("launch: params must be bytes");
  if (static_cast<size_t>(PyBytes_GET_SIZE(params)) != size) {
    throw py::value_error(py::str(PyTuple_GET_ITEM(kernel, 5)).cast<std::string>() + " takes " + std::to_string(size) +
                          " bytes of parameters, got " + std::to_string(PyBytes_GET_SIZE(params)));
  }
  const bool able = PyTuple_GET_ITEM(kernel, 4) == Py_True, wanted = PyTuple_GET_ITEM(launch, 5) == Py_True;
  return {handle(PyTuple_GET_ITEM(kernel, 0)),
          {number(PyTuple_GET_ITEM(launch, 1)), number(PyTuple_GET_ITEM(launch, 2)), number(PyTuple_GET_ITEM(launch, 3))},
          number(PyTuple_GET_ITEM(kernel, 1)),
          number(PyTuple_GET_ITEM(kernel, 2)),
          PyBytes_AS_STRING(params),
          able && wanted};
}

Failure issue(void* context, void* stream, const Launch* launches, size_t count) {
  void* current = nullptr;
  if (Result code = driver.ctx_get(&current)) return {0, "cuCtxGetCurrent", code};
  const bool foreign = current != context;
  if (foreign) {
    if (Result code = driver.ctx_push(context)) return {0, "cuCtxPushCurrent", code};
  }
  Failure failure;
  for (size_t i = 0; i < count && !failure.call; ++i) {
    const Launch& l = launches[i];
    void* params[] = {l.params};
    if (l.overlap) {
      LaunchAttribute attribute{kProgrammaticStreamSerialization, 0, 1, {}};
      LaunchConfig config{{l.grid[0], l.grid[1], l.grid[2]}, {l.threads, 1, 1}, l.smem, stream, &attribute, 1};
      if (Result code = driver.launch_ex(&config, l.function, params, nullptr)) failure = {i, "cuLaunchKernelEx", code};
    } else if (Result code = driver.launch(l.function, l.grid[0], l.grid[1], l.grid[2], l.threads, 1, 1, l.smem, stream, params, nullptr)) {
      failure = {i, "cuLaunchKernel", code};
    }
  }
  if (foreign) {
    const Result code = driver.ctx_pop(&current);
    if (code && !failure.call) failure = {count - 1, "cuCtxPopCurrent", code};
  }
  return failure;
}

// The parameters stay where Python's bytes objects hold them: bytes and tuples do not change, and the caller's reference to
// `launches` keeps all of them alive while the GIL is released.
py::object launch(uintptr_t context, uintptr_t stream, const py::tuple& launches) {
  if (!driver.launch) throw py::value_error("launch: the driver has not been opened");
  constexpr size_t kOnStack = 8;
  Launch few[kOnStack];
  std::vector<Launch> many;
  const size_t count = static_cast<size_t>(PyTuple_GET_SIZE(launches.ptr()));
  Launch* parsed = few;
  if (count > kOnStack) {
    many.resize(count);
    parsed = many.data();
  }
  for (size_t i = 0; i < count; ++i) parsed[i] = parse(PyTuple_GET_ITEM(launches.ptr(), static_cast<Py_ssize_t>(i)));
  Failure failure;
  {
    py::gil_scoped_release release;  // a full launch queue makes the driver wait
    failure = issue(reinterpret_cast<void*>(context), reinterpret_cast<void*>(stream), parsed, count);
  }
  if (!failure.call) return py::none();
  return py::make_tuple(failure.index, failure.call, failure.code);
}

}  // namespace

PYBIND11_MODULE(sageattention_launcher, m) {
  m.doc() = "Launches CUDA kernels for sageattention of the same version.";
  m.attr("__version__") = SAGEATTENTION_VERSION;
  m.def("open", &open_driver, py::arg("library"));
  m.def("launch", &launch, py::arg("context"), py::arg("stream"), py::arg("launches"));
}

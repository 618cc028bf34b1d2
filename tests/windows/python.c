// python.exe: as CPython's own, it only calls Py_Main of the DLL beside it. DLL is that DLL's name, as a wide string.
#include <stdio.h>
#include <windows.h>

int wmain(int argc, wchar_t** argv) {
  HMODULE dll = LoadLibraryW(DLL);
  if (!dll) {
    fwprintf(stderr, L"%ls can't be loaded: error %lu\n", DLL, GetLastError());
    return 120;
  }
  return ((int (*)(int, wchar_t**))(void*)GetProcAddress(dll, "Py_Main"))(argc, argv);
}

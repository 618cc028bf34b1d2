// python.exe: as CPython's own, it only calls Py_Main of the DLL beside it. DLL is that DLL's name, as a wide string.
// Both programs here do without a C runtime: zig would compile one first, for a minute.
#include <windows.h>

void WinMainCRTStartup(void) {
  HMODULE dll = LoadLibraryW(DLL);
  if (!dll) ExitProcess(120);
  int argc;
  LPWSTR* argv = CommandLineToArgvW(GetCommandLineW(), &argc);
  ExitProcess((UINT)((int (*)(int, LPWSTR*))(void*)GetProcAddress(dll, "Py_Main"))(argc, argv));
}

// python.exe of a virtual environment: starts the base's python.exe, which __PYVENV_LAUNCHER__ tells whose environment it is.
#include <string.h>
#include <wchar.h>
#include <windows.h>

enum { LENGTH = 32768 };
static wchar_t self[LENGTH], file[LENGTH], home[LENGTH], line[LENGTH];
static char text[65536];

static UINT start_base(void) {
  GetModuleFileNameW(NULL, self, LENGTH);
  wcscpy(file, self);
  *wcsrchr(file, L'\\') = 0;
  *wcsrchr(file, L'\\') = 0;
  HANDLE config = CreateFileW(wcscat(file, L"\\pyvenv.cfg"), GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, 0, NULL);
  DWORD length;
  if (config == INVALID_HANDLE_VALUE || !ReadFile(config, text, sizeof text - 1, &length, NULL)) return 106;
  CloseHandle(config);
  char* base = strstr(text, "home = ");
  if (!base) return 107;
  base += strlen("home = ");
  base[strcspn(base, "\r\n")] = 0;
  MultiByteToWideChar(CP_UTF8, 0, base, -1, home, LENGTH);
  wcscat(home, L"\\python.exe");
  SetEnvironmentVariableW(L"__PYVENV_LAUNCHER__", self);
  wchar_t* rest = GetCommandLineW();  // after our own name, which may be quoted
  rest = *rest == L'"' ? wcschr(rest + 1, L'"') + 1 : rest + wcscspn(rest, L" ");
  wcscat(wcscat(wcscat(wcscpy(line, L"\""), home), L"\""), rest);
  STARTUPINFOW start;
  PROCESS_INFORMATION process;
  DWORD code = 0;
  GetStartupInfoW(&start);
  if (!CreateProcessW(home, line, NULL, NULL, TRUE, 0, NULL, NULL, &start, &process)) return 101;
  WaitForSingleObject(process.hProcess, INFINITE);
  GetExitCodeProcess(process.hProcess, &code);
  return code;
}

void WinMainCRTStartup(void) { ExitProcess(start_base()); }

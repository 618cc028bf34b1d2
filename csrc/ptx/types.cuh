// Explicit-width names. `long` is 32 bits on Windows and 64 on Linux, so it appears nowhere.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

namespace sage { constexpr int kSize = 1; }

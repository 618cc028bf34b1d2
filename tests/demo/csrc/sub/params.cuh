namespace sage {

struct Pair {
  const float* data;  // [n · stride]
  long long stride;
};

struct DemoParams {
  Pair x;
  float* y;  // [n]
  int n;
  float factor;
};

}  // namespace sage

// Products of warpgroups, from the layouts of the PTX ISA, each warp's sixteen rows on their own. They are computed as late as the device code
// lets them: once a wait asks for their group, of what registers and shared memory hold by then. So an accumulator that is read before its
// wait, or a stage that is released before, shows as a wrong result.
#pragma once
#include "mma.cuh"

namespace sage {
// Of an operand's first 16 bytes, by their distance from the start of shared memory.
template <int kNextK>
u64 wgmma_descriptor(u32 shared) {
  return (u64)((at_shared(shared, 16) - dynamic_shared) >> 4) | (u64)(kNextK >> 4) << 16;
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  collective(nullptr, [](void**) { block.warps[threadIdx.x / 32].products.emplace_back(); });
}
template <int kPending>
void wgmma_wait() {
  collective(nullptr, [](void**) {
    auto& groups = block.warps[threadIdx.x / 32].products;
    for (; groups.size() > kPending + 1; groups.pop_front())
      for (auto& product : groups.front()) product();
  });
}
template <class T, int kCount> void warpgroup_fence_operand(T (&)[kCount]) {}
template <int kFirst, int kCount, int kAll, class T> T (&registers(T (&d)[kAll]))[kCount] { return (T (&)[kCount])d[kFirst]; }
inline void fence_async_proxy() {}
template <int kCount> void setmaxnreg_dec() {}
template <int kCount> void setmaxnreg_inc() {}
template <int kThreads> void named_barrier(int id) { block.barriers[id].wait(kThreads); }
template <int kThreads> void named_barrier_arrive(bool predicate, int id) { if (predicate) block.barriers[id].arrive(kThreads); }

constexpr int kWgmmaBytes = 32;  // of a row along k

// Bytes [at, at + 16) of a row of an operand in shared memory.
inline const u8* operand(u64 descriptor, int row, int at) {
  return dynamic_shared + ((descriptor & 0x3FFF) << 4) + at / 16 * ((descriptor >> 16 & 0x3FFF) << 4) + row / 8 * 128 + row % 8 * 16;
}

template <class Sum>
struct Wgmma { Sum* d; const u32* a; u64 a_shared, b; bool add; };

// d (+)= A · Bᵀ for the rows of one warp of its warpgroup; A is in registers where there are any, else in shared memory.
template <class Element, class Sum, class Convert>
void multiply(const std::vector<Wgmma<Sum>>& lanes, int registers, int warp, Convert convert) {
  constexpr int kElements = 4 / sizeof(Element), kDepth = 8 * kElements;
  static float rows[16][kDepth], columns[256][kDepth];
  const auto number = [&](const u8* from, int k) { return convert(((const Element*)from)[k % (16 / sizeof(Element))]); };
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k) {
      const auto& lane = lanes[row % 8 * 4 + k % (kDepth / 2) / kElements];
      const int part = k / (kDepth / 2) * 2 + row / 8;
      rows[row][k] = lane.a ? convert(((const Element*)&lane.a[part])[k % kElements])
                            : number(operand(lane.a_shared, 16 * warp + row, k * sizeof(Element)), k);
    }
  for (int n = 0; n < 2 * registers; ++n)
    for (int k = 0; k < kDepth; ++k) columns[n][k] = number(operand(lanes[0].b, n, k * sizeof(Element)), k);
  for (int i = 0; i < 32; ++i)
    for (int e = 0; e < registers; ++e) {
      const float* row = rows[i / 4 + e % 4 / 2 * 8];
      const float* column = columns[e / 4 * 8 + i % 4 * 2 + e % 2];
      float sum = 0;  // exact for the INT8 products: below 2^24
      for (int k = 0; k < kDepth; ++k) sum += row[k] * column[k];
      lanes[i].d[e] = (lanes[i].add ? lanes[i].d[e] : Sum()) + (Sum)sum;
    }
}

template <class Element, class Sum, class Convert>
void wgmma(Sum* d, int registers, const u32* a, u64 a_shared, u64 b, bool add, Convert convert) {
  Wgmma<Sum> own{d, a, a_shared, b, add};
  collective(&own, [=](void** arguments) {
    std::vector<Wgmma<Sum>> lanes;
    for (int i = 0; i < 32; ++i) lanes.push_back(*(Wgmma<Sum>*)arguments[i]);
    const int warp = threadIdx.x / 32;
    block.warps[warp].products.back().push_back([=] { multiply<Element>(lanes, registers, warp % 4, convert); });
  });
}

template <int kRegisters> void wgmma_s8(i32 (&d)[kRegisters], u64 a, u64 b, bool add) { wgmma<u8>(d, kRegisters, nullptr, a, b, add, signed_byte); }
template <int kRegisters> void wgmma_s8(i32 (&d)[kRegisters], const u32* a, u64 b, bool add) { wgmma<u8>(d, kRegisters, a, 0, b, add, signed_byte); }
template <int kRegisters> void wgmma_f16(float (&d)[kRegisters], const u32* a, u64 b, bool add) { wgmma<u16>(d, kRegisters, a, 0, b, add, half); }
template <int kRegisters> void wgmma_e4m3(float (&d)[kRegisters], const u32* a, u64 b, bool add) { wgmma<u8>(d, kRegisters, a, 0, b, add, e4m3_value); }
template <int kRegisters> void wgmma_e4m3(i32 (&d)[kRegisters], const u32* a, u64 b, bool add) { wgmma<u8>((float*)d, kRegisters, a, 0, b, add, e4m3_value); }
}  // namespace sage

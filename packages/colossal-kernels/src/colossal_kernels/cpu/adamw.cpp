// AdamW over many tensors in one mixed pass: gradients in float32 or bf16, parameters and moments in float32, a bf16 copy of the new
// parameters. 28 bytes an element with bf16 gradients and copies; a cast, a step and a cast move 40.
//
// Plain loops that a compiler turns into AVX-512, AVX2 or NEON, whichever the machine has. Without contraction to fused multiply-adds every
// element is the same number wherever it lies in a vector, a thread's range or a shard.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

// What adamw.py sends, in this order.
struct Numbers {
  float clip, keep, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root, eps;
};

// A row of the table: pointers as integers, 0 where there is none.
struct Row {
  int64_t param, grad, first, second, copy, numel, grad_is_bf16;
};

inline float widened(float value) { return value; }

inline float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest bf16, ties to even; a NaN stays one.
inline uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

template <typename Grad, bool kCopies>
void update(float* __restrict param, const Grad* __restrict grad, float* __restrict first, float* __restrict second,
            uint16_t* __restrict copy, int64_t numel, const Numbers numbers) {
  for (int64_t i = 0; i < numel; ++i) {
    const float g = numbers.clip * widened(grad[i]);
    const float m = first[i] + (g - first[i]) * numbers.one_minus_beta1;
    const float v = numbers.beta2 * second[i] + numbers.one_minus_beta2 * g * g;
    const float p = numbers.keep * param[i] - numbers.step_size * (m / (std::sqrt(v) * numbers.inverse_root + numbers.eps));
    first[i] = m;
    second[i] = v;
    param[i] = p;
    if (kCopies) copy[i] = narrowed(p);
  }
}

template <typename Grad>
void update_range(const Row& row, int64_t start, int64_t stop, const Numbers& numbers) {
  float* param = reinterpret_cast<float*>(row.param) + start;
  const Grad* grad = reinterpret_cast<const Grad*>(row.grad) + start;
  float* first = reinterpret_cast<float*>(row.first) + start;
  float* second = reinterpret_cast<float*>(row.second) + start;
  if (row.copy != 0) {
    update<Grad, true>(param, grad, first, second, reinterpret_cast<uint16_t*>(row.copy) + start, stop - start, numbers);
  } else {
    update<Grad, false>(param, grad, first, second, nullptr, stop - start, numbers);
  }
}

// Elements [start, stop) of all tensors behind one another.
void update_part(const Row* rows, int64_t count, int64_t start, int64_t stop, const Numbers& numbers) {
  for (int64_t index = 0; index < count && stop > 0; ++index) {
    const Row& row = rows[index];
    const int64_t low = std::max<int64_t>(start, 0), high = std::min(stop, row.numel);
    if (low < high) {
      if (row.grad_is_bf16) {
        update_range<uint16_t>(row, low, high, numbers);
      } else {
        update_range<float>(row, low, high, numbers);
      }
    }
    start -= row.numel;
    stop -= row.numel;
  }
}

// Below this many elements a thread costs more than it does.
constexpr int64_t kLeast = 1 << 15;
// Ranges begin at whole cache lines of float32, as far as tensors do.
constexpr int64_t kGrain = 64;

}  // namespace

extern "C" void colossal_adamw(const Row* rows, int64_t count, const Numbers* numbers, int64_t most_threads) {
  int64_t total = 0;
  for (int64_t index = 0; index < count; ++index) total += rows[index].numel;
  const int64_t threads = std::max<int64_t>(1, std::min(most_threads, total / kLeast));
  const int64_t share = (total / threads / kGrain + 1) * kGrain;
  std::vector<std::thread> others;
  int64_t start = 0;
  for (int64_t thread = 0; thread + 1 < threads; ++thread, start += share) {
    try {
      others.emplace_back(update_part, rows, count, start, std::min(start + share, total), *numbers);
    } catch (...) {  // the system gives no more threads: this one does the rest
      break;
    }
  }
  update_part(rows, count, start, total, *numbers);
  for (std::thread& other : others) other.join();
}

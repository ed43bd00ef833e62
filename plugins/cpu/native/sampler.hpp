// One token drawn from a row of logits (plugins/sample_token.py says how, and is the reference). No sort: the winner of
// the draw among all tokens is checked against the filters, and the draw repeated among those ahead of it where it fails.
//
// Integers, comparisons and sums of lanes in a fixed order: the same token on every instruction level.

// a · b: the lower half, and the upper one.
inline uint64_t multiply(uint64_t a, uint64_t b, uint64_t* upper) {
#if defined(__SIZEOF_INT128__)
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  *upper = static_cast<uint64_t>(product >> 64);
  return static_cast<uint64_t>(product);
#else
  const uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
  const uint64_t low = a0 * b0, middle = a1 * b0 + (low >> 32), other = a0 * b1 + (middle & 0xffffffffu);
  *upper = a1 * b1 + (middle >> 32) + (other >> 32);
  return a * b;
#endif
}

// One block of Philox4x64-10 (Salmon et al. 2011), as numpy.random.Philox counts: its first one has counter + 1.
inline void philox(int64_t first, uint64_t position, uint64_t stream, uint64_t seed, uint64_t out[4]) {
  uint64_t c0 = static_cast<uint64_t>(first) + 1, c1 = position, c2 = stream, c3 = 0, k0 = seed, k1 = 1;
  QUASAR_UNROLL for (int round = 0; round < 10; ++round) {
    uint64_t upper0, upper1;
    const uint64_t lower0 = multiply(0xD2E7470EE14C6C93u, c0, &upper0);
    const uint64_t lower1 = multiply(0xCA5A826395121157u, c2, &upper1);
    c0 = upper1 ^ c1 ^ k0;
    c2 = upper0 ^ c3 ^ k1;
    c1 = lower1;
    c3 = lower0;
    k0 += 0x9E3779B97F4A7C15u;
    k1 += 0xBB67AE8584CAA73Bu;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// -log(u), u = (bits + 1/2) / 2^width. Near 1 a double has no room for u, so 1 - u serves there.
inline double exponential_of(uint64_t bits, int width) {
  const double unit = width == 64 ? 0x1p-64 : 0x1p-60;
  const uint64_t most = ~uint64_t{0} >> (64 - width);
  return bits >> (width - 1) ? -std::log1p(-((static_cast<double>(most - bits) + 0.5) * unit))
                             : -std::log((static_cast<double>(bits) + 0.5) * unit);
}

constexpr int kSampled = 0, kNoNumber = 1, kNothingLeft = 2, kNoMemory = 3;
constexpr int64_t kRun = 1024;
constexpr int kColumns = 256;  // tokens whose logits form 16 vectors, and so 16 blocks: its columns

// The largest logit of each block, -inf for those that have none; false where a logit is NaN.
inline bool largest_of_blocks(const float* x, int64_t columns, float* result) {
  // Counts the numbers: exact in float lanes for 2^28 of them.
  Lanes numbers = splat(0.0f);
  const Lanes one = splat(1.0f), nothing = splat(-__builtin_inff());
  int64_t padding = 0;
  for (int64_t start = 0; start < columns; start += kColumns, result += 16) {
    Lanes most = nothing;
    if (columns - start >= kColumns) {
      for (int i = 0; i < kColumns; i += 16) {
        const Lanes here = load(x + start + i);
        most = larger(here, most);
        numbers = add(numbers, keep_at_least(here, here, one));
      }
    } else {
      for (int64_t i = start; i < columns; i += 16) {
        const int count = columns - i < 16 ? static_cast<int>(columns - i) : 16;
        const Lanes here = keep_first(load_first(x + i, count), count, -__builtin_inff());
        most = larger(here, most);
        numbers = add(numbers, keep_at_least(here, here, one));
        padding += 16 - count;
      }
    }
    store(result, most);
  }
  float counts[16];
  store(counts, numbers);
  int64_t total = -padding;
  for (int i = 0; i < 16; ++i) total += static_cast<int64_t>(counts[i]);
  return total == columns;
}

// The k-th largest of n > k values, in a heap of k floats whose first is the smallest.
inline float kth_largest(const float* x, int64_t columns, int64_t k, float* heap) {
  const auto sink = [heap, k](int64_t place, float value) {
    for (;;) {
      int64_t child = 2 * place + 1;
      if (child >= k) break;
      if (child + 1 < k && heap[child + 1] < heap[child]) ++child;
      if (heap[child] >= value) break;
      heap[place] = heap[child];
      place = child;
    }
    heap[place] = value;
  };
  std::memcpy(heap, x, static_cast<size_t>(k) * sizeof(float));
  for (int64_t place = k / 2; place-- > 0;) sink(place, heap[place]);
  int64_t i = k;
  for (; i + 16 <= columns; i += 16) {
    if (largest(load(x + i)) <= heap[0]) continue;
    for (int64_t j = i; j < i + 16; ++j)
      if (x[j] > heap[0]) sink(0, x[j]);
  }
  for (; i < columns; ++i)
    if (x[i] > heap[0]) sink(0, x[i]);
  return heap[0];
}

// The smallest float that is at least x.
inline float round_up(double x) {
  const float near = static_cast<float>(x);
  return static_cast<double>(near) < x ? std::nextafterf(near, __builtin_inff()) : near;
}

// A place in the order of tokens: larger logits first, then lower ids.
struct Place {
  float logit;
  int64_t token;
};

// The winner among tokens of at least `floor` that lie ahead of `before`; -1: there are none.
inline int64_t draw(const Sampling& s, const float* blocks, int64_t num_blocks, float top, float floor, Place before) {
  const float inverse = static_cast<float>(1.0 / s.temperature);
  double best = -__builtin_inf();
  int64_t winner = -1;
  for (int64_t group = 0; group < num_blocks; group += 16) {
    if (largest(load(blocks + group)) < floor) continue;
    uint64_t words[16];
    for (int i = 0; i < 4; ++i) philox(group / 4 + i, s.position, 0, s.seed, words + 4 * i);
    // No more noise than log(16) - log(1 - u) <= log(2) (4 + 31 - exponent of 2^31 (1 - u)); the slack covers rounding.
    float bound[16];
    for (int i = 0; i < 16; ++i) {
      const float left = static_cast<float>(static_cast<int32_t>(~words[i] >> 33));
      int32_t bits;
      std::memcpy(&bits, &left, 4);
      bound[i] = (blocks[group + i] - top) * inverse + static_cast<float>(4 + 31 + 127 - (bits >> 23)) * 0.693147182f;
    }
    if (!(largest(load(bound)) >= static_cast<float>(best) - 1e-3f)) continue;
    for (int i = 0; i < 16; ++i) {
      if (!(static_cast<double>(bound[i]) >= best - 1e-3) || !(blocks[group + i] >= floor)) continue;
      const double least = exponential_of(words[i] >> 4, 60) / 16;
      const double most = -std::log(least);
      uint64_t members[16];
      bool known = false;
      // The member with the least exponential first: few others have to be looked at then.
      const int first = static_cast<int>(words[i] % 16);
      for (int turn = 0; turn < 17; ++turn) {
        const int member = turn == 0 ? first : turn - 1;
        const int64_t token = group * 16 + 16 * member + i;
        if ((turn > 0 && member == first) || token >= s.columns) continue;
        const float x = s.logits[token];
        if (!(x >= floor) || x == -__builtin_inff() || (x == before.logit && token >= before.token)) continue;
        const double scaled = (static_cast<double>(x) - static_cast<double>(top)) / s.temperature;
        if (scaled + most < best) continue;
        double noise = most;
        if (member != first) {
          if (!known) {
            for (int j = 0; j < 4; ++j) philox((group + i) * 4 + j, s.position, 1, s.seed, members + 4 * j);
            known = true;
          }
          noise = -std::log(least + exponential_of(members[member], 64));
        }
        const double value = scaled + noise;
        if (value > best || (value == best && token < winner)) {
          best = value;
          winner = token;
        }
      }
    }
  }
  return winner;
}

// Mass of all tokens of at least `within`, and of those that lie ahead of a place.
inline void masses(const Sampling& s, float top, float within, Place place, double* total, double* ahead) {
  // Powers of two of logits in units of log(2): exponentials with fewer steps.
  const Lanes inverse = splat(static_cast<float>(1.4426950408889634 / s.temperature));
  const Lanes most = splat(top), least = splat(within);
  // At least the next float: more than the place's.
  const Lanes above = splat(std::nextafterf(place.logit, __builtin_inff()));
  double all = 0, before = 0;
  int64_t ties = 0;
  for (int64_t start = 0; start < s.columns; start += kRun) {
    const int count = static_cast<int>(s.columns - start < kRun ? s.columns - start : kRun);
    const float* x = s.logits + start;
    Lanes sums = splat(0.0f), sums_before = sums;
    int i = 0;
    for (; i + 16 <= count; i += 16) {
      const Lanes here = load(x + i);
      const Lanes mass = keep_at_least(here, least, power_of_two_up_to_one(mul(sub(here, most), inverse)));
      sums = add(sums, mass);
      sums_before = add(sums_before, keep_at_least(here, above, mass));
    }
    if (i < count) {
      const Lanes here = keep_first(load_first(x + i, count - i), count - i, -__builtin_inff());
      const Lanes mass =
          keep_first(keep_at_least(here, least, power_of_two_up_to_one(mul(sub(here, most), inverse))), count - i, 0);
      sums = add(sums, mass);
      sums_before = add(sums_before, keep_at_least(here, above, mass));
    }
    all += static_cast<double>(sum(sums));
    before += static_cast<double>(sum(sums_before));
    // Ties ahead: the same logit at a lower id.
    if (start >= place.token) continue;
    const int lower = static_cast<int>(place.token - start < count ? place.token - start : count);
    int32_t same = 0;
    for (int j = 0; j < lower; ++j) same += static_cast<int32_t>(x[j] == place.logit);
    ties += same;
  }
  *total = all;
  *ahead = before + static_cast<double>(ties) * std::exp((static_cast<double>(place.logit) - top) / s.temperature);
}

// The same in double, one by one.
inline void exact_masses(const Sampling& s, float top, float within, Place place, double* total, double* ahead) {
  *total = *ahead = 0;
  for (int64_t i = 0; i < s.columns; ++i) {
    const float x = s.logits[i];
    if (!(x >= within)) continue;
    const double mass = std::exp((static_cast<double>(x) - static_cast<double>(top)) / s.temperature);
    *total += mass;
    if (x > place.logit || (x == place.logit && i < place.token)) *ahead += mass;
  }
}

inline int sample_from(const Sampling& s, float* blocks, float* heap, int64_t* token) {
  const int64_t num_blocks = (s.columns + kColumns - 1) / kColumns * 16;
  if (!largest_of_blocks(s.logits, s.columns, blocks)) return kNoNumber;
  Lanes all = load(blocks);
  for (int64_t i = 16; i < num_blocks; i += 16) all = larger(load(blocks + i), all);
  const float top = largest(all);
  if (top == __builtin_inff()) return kNoNumber;
  if (top == -__builtin_inff()) return kNothingLeft;
  float within = -__builtin_inff();
  if (s.top_k > 0 && s.top_k < s.columns) within = kth_largest(s.logits, s.columns, s.top_k, heap);
  float floor = within;
  if (s.min_p > 0) {
    const float least = round_up(static_cast<double>(top) + s.temperature * std::log(s.min_p));
    floor = least > floor ? least : floor;
  }
  if (s.top_p < 1) {
    // Below that lies less than 1 - top_p of what the largest logit has alone.
    const double reach = std::log(static_cast<double>(s.columns) / (1 - s.top_p));
    const float least = static_cast<float>(static_cast<double>(top) - s.temperature * (reach + 1));
    floor = least > floor ? least : floor;
  }
  Place place{-__builtin_inff(), s.columns};
  for (;;) {
    const int64_t drawn = draw(s, blocks, num_blocks, top, floor, place);
    if (drawn < 0) return kNothingLeft;
    *token = drawn;
    if (s.top_p >= 1) return kSampled;
    place = {s.logits[drawn], drawn};
    double total, ahead;
    masses(s, top, within, place, &total, &ahead);
    // Too near for float sums to tell: every implementation decides such cases in double.
    if (std::fabs(ahead - s.top_p * total) < 1e-4 * s.top_p * total)
      exact_masses(s, top, within, place, &total, &ahead);
    if (ahead < s.top_p * total) return kSampled;
    floor = place.logit;
  }
}

int sample_row(const Sampling& s, int64_t* token) {
  if (s.columns <= 0) return kNothingLeft;
  const int64_t num_blocks = (s.columns + kColumns - 1) / kColumns * 16;
  const int64_t kept = s.top_k > 0 && s.top_k < s.columns ? s.top_k : 0;
  float* scratch = static_cast<float*>(std::malloc(static_cast<size_t>(num_blocks + kept) * sizeof(float)));
  if (scratch == nullptr) return kNoMemory;
  const int result = sample_from(s, scratch, scratch + num_blocks, token);
  std::free(scratch);
  return result;
}

// One token drawn from a row of logits (plugins/sample_token.py says how, and is the reference). No sort: the winner of
// the draw among all tokens is checked against the filters, and the draw repeated among those ahead of it where it fails.
//
// Integers, comparisons and sums of lanes in a fixed order: the same token on every instruction level.

// One block of Philox4x64-10 (Salmon et al. 2011), as numpy.random.Philox counts: its first one has counter + 1.
inline void philox(int64_t first, uint64_t position, uint64_t stream, uint64_t seed, uint64_t out[4]) {
  uint64_t c0 = static_cast<uint64_t>(first) + 1, c1 = position, c2 = stream, c3 = 0, k0 = seed, k1 = 1;
  QUASAR_UNROLL for (int round = 0; round < 10; ++round) {
    const unsigned __int128 p0 = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c0;
    const unsigned __int128 p1 = static_cast<unsigned __int128>(0xCA5A826395121157u) * c2;
    c0 = static_cast<uint64_t>(p1 >> 64) ^ c1 ^ k0;
    c2 = static_cast<uint64_t>(p0 >> 64) ^ c3 ^ k1;
    c1 = static_cast<uint64_t>(p1);
    c3 = static_cast<uint64_t>(p0);
    k0 += 0x9E3779B97F4A7C15u;
    k1 += 0xBB67AE8584CAA73Bu;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// -log(-log(u)) of a token whose upper 16 bits are `high`.
inline double gumbel(const Sampling& s, int64_t token, uint16_t high) {
  uint64_t words[4];
  philox(token, s.position, 1, s.seed, words);
  const uint64_t bits = static_cast<uint64_t>(high) << 48 | words[0] >> 16;
  const double unit = 0x1p-64;
  const double exponential = bits >> 63 ? -std::log1p(-((static_cast<double>(~bits) + 0.5) * unit))
                                        : -std::log((static_cast<double>(bits) + 0.5) * unit);
  return -std::log(exponential);
}

constexpr int kSampled = 0, kNoNumber = 1, kNothingLeft = 2, kNoMemory = 3;
constexpr int64_t kRun = 1024;
constexpr int kBlocks = 4;  // Philox blocks at a time, for 16 tokens each

// The largest logit; false where one is NaN.
inline bool largest_logit(const float* x, int64_t columns, float* result) {
  float found = -__builtin_inff();
  uint32_t bad = 0;
  for (int64_t start = 0; start < columns; start += kRun) {
    const int count = static_cast<int>(columns - start < kRun ? columns - start : kRun);
    Lanes most = splat(found);
    int i = 0;
    for (; i + 16 <= count; i += 16) most = larger(load(x + start + i), most);
    found = largest(most);
    for (; i < count; ++i) found = x[start + i] > found ? x[start + i] : found;
    for (i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + start + i, 4);
      bad |= static_cast<uint32_t>((bits & 0x7fffffffu) > 0x7f800000u);
    }
  }
  *result = found;
  return bad == 0;
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

// The largest scaled logit + noise so far.
struct Best {
  double value;
  int64_t token;
};

// Draws for four blocks of 16 tokens, of those of at least `floor` that lie ahead of `before`.
inline void draw_blocks(const Sampling& s, float top, float inverse, float floor, Place before, const int64_t* blocks,
                        Best* best) {
  uint64_t words[kBlocks][4];
  for (int b = 0; b < kBlocks; ++b) philox(blocks[b], s.position, 0, s.seed, words[b]);
  uint16_t high[kBlocks * 16];
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  for (int i = 0; i < 16 * kBlocks; ++i) high[i] = static_cast<uint16_t>(words[i / 16][i % 16 / 4] >> (16 * (i % 4)));
#else
  std::memcpy(high, words, sizeof high);
#endif
  // No more noise than -log(1 - u) < log(2) (16 - exponent of 65535 - high); the slack covers rounding.
  float most[kBlocks * 16];
  for (int i = 0; i < kBlocks * 16; ++i) {
    const float left = static_cast<float>(65535 - static_cast<int32_t>(high[i]));
    int32_t bits;
    std::memcpy(&bits, &left, 4);
    most[i] = static_cast<float>(16 + 127 - (bits >> 23)) * 0.693147182f;
  }
  Lanes bound[kBlocks], all = splat(-__builtin_inff());
  for (int b = 0; b < kBlocks; ++b) {
    const int64_t left = s.columns - blocks[b] * 16;
    const int count = left < 16 ? static_cast<int>(left) : 16;
    const Lanes scaled = mul(sub(load_first(s.logits + blocks[b] * 16, count), splat(top)), splat(inverse));
    bound[b] = keep_first(add(scaled, load(most + 16 * b)), count, -__builtin_inff());
    all = larger(all, bound[b]);
  }
  const float threshold = static_cast<float>(best->value) - 1e-3f;
  if (!(largest(all) >= threshold)) return;
  for (int b = 0; b < kBlocks; ++b) {
    store(most, bound[b]);
    for (int i = 0; i < 16; ++i) {
      const int64_t token = blocks[b] * 16 + i;
      if (!(most[i] >= threshold) || token >= s.columns) continue;
      const float x = s.logits[token];
      if (!(x >= floor) || x == -__builtin_inff() || (x == before.logit && token >= before.token)) continue;
      const double value =
          (static_cast<double>(x) - static_cast<double>(top)) / s.temperature + gumbel(s, token, high[16 * b + i]);
      // The lower id of a tie: blocks come in order.
      if (value > best->value) *best = {value, token};
    }
  }
}

// The winner among tokens of at least `floor` that lie ahead of `before`; -1: there are none.
inline int64_t draw(const Sampling& s, float top, float floor, Place before) {
  const float inverse = static_cast<float>(1.0 / s.temperature);
  Best best{-__builtin_inf(), -1};
  int64_t blocks[kBlocks];
  int waiting = 0;
  const auto add_block = [&](int64_t block) {
    blocks[waiting++] = block;
    if (waiting < kBlocks) return;
    draw_blocks(s, top, inverse, floor, before, blocks, &best);
    waiting = 0;
  };
  const bool all = floor == -__builtin_inff();
  int64_t start = 0;
  for (; start + 64 <= s.columns; start += 64) {
    Lanes four[4];
    for (int i = 0; i < 4; ++i) four[i] = load(s.logits + start + 16 * i);
    if (!all && largest(larger(larger(four[0], four[1]), larger(four[2], four[3]))) < floor) continue;
    for (int i = 0; i < 4; ++i)
      if (all || largest(four[i]) >= floor) add_block(start / 16 + i);
  }
  for (; start < s.columns; start += 16) add_block(start / 16);
  if (waiting > 0) {
    for (int i = waiting; i < kBlocks; ++i) blocks[i] = blocks[waiting - 1];
    draw_blocks(s, top, inverse, floor, before, blocks, &best);
  }
  return best.token;
}

// Mass of all tokens of at least `within`, and of those that lie ahead of a place.
inline void masses(const Sampling& s, float top, float within, Place place, double* total, double* ahead) {
  const Lanes inverse = splat(static_cast<float>(1.0 / s.temperature)), most = splat(top), least = splat(within);
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
      const Lanes mass = keep_at_least(here, least, exponential(mul(sub(here, most), inverse)));
      sums = add(sums, mass);
      sums_before = add(sums_before, keep_at_least(here, above, mass));
    }
    if (i < count) {
      const Lanes here = keep_first(load_first(x + i, count - i), count - i, -__builtin_inff());
      const Lanes mass = keep_first(keep_at_least(here, least, exponential(mul(sub(here, most), inverse))), count - i, 0);
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

int sample_row(const Sampling& s, int64_t* token) {
  float top;
  if (!largest_logit(s.logits, s.columns, &top) || top == __builtin_inff()) return kNoNumber;
  if (top == -__builtin_inff()) return kNothingLeft;
  float within = -__builtin_inff();
  if (s.top_k > 0 && s.top_k < s.columns) {
    float few[256];
    float* heap = s.top_k <= 256 ? few : static_cast<float*>(std::malloc(static_cast<size_t>(s.top_k) * sizeof(float)));
    if (heap == nullptr) return kNoMemory;
    within = kth_largest(s.logits, s.columns, s.top_k, heap);
    if (heap != few) std::free(heap);
  }
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
    const int64_t drawn = draw(s, top, floor, place);
    if (drawn < 0) return kNothingLeft;
    *token = drawn;
    if (s.top_p >= 1) return kSampled;
    place = {s.logits[drawn], drawn};
    double total, ahead;
    masses(s, top, within, place, &total, &ahead);
    if (ahead < s.top_p * total) return kSampled;
    floor = place.logit;
  }
}

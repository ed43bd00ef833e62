// How work is cut for 1 to 300 cores: prints "ok", or what does not hold.
#include <cstdio>
#include <initializer_list>

#include "../../../plugins/cpu/native/attention_operator.hpp"

using namespace quasar;

static bool check(int items, int cores) {
  const Pieces pieces(items, cores);
  const int count = pieces.count();
  int most = 0;
  bool ok = count <= Pieces::kMost && (items == 0 || pieces.first(0) == 0) && pieces.first(count) == items;
  for (int i = 0; ok && i < count; ++i) {
    const int size = pieces.first(i + 1) - pieces.first(i);
    ok = size >= 1;
    if (size > most) most = size;
  }
  // No piece is more than half of a thread's share, or of the 200th part of all, rounded up.
  const int threads = cores < 64 ? cores : 64, half = items / (2 * threads), part = (items + 199) / 200;
  ok = ok && most <= (half > part ? half : part);
  if (!ok) std::printf("%d items, %d cores: %d pieces, the largest %d\n", items, cores, count, most);
  return ok;
}

int main() {
  bool ok = true;
  for (int cores : {1, 2, 3, 8, 16, 48, 64, 96, 128, 300}) {
    for (int items = 0; items <= 2500; ++items) ok = ok && check(items, cores);
    for (int items = 2500; items <= 300000; items += 1187) ok = ok && check(items, cores);
  }
  // Attention of two kv heads keeps one core or two busy when it is streamed, and sixteen only in blocks.
  ok = ok && partial_room(2, 2) == kPartialFloats && partial_room(2, 16) == kMostPartialFloats;
  if (ok) std::printf("ok\n");
}

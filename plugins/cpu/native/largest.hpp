// The first few of many, in order, without sorting the rest.
#pragma once

#include <cstdint>

namespace quasar {

// Keeps the largest keys of those offered, in a heap whose first is the smallest.
struct Largest {
  int64_t *keys, *values;
  int64_t room, count = 0;

  void offer(int64_t key, int64_t value) {
    if (count < room) {
      int64_t place = count++;
      for (; place > 0 && keys[(place - 1) / 2] > key; place = (place - 1) / 2) move((place - 1) / 2, place);
      keys[place] = key;
      values[place] = value;
    } else if (room > 0 && key > keys[0]) {
      sink(key, value, count);
    }
  }

  // Descending.
  void sort() {
    for (int64_t last = count - 1; last > 0; --last) {
      const int64_t key = keys[last], value = values[last];
      move(0, last);
      sink(key, value, last);
    }
  }

  void sink(int64_t key, int64_t value, int64_t end) {
    int64_t place = 0;
    for (int64_t child; (child = 2 * place + 1) < end; place = child) {
      if (child + 1 < end && keys[child + 1] < keys[child]) ++child;
      if (keys[child] >= key) break;
      move(child, place);
    }
    keys[place] = key;
    values[place] = value;
  }

  void move(int64_t from, int64_t to) {
    keys[to] = keys[from];
    values[to] = values[from];
  }
};

}  // namespace quasar

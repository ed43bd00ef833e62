// What the library shows: everything else is hidden.
#pragma once

#if defined(_WIN32)
#define QUASAR_EXPORT extern "C" __declspec(dllexport)
#else
#define QUASAR_EXPORT extern "C" __attribute__((visibility("default")))
#endif

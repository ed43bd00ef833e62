// The few entries of ONNX Runtime's C ABI that are used. The table only ever grows at its end, so a position holds for
// every later version; the positions are those of ABI version 17 (ONNX Runtime 1.17).
#pragma once

#include <cstddef>
#include <cstdint>

namespace quasar::ort {

constexpr uint32_t kAbiVersion = 17;

struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct Shape;

enum Code : int { kFail = 1, kInvalidArgument = 2 };
enum Type : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kBool = 9, kFloat16 = 10, kBfloat16 = 16 };
enum Presence : int { kRequired = 0, kOptional = 1 };

class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<void* const*>(table)) {}

  Status* status(Code code, const char* message) const { return entry<Status*(int, const char*)>(0)(code, message); }
  void release(Status* status) const { entry<void(Status*)>(93)(status); }

  Status* create_domain(const char* name, Domain** domain) const {
    return entry<Status*(const char*, Domain**)>(26)(name, domain);
  }
  Status* add_operator(Domain* domain, const struct CustomOp* op) const {
    return entry<Status*(Domain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return entry<Status*(SessionOptions*, Domain*)>(28)(options, domain);
  }

  Status* attribute(const KernelInfo* info, const char* name, float* value) const {
    return entry<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, value);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* value) const {
    return entry<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }

  // `value` is that of an initializer; nothing comes back for what a call brings.
  Status* constant(const KernelInfo* info, size_t index, int* found, const Value** value) const {
    return entry<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, found, value);
  }
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return entry<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* extents, size_t rank, Value** value) const {
    return entry<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, extents, rank,
                                                                                       value);
  }
  Status* data(const Value* value, void** data) const { return entry<Status*(const Value*, void**)>(51)(value, data); }
  Status* shape(const Value* value, Shape** shape) const {
    return entry<Status*(const Value*, Shape**)>(65)(value, shape);
  }
  Status* type(const Shape* shape, int* type) const { return entry<Status*(const Shape*, int*)>(60)(shape, type); }
  Status* rank(const Shape* shape, size_t* rank) const {
    return entry<Status*(const Shape*, size_t*)>(61)(shape, rank);
  }
  Status* extents(const Shape* shape, int64_t* extents, size_t rank) const {
    return entry<Status*(const Shape*, int64_t*, size_t)>(62)(shape, extents, rank);
  }
  void release(Shape* shape) const { entry<void(Shape*)>(99)(shape); }

  Status* parallel_for(const KernelContext* context, void (*work)(void*, size_t), size_t total, void* state) const {
    return entry<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, work,
                                                                                                     total, 0, state);
  }

 private:
  template <typename Signature>
  Signature* entry(int position) const {
    return reinterpret_cast<Signature*>(table_[position]);
  }
  void* const* table_;
};

struct ApiBase {
  const void* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// What an operator registers; `version` tells ONNX Runtime how far it may read.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  int (*input_presence)(const CustomOp*, size_t);
  int (*output_presence)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_same)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_same)(const CustomOp*);
  Status* (*create_kernel_checked)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute_checked)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
};

}  // namespace quasar::ort

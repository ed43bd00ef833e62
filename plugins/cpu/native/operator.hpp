// An operator as ONNX Runtime sees it: its schema, its kernels, and tensors that come in and go out.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "abi.hpp"
#include "kernels.hpp"

namespace quasar {

using ort::Api;
using ort::KernelContext;
using ort::KernelInfo;
using ort::Status;

constexpr char kDomain[] = "quasar.cpu";
constexpr size_t kMostRank = 4;

// What kernels that are made from now on use.
inline const Level* chosen = nullptr;

// An error in the making: the first one counts.
class Checks {
 public:
  explicit Checks(const Api& api) : api_(api) {}
  bool ok() const { return status_ == nullptr; }
  Status* take() { return status_; }

  bool add(Status* status) {
    if (status == nullptr) return ok();
    if (status_ == nullptr) {
      status_ = status;
    } else {
      api_.release(status);
    }
    return false;
  }
  template <typename... Values>
  bool expect(bool holds, const char* format, Values... values) {
    if (holds || !ok()) return ok();
    char message[400];
    std::snprintf(message, sizeof message, format, values...);
    return add(api_.status(ort::kInvalidArgument, message));
  }

 private:
  const Api& api_;
  Status* status_ = nullptr;
};

// A tensor that came in. `data` is null where an optional one is not there.
struct Tensor {
  void* data = nullptr;
  int64_t extents[kMostRank] = {};
  size_t rank = 0;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  int64_t last() const { return rank == 0 ? 1 : extents[rank - 1]; }
  // Rows before the last axis.
  int64_t rows() const {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < rank; ++i) rows *= extents[i];
    return rows;
  }
  int64_t elements() const { return rank == 0 ? 1 : rows() * last(); }
};

// Where a tensor's values lie, and its extents.
inline bool describe(const Api& api, Checks& checks, const ort::Value* value, const char* name, Tensor* tensor,
                     int* type = nullptr) {
  ort::Shape* shape = nullptr;
  if (!checks.add(api.shape(value, &shape))) return false;
  if (type != nullptr) checks.add(api.type(shape, type));
  checks.add(api.rank(shape, &tensor->rank));
  if (checks.expect(tensor->rank <= kMostRank, "%s: %s has %zu axes; at most %zu are taken", kDomain, name,
                    tensor->rank, kMostRank)) {
    checks.add(api.extents(shape, tensor->extents, tensor->rank));
  }
  api.release(shape);
  if (checks.ok()) checks.add(api.data(const_cast<ort::Value*>(value), &tensor->data));
  return checks.ok();
}

inline bool read(const Api& api, Checks& checks, const KernelContext* context, size_t index, const char* name,
                 Tensor* tensor) {
  const ort::Value* value = nullptr;
  if (!checks.add(api.input(context, index, &value)) || value == nullptr) return checks.ok();
  return describe(api, checks, value, name, tensor);
}

// Refuses a constant input, as weights are, with numbers that are not finite: every token would come of them. What a
// call brings is not looked at.
inline void expect_finite(const Api& api, Checks& checks, const KernelInfo* info, size_t index, const char* op,
                          const char* name) {
  int found = 0, type = 0;
  const ort::Value* value = nullptr;
  Tensor tensor;
  if (!checks.add(api.constant(info, index, &found, &value)) || found == 0 || value == nullptr) return;
  if (!describe(api, checks, value, name, &tensor, &type)) return;
  // All bits of an exponent are infinity or no number.
  const int64_t count = tensor.elements();
  bool finite = true;
  if (type == ort::kFloat16) {
    const auto* bits = tensor.as<uint16_t>();
    for (int64_t i = 0; i < count; ++i) finite &= (bits[i] & 0x7C00) != 0x7C00;
  } else if (type == ort::kFloat) {
    const auto* bits = tensor.as<uint32_t>();
    for (int64_t i = 0; i < count; ++i) finite &= (bits[i] & 0x7F800000) != 0x7F800000;
  }
  checks.expect(finite, "%s: %s has values that are not finite: the file is damaged; copy or build the engine again",
                op, name);
}

template <typename T>
bool write(const Api& api, Checks& checks, KernelContext* context, size_t index, const int64_t* extents, size_t rank,
           T** data) {
  ort::Value* value = nullptr;
  void* memory = nullptr;
  *data = nullptr;
  if (!checks.add(api.output(context, index, extents, rank, &value)) || value == nullptr) return false;
  checks.add(api.data(value, &memory));
  *data = static_cast<T*>(memory);
  return checks.ok();
}

// Operators of one schema. `Kernel` has kName, inputs, outputs, and compute.
template <typename Kernel>
struct Operator : ort::CustomOp {
  Operator() : ort::CustomOp{} {
    version = ort::kAbiVersion;
    name = [](const CustomOp*) -> const char* { return Kernel::kName; };
    provider = [](const CustomOp*) -> const char* { return nullptr; };
    input_count = [](const CustomOp*) -> size_t { return sizeof(Kernel::kInputs) / sizeof(Kernel::kInputs[0]); };
    input_type = [](const CustomOp*, size_t i) -> int { return Kernel::kInputs[i].type; };
    input_presence = [](const CustomOp*, size_t i) -> int { return Kernel::kInputs[i].presence; };
    input_memory = [](const CustomOp*, size_t) -> int { return 0; };
    output_count = [](const CustomOp*) -> size_t { return sizeof(Kernel::kOutputs) / sizeof(Kernel::kOutputs[0]); };
    output_type = [](const CustomOp*, size_t i) -> int { return Kernel::kOutputs[i]; };
    output_presence = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
    variadic_input_min = [](const CustomOp*) -> int { return 0; };
    variadic_input_same = [](const CustomOp*) -> int { return 1; };
    variadic_output_min = [](const CustomOp*) -> int { return 0; };
    variadic_output_same = [](const CustomOp*) -> int { return 1; };
    first_version = [](const CustomOp*) -> int { return 1; };
    last_version = [](const CustomOp*) -> int { return 0x7fffffff; };
    create_kernel_checked = [](const CustomOp*, const void* table, const KernelInfo* info, void** made) -> Status* {
      const Api api(table);
      Checks checks(api);
      auto* kernel = static_cast<Kernel*>(std::malloc(sizeof(Kernel)));
      if (kernel == nullptr) return api.status(ort::kFail, "quasar.cpu: no memory for a kernel");
      *kernel = Kernel{api, chosen};
      kernel->read_attributes(checks, info);
      if (!checks.ok()) {
        std::free(kernel);
        return checks.take();
      }
      *made = kernel;
      return nullptr;
    };
    compute_checked = [](void* kernel, KernelContext* context) -> Status* {
      const auto& self = *static_cast<const Kernel*>(kernel);
      Checks checks(self.api);
      self.compute(checks, context);
      return checks.take();
    };
    destroy = [](void* kernel) { std::free(kernel); };
  }
};

struct Input {
  int type, presence;
};

}  // namespace quasar

// The operators that ONNX Runtime is given, and their registration.
#include "argmax_operator.hpp"
#include "attention_operator.hpp"
#include "export.hpp"
#include "linear_operator.hpp"

namespace quasar {
namespace {

Operator<QuantizedLinear<Form::kBytes>> linear;
Operator<QuantizedLinear<Form::kByteBlocks>> block_linear;
Operator<QuantizedLinear<Form::kNibbleBlocks>> nibble_linear;
Operator<QuantizedLinear<Form::kNibblePlanes>> nibble_plane_linear;
Operator<VerifyAttention<FloatCache>> attention;
Operator<VerifyAttention<HalfCache>> half_attention;
Operator<VerifyAttention<BfloatCache>> bfloat_attention;
Operator<VerifyAttention<Int8Cache>> int8_attention;
Operator<VerifyAttention<BothTiersCache>> both_tiers_attention;
Operator<VerifyAttention<UpperTierCache>> upper_tier_attention;
Operator<ArgMax> argmax;

}  // namespace
}  // namespace quasar

QUASAR_EXPORT quasar::ort::Status* RegisterCustomOps(quasar::ort::SessionOptions* options,
                                                     const quasar::ort::ApiBase* base) {
  using namespace quasar;
  const void* table = base->get_api(ort::kAbiVersion);
  if (table == nullptr) {
    // Version 1 is always there; only its first entry is needed to say no.
    const ort::Api old(base->get_api(1));
    char message[200];
    std::snprintf(message, sizeof message, "quasar.cpu: ONNX Runtime %s is too old; 1.17 or newer was expected",
                  base->get_version());
    return old.status(ort::kFail, message);
  }
  const ort::Api api(table);
  chosen = choose_level();
  if (chosen == nullptr) {
    return api.status(ort::kFail, "quasar.cpu: QUASAR_CPU_LEVEL names a level that is unknown or that this CPU lacks");
  }
  ort::Domain* domain = nullptr;
  if (ort::Status* status = api.create_domain(kDomain, &domain)) return status;
  const ort::CustomOp* operators[] = {
      &linear,           &block_linear,   &nibble_linear,        &nibble_plane_linear,  &attention, &half_attention,
      &bfloat_attention, &int8_attention, &both_tiers_attention, &upper_tier_attention, &argmax};
  for (const ort::CustomOp* op : operators) {
    if (ort::Status* status = api.add_operator(domain, op)) return status;
  }
  return api.add_domain(options, domain);
}

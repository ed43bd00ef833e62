// W8A8Linear, W8A8BlockLinear, W4A8BlockLinear and W4A16BlockLinear: checks of everything that comes in, and the phases of a call.
#pragma once

#include "operator.hpp"
#include "team.hpp"

namespace quasar {

// |q * (w + 128)| sums to at most 127 * 255 * inputs in 32 bits.
constexpr int64_t kMostInputs = 65536;

// x [..., K] float → [..., N] float.
template <Form kForm>
struct QuantizedLinear {
  static constexpr bool kBlocks = kForm != Form::kBytes, kPlanes = kForm == Form::kNibblePlanes;
  static constexpr bool kNibbles = kPlanes || kForm == Form::kNibbleBlocks;
  static constexpr const char* kName = kPlanes    ? "W4A16BlockLinear"
                                       : kNibbles ? "W4A8BlockLinear"
                                       : kBlocks  ? "W8A8BlockLinear"
                                                  : "W8A8Linear";
  static constexpr Input kInputs[] = {{ort::kFloat, ort::kRequired},
                                      {ort::kUint8, ort::kRequired},
                                      {kNibbles ? ort::kFloat16 : ort::kFloat, ort::kRequired},
                                      {ort::kFloat, ort::kOptional},
                                      {ort::kFloat, ort::kOptional},
                                      {ort::kFloat, ort::kOptional}};
  static constexpr int kOutputs[] = {ort::kFloat};
  static constexpr const char* kNames[] = {"x", "packed", "scale", "bias", "residual", "norm"};

  Api api;
  const Level* level;
  int64_t outputs = 0, gate = 0, group = kBlock, offsets = 0;
  float epsilon = 0.0f;

  void read_attributes(Checks& checks, const KernelInfo* info) {
    checks.add(api.attribute(info, "outputs", &outputs));
    // Engines of earlier versions have `swiglu` there, 0 or 1.
    if (ort::Status* missing = api.attribute(info, "gate", &gate)) {
      api.release(missing);
      checks.add(api.attribute(info, "swiglu", &gate));
    }
    checks.add(api.attribute(info, "epsilon", &epsilon));
    if (kNibbles) {
      checks.add(api.attribute(info, "group_size", &group));
      // Engines of earlier versions have none.
      if (ort::Status* missing = api.attribute(info, "offsets", &offsets)) api.release(missing);
    }
    checks.expect(offsets == 0 || offsets == 1, "%s: offsets %lld came; 0 or 1 was expected", kName,
                  static_cast<long long>(offsets));
    checks.expect(group >= kBlock && group % kBlock == 0 && group <= kMostInputs,
                  "%s: a group of %lld inputs came; a multiple of 32 was expected", kName,
                  static_cast<long long>(group));
    checks.expect(outputs > 0 && outputs < (1 << 30), "%s: %lld outputs came; a positive number was expected", kName,
                  static_cast<long long>(outputs));
    checks.expect(gate >= 0 && gate <= 2, "%s: gate %lld came; 0 (none), 1 (silu) or 2 (gelu) was expected", kName,
                  static_cast<long long>(gate));
    expect_finite(api, checks, info, 2, kName, kNames[2]);
    expect_finite(api, checks, info, 3, kName, kNames[3]);
    expect_finite(api, checks, info, 5, kName, kNames[5]);
  }

  void compute(Checks& checks, KernelContext* context) const {
    Tensor x, packed, scale, bias, residual, norm;
    Tensor* const parts[] = {&x, &packed, &scale, &bias, &residual, &norm};
    for (size_t index = 0; index < 6; ++index) {
      if (!read(api, checks, context, index, kNames[index], parts[index])) return;
    }
    const int64_t inputs = x.last(), rows = x.rows();
    // Bytes of four inputs of a column.
    const int64_t four = kNibbles ? 2 : 4, step = kBlocks ? kBlock : 4;
    const int64_t padded = (inputs + step - 1) / step * step;
    const int64_t columns = gate != 0 ? 2 * outputs : outputs;
    const int64_t tiles = (outputs + kTile - 1) / kTile * (gate != 0 ? 2 : 1);
    checks.expect(x.rank >= 1 && inputs >= 1 && inputs <= kMostInputs,
                  "%s: rows of %lld values came; 1 to %lld expected", kName, static_cast<long long>(inputs),
                  static_cast<long long>(kMostInputs));
    checks.expect(!kPlanes || inputs == padded, "%s: rows of %lld values came; a multiple of 32 was expected", kName,
                  static_cast<long long>(inputs));
    checks.expect(packed.rank == 4 && packed.extents[0] == tiles && packed.extents[1] == padded / 4 &&
                      packed.extents[2] == kTile * four / 4 && packed.extents[3] == 4,
                  "%s: packed weights are [%lld, %lld, %lld, %lld]; [%lld, %lld, %lld, 4] was expected", kName,
                  static_cast<long long>(packed.extents[0]), static_cast<long long>(packed.extents[1]),
                  static_cast<long long>(packed.extents[2]), static_cast<long long>(packed.extents[3]),
                  static_cast<long long>(tiles), static_cast<long long>(padded / 4),
                  static_cast<long long>(kTile * four / 4));
    const int64_t of_group = offsets != 0 ? 2 * kTile : kTile;
    const int64_t scales = kBlocks ? tiles * ((padded + group - 1) / group) * of_group : columns;
    checks.expect(scale.elements() == scales, "%s: %lld scales came; %lld were expected", kName,
                  static_cast<long long>(scale.elements()), static_cast<long long>(scales));
    checks.expect(bias.data == nullptr || bias.elements() == columns,
                  "%s: a bias of %lld values came; %lld were expected", kName, static_cast<long long>(bias.elements()),
                  static_cast<long long>(columns));
    checks.expect(residual.data == nullptr || (residual.elements() == rows * outputs),
                  "%s: a residual of %lld values came; %lld were expected", kName,
                  static_cast<long long>(residual.elements()), static_cast<long long>(rows * outputs));
    checks.expect(norm.data == nullptr || norm.elements() == inputs,
                  "%s: a norm of %lld values came; %lld were expected", kName, static_cast<long long>(norm.elements()),
                  static_cast<long long>(inputs));
    checks.expect(rows < (1 << 24), "%s: %lld rows came; fewer than 2^24 were expected", kName,
                  static_cast<long long>(rows));
    if (!checks.ok()) return;

    Linear op{};
    op.level = level;
    int64_t extents[kMostRank];
    for (size_t i = 0; i < x.rank; ++i) extents[i] = x.extents[i];
    extents[x.rank - 1] = outputs;
    if (!write(api, checks, context, 0, extents, x.rank, &op.y) || rows == 0) return;
    op.rows = static_cast<int>(rows);
    op.inputs = static_cast<int>(inputs);
    op.outputs = static_cast<int>(outputs);
    op.padded = static_cast<int>(padded);
    op.tiles = static_cast<int>(tiles);
    op.gate = static_cast<Gate>(gate);
    op.form = kForm;
    op.group = static_cast<int>(group);
    op.offsets = offsets != 0;
    op.x = x.as<float>();
    op.norm = norm.as<float>();
    op.epsilon = epsilon;
    op.packed = packed.as<uint8_t>();
    op.scale = scale.as<float>();
    op.group_scale = scale.as<Half>();
    op.bias = bias.as<float>();
    op.residual = residual.as<float>();

    const size_t groups = static_cast<size_t>(rows) * (kBlocks ? padded / kBlock : 1), planes = kPlanes ? 2 : 1;
    const size_t bytes = planes * static_cast<size_t>(rows * padded);
    const size_t values = op.norm != nullptr ? rows * inputs : 0, sums = op.offsets ? groups : 0;
    Scratch scratch;
    if (!checks.expect(scratch.reserve(Scratch::size<int8_t>(bytes) + Scratch::size<float>(groups) +
                                       Scratch::size<int32_t>(planes * groups) + Scratch::size<float>(sums) +
                                       Scratch::size<float>(values)),
                       "%s: no memory for %lld rows", kName, static_cast<long long>(rows))) {
      return;
    }
    op.q = scratch.take<int8_t>(bytes);
    op.amax = scratch.take<float>(groups);
    op.offset = scratch.take<int32_t>(planes * groups);
    op.sums = scratch.take<float>(sums);
    op.normed = scratch.take<float>(values);

    struct Work {
      Linear op;
      Pieces pieces;
    } work{op, Pieces(static_cast<int>((outputs + kTile - 1) / kTile))};
    Phase phases[2] = {{[](void* state, int piece) {
                          const Work& work = *static_cast<Work*>(state);
                          work.op.level->prepare_row(work.op, piece);
                        },
                        &work, op.rows},
                       {[](void* state, int piece) {
                          const Work& work = *static_cast<Work*>(state);
                          work.op.level->multiply_tiles(work.op, work.pieces.first(piece),
                                                        work.pieces.first(piece + 1));
                        },
                        &work, work.pieces.count()}};
    checks.add(quasar::run(api, context, phases, 2));
  }
};

}  // namespace quasar

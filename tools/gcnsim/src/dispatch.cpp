// Runs a launch: workgroups one after another, the waves of a workgroup from barrier to barrier. And the C interface.
//
// Initial registers: LLVM AMDGPU usage guide, "Initial Kernel Execution State".
#include <memory>

#include "state.h"

namespace {

const Opcodes& opcodes() {
  static const Opcodes table = [] {
    Opcodes ops;
    for (auto add :
         {add_scalar, add_scalar_float, add_scalar_control, add_vector, add_vector_special, add_vector_compare,
          add_vector_packed, add_float8, add_lanes, add_matrix, add_lds, add_memory, add_atomics})
      add(ops);
    return ops;
  }();
  return table;
}

constexpr u32 kSharedAperture = 0x10000, kPrivateAperture = 0x20000;  // upper halves of addresses nobody else has

std::unique_ptr<Wave> make_wave(Workgroup& group, u32 id, const u32 (&workgroup)[3]) {
  Launch& launch = group.launch;
  auto wave = std::make_unique<Wave>();
  Wave& w = *wave;
  for (auto& reg : w.v)
    for (u32& lane : reg) lane = launch.poison;
  for (u32& reg : w.s) reg = launch.poison;
  w.scc = w.state = w.epoch = 0;
  w.executed = 0;
  w.pc = launch.entry;
  w.lanes = launch.lanes;
  w.id = id;
  w.gfx = launch.gfx;
  w.clears_high = w.is_cdna();
  w.group = &group;
  w.scratch.assign(size_t(launch.lanes) * launch.scratch_bytes, 0xee);
  for (u32 k = 0; k < launch.user_sgprs; k++) w.s[k] = launch.user_values[k];
  if (w.gfx >= 0x1200) {  // trap temporaries
    w.s[kTtmp0 + 9] = workgroup[0];
    w.s[kTtmp0 + 7] = workgroup[1] | workgroup[2] << 16;
    w.s[kTtmp0 + 8] = id << 25;
  } else {
    u32 next = launch.user_sgprs;
    for (int axis = 0; axis < 3; axis++)
      if (launch.workgroup_ids >> axis & 1) w.s[next++] = workgroup[axis];
    if (launch.workgroup_ids >> 3 & 1) w.s[next] = 0;  // scratch offset of the wave
  }
  w.s[kSharedBase] = w.s[kPrivateBase] = 0;
  w.s[kSharedBase + 1] = kSharedAperture;
  w.s[kPrivateBase + 1] = kPrivateAperture;
  const u32* block = launch.block;
  u32 threads = block[0] * block[1] * block[2], active = threads - id * w.lanes;
  u64 exec = active >= w.lanes ? ~0ull : (1ull << active) - 1;
  w.s[kExec] = u32(exec);
  w.s[kExec + 1] = w.lanes == 64 ? u32(exec >> 32) : 0;
  for (u32 lane = 0; lane < w.lanes; lane++) {
    u32 thread = id * w.lanes + lane;
    w.v[0][lane] = thread % block[0] | thread / block[0] % block[1] << 10 | thread / (block[0] * block[1]) << 20;
  }
  return wave;
}

// A VOPD pair: both halves read before either writes. The second runs on the old value of the first's destination.
void run_dual(Wave& w, const Instruction& first, const Instruction& second) {
  u32 old[kLanes], result[kLanes];
  u32* target = w.v[first.dst.index];
  std::memcpy(old, target, sizeof(old));
  first.handler(w, first);
  std::memcpy(result, target, sizeof(result));
  std::memcpy(target, old, sizeof(old));
  second.handler(w, second);
  std::memcpy(target, result, sizeof(result));
}

void run_wave(Wave& w, u64 limit) {
  Launch& launch = w.group->launch;
  u64 executed = 0;
  w.state = kRunning;
  while (w.state == kRunning) {
    if (w.pc >= launch.instructions) {
      w.state = kLost;
      break;
    }
    const Instruction& i = launch.program[w.pc++];
    if (launch.histogram) launch.histogram[i.number]++;
    if (i.dual) {
      const Instruction& second = launch.program[w.pc++];
      if (launch.histogram) launch.histogram[second.number]++;
      run_dual(w, i, second);
      executed++;
    } else {
      i.handler(w, i);
    }
    if (++executed >= limit && w.state == kRunning) w.state = kOutOfQuantum;
  }
  w.executed += executed;
  launch.executed += executed;
}

Status run_workgroup(Workgroup& group, const u32 (&workgroup)[3]) {
  Launch& launch = group.launch;
  u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  u32 count = (threads + launch.lanes - 1) / launch.lanes;
  std::vector<std::unique_ptr<Wave>> waves;
  for (u32 id = 0; id < count; id++) waves.push_back(make_wave(group, id, workgroup));
  u64 limit = launch.executed + launch.max_instructions;
  while (true) {
    u32 ended = 0, waiting = 0;
    for (auto& wave : waves) {
      if (wave->state == kRunning || wave->state == kOutOfQuantum)
        run_wave(*wave, launch.quantum ? launch.quantum : launch.max_instructions);
      launch.stopped_at = wave->pc ? wave->pc - 1 : 0;
      if (wave->state == kLost) return kBadBranch;
      if (launch.executed > limit || (!launch.quantum && wave->state == kOutOfQuantum)) return kInstructionLimit;
      ended += wave->state == kEnded;
      waiting += wave->state == kAtBarrier;
    }
    if (ended == count) return kFinished;
    if (ended + waiting < count) continue;  // some have used up their quantum
    if (ended) {
      for (auto& wave : waves)
        if (wave->state == kAtBarrier) launch.stopped_at = wave->pc - 1;
      return kBarrierDivergence;
    }
    for (auto& wave : waves) wave->state = kRunning;
  }
}

}  // namespace

extern "C" {

// Sizes of the shared structures: operand, instruction, region, error, launch.
u32 gcnsim_size(u32 which) {
  const u32 sizes[] = {sizeof(Operand), sizeof(Instruction), sizeof(Region), sizeof(Error), sizeof(Launch)};
  return which < 5 ? sizes[which] : 0;
}

// The handler of a mnemonic, null if it is not implemented.
void* gcnsim_handler(const char* mnemonic) {
  auto found = opcodes().table().find(mnemonic);
  return found == opcodes().table().end() ? nullptr : reinterpret_cast<void*>(found->second);
}

// All mnemonics, one a line.
const char* gcnsim_mnemonics() {
  static const std::string all = [] {
    std::string text;
    for (const auto& [name, handler] : opcodes().table()) text += name + "\n";
    return text;
  }();
  return all.c_str();
}

// Run all workgroups; results are in the launch.
void gcnsim_run(Launch* launch) {
  launch->status = kFinished;
  launch->num_errors = launch->dropped = launch->stopped_at = 0;
  launch->executed = 0;
  for (u32 k = 0; k < launch->instructions; k++)
    if (!launch->program[k].handler) {
      launch->status = kUnknownInstruction;
      launch->stopped_at = k;
      return;
    }
  u32 at[3];
  for (at[2] = 0; at[2] < launch->grid[2]; at[2]++)
    for (at[1] = 0; at[1] < launch->grid[1]; at[1]++)
      for (at[0] = 0; at[0] < launch->grid[0]; at[0]++) {
        Workgroup group{*launch, std::vector<u8>(launch->lds_bytes, 0xee),
                        std::vector<LdsShadow>(launch->lds_bytes / 4 + 1)};
        launch->status = run_workgroup(group, at);
        if (launch->status != kFinished) return;
      }
}
}

// What the simulator is made of: operands, instructions, waves, workgroups, errors, and the table of opcodes.
//
// Operand, Instruction and Launch are filled by the Python front end (tools/gcnsim/structures.py); gcnsim_sizes() lets
// it check that both sides agree.
#pragma once

#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "types.h"

constexpr int kLanes = 64;  // wave32 uses the lower half

// Scalar register file: SGPRs, then the special registers by their number in the instruction encoding where they have
// one (AMD CDNA3 ISA, "Scalar ALU operands"); the apertures get numbers of our own.
enum Special : u16 {
  kVcc = 106,
  kTtmp0 = 108,
  kExec = 126,
  kM0 = 128,
  kSharedBase = 130,
  kPrivateBase = 132,
  kSccOperand = 138
};
constexpr int kScalars = 160;
constexpr int kVectors = 512;  // VGPRs, and from 256 on AGPRs

enum Kind : u8 { kNone, kScalar, kVector, kInteger, kReal, kLiteral };

// Where a value comes from or goes to.
struct Operand {
  u8 kind;   // Kind
  u8 count;  // number of registers
  u8 negate, absolute;
  u8 sign_extend;  // SDWA
  u8 select;       // SDWA: 0-3 a byte, 4-5 a half, 6 all
  u16 index;       // register number
  i64 integer;
  f64 real;
};

struct Wave;
struct Instruction;
using Handler = void (*)(Wave&, const Instruction&);

enum Dpp : u8 {
  kNoDpp,
  kQuadPerm,
  kRowShl,
  kRowShr,
  kRowRor,
  kRowMirror,
  kRowHalfMirror,
  kRowBcast,
  kRowShare,
  kRowXmask,
  kWaveShl,
  kWaveRol,
  kWaveShr,
  kWaveRor,
  kDpp8,
};

struct Instruction {
  Handler handler;
  u64 address;  // byte address in the code object, 0 where the program came from text
  u32 number;   // position in the program, for reports
  u32 target;   // branches: position of the target
  u32 opcode;   // position in the front end's list of mnemonics
  u32 dual;     // first half of a VOPD pair; the second follows
  Operand dst, dst2, src[5];
  i32 offset0, offset1;
  i32 dpp_argument;
  u16 op_sel, op_sel_hi, neg_lo, neg_hi;
  u8 clamp, omod, dpp, bound_ctrl, fetch_inactive, row_mask, bank_mask;
  u8 sdwa, sdwa_dst, sdwa_unused;
  u8 offen, idxen, lds, returns;  // memory: `lds` loads straight to LDS, `returns` an atomic's old value
  u8 bitop, cbsz, blgp;
};

// A piece of memory that the kernel may touch: [low, high).
struct Region {
  u64 low, high;
  u32 writable, padding;
};

enum ErrorKind : u32 { kReadOutside = 1, kWriteOutside, kLdsOutside, kLdsRace, kScratchOutside, kUnsupported };
enum RaceKind : u64 { kReadAfterWrite = 0, kWriteAfterWrite = 1, kWriteAfterRead = 2 };

struct Error {
  u32 kind, instruction;
  u64 address, detail;
  u32 lane, wave;
};

// Per dword of LDS: who wrote and read it last, and what was written. 0 is nobody, else 64 * epoch + wave + 1.
struct LdsShadow {
  u32 writer, reader, value;
};

// Static description of a launch, shared with the front end.
struct Launch {
  const Instruction* program;
  u32 instructions, entry;
  u32 lanes, gfx;  // 64 or 32; 0x90a, 0x942, 0x950, 0x1100, 0x1201
  u32 grid[3], block[3];
  u32 lds_bytes, scratch_bytes;
  u32 user_sgprs;  // number of SGPRs in user_values
  u32 user_values[32];
  u32 workgroup_ids;  // bits 0 to 2: x, y, z follow the user SGPRs; bit 3: then a scratch offset
  u32 poison;         // initial content of registers
  u32 check_races, count_banks;
  u32 quantum;  // > 0: waves take turns after this many instructions
  Region* regions;
  u32 num_regions;
  u32 max_errors;
  Error* errors;
  u64 max_instructions;  // per workgroup
  u64* histogram;        // per instruction of the program: times executed (null: not counted)
  u64* bank_cycles;      // per instruction of the program
  u64* bank_ideal;
  // Results.
  u32 num_errors, status;  // status: Status
  u32 stopped_at;          // instruction at which an unfinished wave stands
  u32 dropped;             // buffer accesses beyond the descriptor's size: these read 0 on hardware
  u64 executed;
};

enum Status : u32 { kFinished, kBarrierDivergence, kInstructionLimit, kBadBranch, kUnknownInstruction };

struct Workgroup {
  Launch& launch;
  std::vector<u8> lds;
  std::vector<LdsShadow> shadow;
};

enum WaveState : u32 { kRunning, kEnded, kAtBarrier, kOutOfQuantum, kLost };

struct Wave {
  alignas(64) u32 v[kVectors][kLanes];
  u32 s[kScalars];
  u32 scc, pc, state;
  u32 lanes, id, gfx;
  u32 epoch;         // barriers passed
  bool clears_high;  // 16-bit results clear the register's upper half (gfx9); they keep it on RDNA
  Workgroup* group;
  std::vector<u8> scratch;  // lane-major
  u64 executed;

  u64 exec() const { return lanes == 64 ? u64(s[kExec + 1]) << 32 | s[kExec] : s[kExec]; }
  void set_exec(u64 mask) {
    s[kExec] = u32(mask);
    if (lanes == 64) s[kExec + 1] = u32(mask >> 32);
  }
  u64 vcc() const { return lanes == 64 ? u64(s[kVcc + 1]) << 32 | s[kVcc] : s[kVcc]; }
  bool is_cdna() const { return gfx < 0x1000; }

  void error(ErrorKind kind, const Instruction& i, u64 address, u32 lane, u64 detail = 0) {
    Launch& launch = group->launch;
    u32 count = launch.num_errors++;
    if (count < launch.max_errors) launch.errors[count] = {kind, i.number, address, detail, lane, id};
  }
};

// Mnemonic -> function. Encoding suffixes (_e32, _e64, _dpp, _sdwa) are not part of the mnemonic.
class Opcodes {
 public:
  void add(const char* name, Handler handler) { table_[name] = handler; }
  void add(std::initializer_list<const char*> names, Handler handler) {
    for (const char* name : names) table_[name] = handler;
  }
  const std::map<std::string, Handler>& table() const { return table_; }

 private:
  std::map<std::string, Handler> table_;
};

void add_scalar(Opcodes&);
void add_scalar_float(Opcodes&);
void add_scalar_control(Opcodes&);
void add_vector(Opcodes&);
void add_vector_special(Opcodes&);
void add_vector_compare(Opcodes&);
void add_vector_packed(Opcodes&);
void add_float8(Opcodes&);
void add_lanes(Opcodes&);
void add_matrix(Opcodes&);
void add_lds(Opcodes&);
void add_memory(Opcodes&);
void add_atomics(Opcodes&);

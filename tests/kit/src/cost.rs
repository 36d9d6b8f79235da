//! What the kernel half costs the kernel: size, the verifier's work, stack and map memory, as this
//! kernel reports them.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya_obj::Object;
use aya_obj::generated::{bpf_func_id, bpf_insn};

use balancer::dataplane::{GOAWAY, PLACED_SOCKETS, Program, open_detached};
use testbpf::{Functions, Instruction, ProgramSpec};

/// What a kernel half costs.
#[derive(Clone, Debug)]
pub struct Cost {
    /// By name.
    pub programs: Vec<ProgramCost>,
    /// The bytes of every map, by name: those that are there once, and the scratch that each
    /// instance of `steer` has.
    pub maps: Vec<(String, u64)>,
}

impl Cost {
    /// The bytes of all maps together.
    pub fn map_bytes(&self) -> u64 {
        self.maps.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// What one program costs.
#[derive(Clone, Debug)]
pub struct ProgramCost {
    /// Its name, such as `steer`.
    pub name: String,
    /// How many instructions it has: 8 bytes each.
    pub size: usize,
    /// How many instructions the verifier went through: at most a million.
    pub verified: u32,
    /// How much stack its functions take.
    pub stack: Stack,
}

/// How much stack each function of a program takes, and which others it calls. The first one is the
/// program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Bytes, as they were when the verifier summed them up.
    pub frames: Vec<u32>,
    /// The functions that each one calls, or gives to a helper that does.
    pub calls: Vec<Vec<usize>>,
}

impl Stack {
    /// The most that a chain of calls may take (`MAX_BPF_STACK`, include/linux/filter.h).
    pub const LIMIT: u32 = 512;
    /// What frames are rounded up to in that sum (`check_max_stack_depth`, kernel/bpf/verifier.c)
    /// before Linux 6.8. Later ones round to 16 where the program is compiled to machine code: what
    /// fits by this rule fits everywhere.
    pub const ROUNDING: u32 = 32;

    /// The chain of calls that takes the most, and how many bytes that is: by the rule of Linux
    /// 6.1, for which an empty frame counts as one byte.
    pub fn deepest(&self) -> (u32, Vec<usize>) {
        self.deepest_from(0)
    }

    fn deepest_from(&self, function: usize) -> (u32, Vec<usize>) {
        // The verifier takes no recursion, so this ends.
        let below = self.calls[function]
            .iter()
            .map(|called| self.deepest_from(*called));
        let (bytes, chain) = below.max().unwrap_or_default();
        let own = self.frames[function]
            .max(1)
            .next_multiple_of(Self::ROUNDING);
        (bytes + own, [vec![function], chain].concat())
    }

    /// From the verifier's statistics and the instructions that it was given.
    fn read(log: &str, instructions: &[Instruction]) -> Option<Self> {
        let mut frames = frames(log)?;
        let starts = starts(instructions);
        // A function that the verifier found to be out of reach is gone.
        if starts.len() != frames.len() {
            return None;
        }
        let owner = |at: usize| starts.partition_point(|start| *start <= at) - 1;
        let mut loops: Vec<_> = loops(instructions).map(owner).collect();
        loops.dedup();
        for function in loops {
            frames[function] = frames[function].saturating_sub(INLINED_LOOP);
        }
        let mut calls = vec![Vec::new(); starts.len()];
        for (from, to) in calls_of(instructions) {
            let (from, to) = (owner(from), owner(to));
            if !calls[from].contains(&to) {
                calls[from].push(to);
            }
        }
        Some(Self { frames, calls })
    }
}

/// The bytes of each function's frame, in the order of the functions: `stack depth 192+48+0`; since
/// Linux 7.3 a line for each, `subprog 1 (account_rule) global insns_self 303 insns_total 716 stack
/// 48`.
fn frames(log: &str) -> Option<Vec<u32>> {
    let each: Vec<_> = log
        .lines()
        .filter(|line| line.starts_with("subprog "))
        .map(|line| line.rsplit_once(" stack ")?.1.trim().parse().ok())
        .collect::<Option<_>>()?;
    if !each.is_empty() {
        return Some(each);
    }
    let sum = log
        .lines()
        .find_map(|line| line.strip_prefix("stack depth "))?;
    let frames = sum.split_whitespace().next()?.split('+');
    frames.map(|frame| frame.parse().ok()).collect()
}

/// What a function's frame grows by when the verifier puts `bpf_loop` in its place
/// (`optimize_bpf_loop`, kernel/bpf/verifier.c): three registers. It does so for each of ours, as
/// they have one callback and no flags; after it has summed the frames up, but before it reports
/// them.
const INLINED_LOOP: u32 = 24;

/// The calls of `bpf_loop`.
fn loops(instructions: &[Instruction]) -> impl Iterator<Item = usize> {
    let is_loop = |instruction: &Instruction| {
        (instruction.code, instruction.registers >> 4) == (0x85, 0)
            && instruction.immediate == bpf_func_id::BPF_FUNC_loop as i32
    };
    (0..instructions.len()).filter(move |at| is_loop(&instructions[*at]))
}

/// The instructions that refer to a function, and where that one begins: `BPF_PSEUDO_CALL` and
/// `BPF_PSEUDO_FUNC`.
fn calls_of(instructions: &[Instruction]) -> impl Iterator<Item = (usize, usize)> {
    let target = |(at, instruction): (usize, &Instruction)| {
        let source = instruction.registers >> 4;
        let refers = matches!((instruction.code, source), (0x85, 1) | (0x18, 4));
        let to = at.checked_add_signed(isize::try_from(instruction.immediate).ok()?)? + 1;
        refers.then_some((at, to))
    };
    instructions.iter().enumerate().filter_map(target)
}

fn starts(instructions: &[Instruction]) -> Vec<usize> {
    let called = calls_of(instructions).map(|(_, to)| to);
    let mut starts: Vec<usize> = called.chain([0]).collect();
    starts.sort_unstable();
    starts.dedup();
    starts
}

/// Loads the programs of a kernel half, the object file as `cargo xtask build` made it, for what
/// this kernel says of them, and lets go of them. Nothing is attached.
///
/// # Errors
/// When the kernel refuses something, or its report isn't understood.
pub fn measure(object: &[u8]) -> Result<Cost> {
    let (made, bpffs) = open_detached(object)?;
    let mut programs = programs(object, &made)?;
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Cost {
        programs,
        maps: maps(&made, bpffs.path())?,
    })
}

/// aya offers the log of a program only where it was refused, so this links the same object to the
/// same maps and loads it by hand.
fn programs(object: &[u8], made: &Ebpf) -> Result<Vec<ProgramCost>> {
    let mut object = Object::parse(object)?;
    let maps = std::mem::take(&mut object.maps);
    let maps: Vec<_> = made
        .maps()
        .filter_map(|(name, map)| Some((name, number(data(map)?), maps.get(name)?)))
        .collect();
    let features = aya::features();
    let types = features.btf().context("this kernel takes no BTF")?;
    let types = object
        .fixup_and_sanitize_btf(types)?
        .context("the kernel half has no type information")?;
    let types =
        testbpf::btf_load(&types.to_bytes()).context("the kernel refused the type information")?;
    let sections: HashSet<_> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    object.relocate_maps(maps.into_iter(), &sections)?;
    object.relocate_calls(&sections)?;
    object.sanitize_functions(features);
    object
        .programs
        .iter()
        // One has to be told what it goes over, costs next to nothing, and no connection runs it.
        // The other is attached to no hook, and a connection runs it while it is moved.
        .filter(|(name, _)| ![PLACED_SOCKETS, GOAWAY].contains(&name.as_str()))
        .map(|(name, program)| {
            let function = &object.functions[&program.function_key()];
            let instructions: Vec<_> = function.instructions.iter().copied().map(plain).collect();
            let starts = function.func_info.func_info.iter();
            let starts: Vec<_> = starts.map(|info| [info.insn_off, info.type_id]).collect();
            let row = Program::named(name)
                .with_context(|| format!("the program `{name}` is not in the table of programs"))?;
            measure_program(&ProgramSpec {
                kind: row.hook.program_type().into(),
                attach_type: Some(row.hook.attach_type()),
                name,
                instructions: &instructions,
                functions: Some(Functions {
                    btf: types.as_fd(),
                    starts: &starts,
                }),
            })
        })
        .collect()
}

fn measure_program(spec: &ProgramSpec<'_>) -> Result<ProgramCost> {
    let (program, log) = testbpf::prog_load_with_statistics(spec)
        // Once more, for the verifier's reasons.
        .or_else(|error| testbpf::prog_load(spec).and(Err(error)))
        .with_context(|| format!("the kernel refused the program `{}`", spec.name))?;
    let stack = Stack::read(&log, spec.instructions).with_context(|| {
        format!(
            "the verifier's report on `{}` is not understood:\n{log}",
            spec.name
        )
    })?;
    Ok(ProgramCost {
        name: spec.name.to_owned(),
        size: spec.instructions.len(),
        verified: testbpf::verified_instructions(&program)?,
        stack,
    })
}

fn plain(instruction: bpf_insn) -> Instruction {
    Instruction {
        code: instruction.code,
        registers: instruction.src_reg() << 4 | instruction.dst_reg(),
        offset: instruction.off,
        immediate: instruction.imm,
    }
}

/// Every map that the kernel half makes has one of these types.
fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data)
        | Map::SockMap(data)
        | Map::Unsupported(data) => Some(data),
        _ => None,
    }
}

fn number(map: &MapData) -> RawFd {
    map.fd().as_fd().as_raw_fd()
}

/// The bytes of every map.
fn maps(object: &Ebpf, directory: &Path) -> Result<Vec<(String, u64)>> {
    let mut maps: Vec<_> = object
        .maps()
        .map(|(name, map)| {
            let data =
                data(map).with_context(|| format!("the map {name} is of an unknown type"))?;
            Ok((name.to_owned(), map_bytes(data)?))
        })
        .collect::<Result<_>>()?;
    maps.sort();
    let pinned = fs::read_dir(directory)?.count();
    ensure!(
        maps.len() >= pinned,
        "{pinned} maps are pinned, but only {} known",
        maps.len()
    );
    Ok(maps)
}

/// `memlock` in the descriptor's /proc file (`bpf_map_show_fdinfo`, kernel/bpf/syscall.c): since
/// Linux 6.4 what the map really takes, before that an estimate from its number of elements.
fn map_bytes(map: &MapData) -> Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", number(map));
    let info = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    info.lines()
        .find_map(|line| line.strip_prefix("memlock:"))
        .and_then(|bytes| bytes.trim().parse().ok())
        .with_context(|| format!("{path} has no memlock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Instruction = Instruction {
        code: 0xb7,
        registers: 0,
        offset: 0,
        immediate: 0,
    };

    fn refer(code: u8, source: u8, distance: i32) -> Instruction {
        Instruction {
            code,
            registers: source << 4,
            offset: 0,
            immediate: distance,
        }
    }

    #[test]
    fn the_deepest_chain_is_that_of_linux_6_1() {
        // 0 calls the one at 4 and gives that at 6 to a helper; the one at 4 calls that at 6.
        let instructions = [
            refer(0x85, 1, 3),
            refer(0x18, 4, 4),
            NOTHING,
            refer(0x85, 0, 181),
            refer(0x85, 1, 1),
            NOTHING,
            NOTHING,
        ];
        let log =
            "verification time 5 usec\nstack depth 57+0+264\nprocessed 9 insns (limit 1000000)\n";
        let stack = Stack::read(log, &instructions).expect("understood");
        assert_eq!(stack.frames, [33, 0, 264]);
        assert_eq!(stack.calls, [vec![1, 2], vec![2], vec![]]);
        assert_eq!(stack.deepest(), (64 + 32 + 288, vec![0, 1, 2]));
    }

    #[test]
    fn the_frames_are_read_as_either_kernel_prints_them() {
        let older = "verification time 5 usec\nstack depth 192+48+0\nprocessed 9 insns\n";
        assert_eq!(frames(older), Some(vec![192, 48, 0]));
        let newer = "verification time 5 usec\nstack depth max 240\n\
                     subprog 0 (account) main insns_self 1577 insns_total 1768 stack 192\n\
                     subprog 1 (account_rule) global insns_self 303 insns_total 716 stack 48\n\
                     processed 9 insns\n";
        assert_eq!(frames(newer), Some(vec![192, 48]));
        assert_eq!(frames("stack depth max 240\n"), None);
    }

    #[test]
    fn another_number_of_frames_than_of_functions_is_not_understood() {
        assert_eq!(Stack::read("stack depth 8+8\n", &[NOTHING]), None);
        assert_eq!(Stack::read("", &[NOTHING]), None);
    }
}

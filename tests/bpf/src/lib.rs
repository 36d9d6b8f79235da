//! BPF programs and maps that tests write out by hand, without a compiler: what the balancer never
//! does itself.
#![expect(unsafe_code, reason = "bpf(2) takes addresses")]

use std::{
    ffi::{CStr, c_char},
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    time::Duration,
};

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_map_type, bpf_prog_type};

/// The longest name that the kernel keeps, without its closing zero (`BPF_OBJ_NAME_LEN`).
const LONGEST_NAME: usize = 15;

/// Attaches a program to a cgroup without a link (`BPF_PROG_ATTACH`), which can forbid others: it
/// stays until [`cgroup_detach`] or the end of the cgroup. The balancer attaches nothing so, but
/// has to get along with programs that are.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`, or where a program sits on the cgroup or above it that forbids
/// this one; `EINVAL` where the program or a flag doesn't fit.
pub fn cgroup_attach(
    program: impl AsFd,
    cgroup: impl AsFd,
    attach_type: bpf_attach_type,
    flags: u32,
) -> io::Result<()> {
    let mut attr = zeroed();
    attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = number(cgroup.as_fd());
    attr.__bindgen_anon_5.attach_bpf_fd = number(program.as_fd());
    attr.__bindgen_anon_5.attach_type = attach_type as u32;
    attr.__bindgen_anon_5.attach_flags = flags;
    // SAFETY: the command takes descriptors and numbers, and no address.
    unsafe { bpf(bpf_cmd::BPF_PROG_ATTACH, &mut attr) }.map(drop)
}

/// Takes off a cgroup what [`cgroup_attach`] has put there (`BPF_PROG_DETACH`).
///
/// # Errors
/// `ENOENT` where it isn't there.
pub fn cgroup_detach(
    program: impl AsFd,
    cgroup: impl AsFd,
    attach_type: bpf_attach_type,
) -> io::Result<()> {
    let mut attr = zeroed();
    attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = number(cgroup.as_fd());
    attr.__bindgen_anon_5.attach_bpf_fd = number(program.as_fd());
    attr.__bindgen_anon_5.attach_type = attach_type as u32;
    // SAFETY: the command takes descriptors and numbers, and no address.
    unsafe { bpf(bpf_cmd::BPF_PROG_DETACH, &mut attr) }.map(drop)
}

/// A map to be made.
#[derive(Clone, Copy, Debug)]
pub struct MapSpec<'a> {
    /// What it is.
    pub kind: bpf_map_type,
    /// Letters, digits, `_` and `.`; at most 15 bytes are kept.
    pub name: &'a str,
    /// Bytes.
    pub key_size: u32,
    /// Bytes.
    pub value_size: u32,
    /// Elements, or bytes of a ring buffer.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Types of key and value, which socket storage must have.
    pub types: Option<MapTypes<'a>>,
}

/// Types of a map's key and value, by their ids within loaded type information.
#[derive(Clone, Copy, Debug)]
pub struct MapTypes<'a> {
    /// What [`btf_load`] returned.
    pub btf: BorrowedFd<'a>,
    /// Type id of the key.
    pub key: u32,
    /// Type id of the value.
    pub value: u32,
}

impl<'a> MapSpec<'a> {
    /// A map of one element with keys of four bytes and values of eight, to be changed by struct
    /// update.
    pub fn new(kind: bpf_map_type, name: &'a str) -> Self {
        Self {
            kind,
            name,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
            flags: 0,
            types: None,
        }
    }
}

/// Makes a map, which lives as long as the descriptor (`BPF_MAP_CREATE`).
///
/// # Errors
/// `EINVAL` where the kernel lacks the type or a flag, `EPERM` without `CAP_BPF`.
pub fn map_create(spec: &MapSpec<'_>) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_1.map_type = spec.kind as u32;
    attr.__bindgen_anon_1.key_size = spec.key_size;
    attr.__bindgen_anon_1.value_size = spec.value_size;
    attr.__bindgen_anon_1.max_entries = spec.max_entries;
    attr.__bindgen_anon_1.map_flags = spec.flags;
    attr.__bindgen_anon_1.map_name = name(spec.name);
    if let Some(types) = spec.types {
        attr.__bindgen_anon_1.btf_fd = number(types.btf);
        attr.__bindgen_anon_1.btf_key_type_id = types.key;
        attr.__bindgen_anon_1.btf_value_type_id = types.value;
    }
    // SAFETY: the command takes descriptors and numbers, and no address.
    unsafe { make(bpf_cmd::BPF_MAP_CREATE, &mut attr) }
}

/// Loads type information (`BPF_BTF_LOAD`).
///
/// # Errors
/// `EINVAL` where the kernel doesn't take it.
pub fn btf_load(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_7.btf = address(bytes.as_ptr());
    attr.__bindgen_anon_7.btf_size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    // SAFETY: every address in `attr` is of something that is borrowed until the call returns, and
    // the length beside it is that thing's.
    unsafe { make(bpf_cmd::BPF_BTF_LOAD, &mut attr) }
}

/// Type id of a 32-bit integer in [`plain_types`].
pub const PLAIN_U32: u32 = 1;
/// Type id of a 64-bit integer in [`plain_types`].
pub const PLAIN_U64: u32 = 2;

/// Loads the type information that a map of numbers needs which no compiler made.
///
/// # Errors
/// As [`btf_load`].
pub fn plain_types() -> io::Result<OwnedFd> {
    // include/uapi/linux/btf.h: the kind, and the names' places in the string section.
    const INT: u32 = 1 << 24;
    const STRINGS: &[u8] = b"\0u32\0u64\0";
    let types: [u32; 8] = [
        1, INT, 4, 32, // 1: u32
        5, INT, 8, 64, // 2: u64
    ];
    let types: Vec<u8> = types.into_iter().flat_map(u32::to_ne_bytes).collect();
    let mut bytes = Vec::new();
    bytes.extend(0xeb9f_u16.to_ne_bytes());
    bytes.extend([1, 0]);
    for word in [24, 0, length(&types), length(&types), length(STRINGS)] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(types);
    bytes.extend(STRINGS);
    btf_load(&bytes)
}

/// One instruction of the BPF machine (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Class, operation and source.
    pub code: u8,
    /// Destination register in the low half, source in the high half.
    pub registers: u8,
    /// Jump distance or address offset.
    pub offset: i16,
    /// The constant.
    pub immediate: i32,
}

/// A program to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct ProgramSpec<'a> {
    /// What it is.
    pub kind: bpf_prog_type,
    /// Where it will be attached, for the types that must know when they are loaded.
    pub attach_type: Option<bpf_attach_type>,
    /// Letters, digits, `_` and `.`; at most 15 bytes are kept.
    pub name: &'a str,
    /// What it does.
    pub instructions: &'a [Instruction],
    /// Type information with its functions: what a call of a subprogram needs.
    pub functions: Option<Functions<'a>>,
}

/// Where a program's functions begin and which type each has (`struct bpf_func_info`).
#[derive(Clone, Copy, Debug)]
pub struct Functions<'a> {
    /// What [`btf_load`] returned.
    pub btf: BorrowedFd<'a>,
    /// First instruction and type id of every function.
    pub starts: &'a [[u32; 2]],
}

/// Why a program was refused.
#[derive(Debug)]
pub struct LoadError {
    /// What the kernel returned.
    pub source: io::Error,
    /// The end of the verifier's log; empty where it said nothing.
    pub log: String,
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}", self.source)?;
        if self.log.is_empty() {
            Ok(())
        } else {
            write!(formatter, ": {}", self.log)
        }
    }
}

impl std::error::Error for LoadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// A program that does nothing: it passes every look-up and acknowledges every event.
///
/// # Panics
/// With what the verifier says, where the kernel refuses it.
pub fn idle(kind: bpf_prog_type, attach_type: bpf_attach_type, name: &str) -> OwnedFd {
    let instruction = |code, immediate| Instruction {
        code,
        registers: 0,
        offset: 0,
        immediate,
    };
    let spec = ProgramSpec {
        kind,
        attach_type: Some(attach_type),
        name,
        // r0 = 1; exit
        instructions: &[instruction(0xb7, 1), instruction(0x95, 0)],
        functions: None,
    };
    prog_load(&spec).unwrap_or_else(|error| panic!("the program {name} is refused: {error}"))
}

/// Loads a program, which lives as long as the descriptor (`BPF_PROG_LOAD`).
///
/// # Errors
/// What the kernel returned and what its verifier said.
pub fn prog_load(spec: &ProgramSpec<'_>) -> Result<OwnedFd, LoadError> {
    let mut attr = program_attr(spec);
    // SAFETY: every address in `attr` is of something that is borrowed until the call returns, and
    // the length beside it is that thing's.
    if let Ok(program) = unsafe { make(bpf_cmd::BPF_PROG_LOAD, &mut attr) } {
        return Ok(program);
    }
    let mut log = vec![0_u8; LOG_BYTES];
    log_to(&mut attr, &mut log, 1);
    // SAFETY: as above; the log lives until then, too.
    unsafe { make(bpf_cmd::BPF_PROG_LOAD, &mut attr) }.map_err(|source| LoadError {
        source,
        log: last_words(&log),
    })
}

/// Loads a program, and returns with it the verifier's statistics: how long it took, the stack of
/// each function, its work.
///
/// # Errors
/// What the kernel returned. The verifier doesn't say why: for that, [`prog_load`].
pub fn prog_load_with_statistics(spec: &ProgramSpec<'_>) -> Result<(OwnedFd, String), LoadError> {
    /// `BPF_LOG_STATS` (`include/linux/bpf_verifier.h`).
    const STATISTICS: u32 = 4;
    let mut attr = program_attr(spec);
    let mut log = vec![0_u8; LOG_BYTES];
    log_to(&mut attr, &mut log, STATISTICS);
    // SAFETY: every address in `attr` is of something that is borrowed until the call returns, and
    // the length beside it is that thing's.
    let loaded = unsafe { make(bpf_cmd::BPF_PROG_LOAD, &mut attr) };
    match loaded {
        Ok(program) => Ok((program, log_text(&log))),
        Err(source) => Err(LoadError {
            source,
            log: log_text(&log),
        }),
    }
}

/// How many instructions the verifier went through for a loaded program.
///
/// # Errors
/// Where `/proc` doesn't say, as before Linux 5.16 (`bpf_prog_show_fdinfo`, kernel/bpf/syscall.c).
pub fn verified_instructions(program: impl AsFd) -> io::Result<u32> {
    let path = format!("/proc/self/fdinfo/{}", program.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(path)?;
    let count = info
        .lines()
        .find_map(|line| line.strip_prefix("verified_insns:"));
    let count = count.and_then(|count| count.trim().parse().ok());
    count.ok_or_else(|| io::Error::other("the kernel doesn't say how much it has verified"))
}

/// Room for the verifier's log of a small program, or for its statistics.
const LOG_BYTES: usize = 64 * 1024;

/// The attributes of `BPF_PROG_LOAD`: they hold addresses of what `spec` borrows.
fn program_attr(spec: &ProgramSpec<'_>) -> bpf_attr {
    const LICENSE: &CStr = c"GPL";
    let mut attr = zeroed();
    attr.__bindgen_anon_3.prog_type = spec.kind as u32;
    attr.__bindgen_anon_3.expected_attach_type =
        spec.attach_type.map_or(0, |attach_type| attach_type as u32);
    attr.__bindgen_anon_3.insns = address(spec.instructions.as_ptr());
    attr.__bindgen_anon_3.insn_cnt = length(spec.instructions);
    attr.__bindgen_anon_3.license = address(LICENSE.as_ptr());
    attr.__bindgen_anon_3.prog_name = name(spec.name);
    if let Some(functions) = &spec.functions {
        attr.__bindgen_anon_3.prog_btf_fd = number(functions.btf);
        attr.__bindgen_anon_3.func_info_rec_size = 8;
        attr.__bindgen_anon_3.func_info = address(functions.starts.as_ptr());
        attr.__bindgen_anon_3.func_info_cnt = length(functions.starts);
    }
    attr
}

/// Makes the verifier write what `level` asks for to `log`.
fn log_to(attr: &mut bpf_attr, log: &mut [u8], level: u32) {
    attr.__bindgen_anon_3.log_level = level;
    attr.__bindgen_anon_3.log_buf = address(log.as_mut_ptr());
    attr.__bindgen_anon_3.log_size = length(log);
}

fn log_text(log: &[u8]) -> String {
    CStr::from_bytes_until_nul(log)
        .map(CStr::to_string_lossy)
        .unwrap_or_default()
        .into_owned()
}

/// Runs a program that reads its context alone, and nothing of a packet, so many times in a row
/// (`BPF_PROG_TEST_RUN`); returns how long a run took, as the kernel measured it. The context is
/// what the program would be called with, in the kernel's layout for user space.
///
/// # Errors
/// `InvalidInput` where the kernel can't make such a context; `ENOTSUPP` (524) where it can't run
/// such a program.
pub fn prog_test_run(program: impl AsFd, context: &[u8], times: u32) -> io::Result<Duration> {
    let mut attr = zeroed();
    attr.test.prog_fd = number(program.as_fd());
    attr.test.repeat = times;
    attr.test.ctx_in = address(context.as_ptr());
    attr.test.ctx_size_in = length(context);
    // SAFETY: every address in `attr` is of something that is borrowed until the call returns, and
    // the length beside it is that thing's.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr) }?;
    // SAFETY: all members of the union are plain integers, and this command's is the one that was
    // filled in above.
    let nanoseconds = unsafe { attr.test.duration };
    Ok(Duration::from_nanos(nanoseconds.into()))
}

/// The end of the verifier's log: its verdict stands before the line of statistics.
fn last_words(log: &[u8]) -> String {
    let text = log_text(log);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("processed ") && !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(3)..].join("; ")
}

fn zeroed() -> bpf_attr {
    // SAFETY: every member of the union consists of integers, arrays of them, and padding.
    unsafe { std::mem::zeroed() }
}

/// # Safety
/// `attr` is filled in for this command. Every address in it is of memory that lives until the call
/// returns and is as long as the length beside it says.
unsafe fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is readable and writable for the size given; the caller answers for the
    // addresses in it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_uint,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Has the kernel make something that is held by a descriptor.
///
/// # Safety
/// As [`bpf`]; the command returns a new descriptor.
unsafe fn make(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: the caller answers for `attr`.
    let fd = RawFd::try_from(unsafe { bpf(command, attr) }?).map_err(io::Error::other)?;
    // SAFETY: the command has returned a new descriptor, which is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

fn length<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("a program has fewer than 2^32 parts")
}

fn name(name: &str) -> [c_char; LONGEST_NAME + 1] {
    let mut bytes = [0; LONGEST_NAME + 1];
    for (to, from) in bytes.iter_mut().take(LONGEST_NAME).zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya_obj::generated::{
        bpf_attach_type::BPF_SK_LOOKUP, bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP,
    };

    #[test]
    fn a_refused_program_comes_with_the_verifiers_words() {
        let broken = [Instruction {
            code: 0x95,
            registers: 0,
            offset: 0,
            immediate: 0,
        }];
        let spec = ProgramSpec {
            kind: BPF_PROG_TYPE_SK_LOOKUP,
            attach_type: Some(BPF_SK_LOOKUP),
            name: "broken",
            instructions: &broken,
            functions: None,
        };
        let error = prog_load(&spec).expect_err("R0 isn't set");
        assert!(error.to_string().contains("R0 !read_ok"), "{error}");
    }
}

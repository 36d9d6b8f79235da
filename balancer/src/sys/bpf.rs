//! `bpf(2)` commands that aya has no public function for.

use std::{
    ffi::{CStr, CString, c_char},
    io,
    mem::size_of,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::Duration,
};

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_map_info, bpf_map_type,
    bpf_prog_info, bpf_prog_type,
};

/// The longest name that the kernel keeps, without its closing zero (`BPF_OBJ_NAME_LEN`).
const LONGEST_NAME: usize = 15;

/// Puts another program under a link, without a moment in which neither runs (`BPF_LINK_UPDATE`).
///
/// # Errors
/// `ENOLINK` where what the link was attached to is gone (a network namespace, a cgroup); `EINVAL` where the program is of another
/// type than the one that it replaces.
pub fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_update.link_fd = number(link.as_fd());
    attr.link_update.__bindgen_anon_1.new_prog_fd = number(program.as_fd());
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Attaches a program; it stays until the link's last descriptor and pin are gone (`BPF_LINK_CREATE`).
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`, or where an older program sits on the cgroup that allows no second one; `E2BIG` where the target
/// holds as many programs as it can; `EINVAL` where the target doesn't fit the attach type.
pub fn link_create(
    program: impl AsFd,
    target: impl AsFd,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = number(program.as_fd());
    attr.link_create.__bindgen_anon_2.target_fd = number(target.as_fd());
    attr.link_create.attach_type = attach_type as u32;
    bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr).and_then(owned)
}

/// Takes a link's program off what it is attached to, now (`BPF_LINK_DETACH`). The end of its last descriptor or pin does so too, but
/// from a work queue (`bpf_link_put`, kernel/bpf/syscall.c): the program may run for a while after.
///
/// # Errors
/// `EOPNOTSUPP` where links of that type can't be detached; those of network namespaces and cgroups can.
pub fn link_detach(link: impl AsFd) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_detach.link_fd = number(link.as_fd());
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Attaches a program to a cgroup without a link (`BPF_PROG_ATTACH`), which can forbid others: it stays until [`cgroup_detach`] or
/// the end of the cgroup. The balancer attaches nothing so, but has to get along with programs that are.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`, or where a program sits on the cgroup or above it that forbids this one; `EINVAL` where the program
/// or a flag doesn't fit.
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
    bpf(bpf_cmd::BPF_PROG_ATTACH, &mut attr).map(drop)
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
    bpf(bpf_cmd::BPF_PROG_DETACH, &mut attr).map(drop)
}

/// Opens a pinned program, map or link (`BPF_OBJ_GET`).
///
/// # Errors
/// `ENOENT` where nothing is pinned there; `EPERM` or `EACCES` where the file is no pin or the privilege is missing.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = address(path.as_ptr());
    bpf(bpf_cmd::BPF_OBJ_GET, &mut attr).and_then(owned)
}

/// Pins a program, map or link, so that it outlives its descriptors (`BPF_OBJ_PIN`).
///
/// # Errors
/// `EEXIST` where the name is taken; `EPERM` where it holds a dot or the directory isn't on bpffs.
pub fn obj_pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = address(path.as_ptr());
    attr.__bindgen_anon_4.bpf_fd = number(object.as_fd());
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// What is attached somewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// The programs' ids, in the order in which they run.
    pub programs: Vec<u32>,
    /// How they were attached to a cgroup: `BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI`; 0 elsewhere.
    pub flags: u32,
}

/// Lists the programs of a type that are attached to a network namespace or directly to a cgroup (`BPF_PROG_QUERY`).
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`; `EINVAL` where the target doesn't fit the attach type.
pub fn prog_query(target: impl AsFd, attach_type: bpf_attach_type) -> io::Result<Attached> {
    let target = number(target.as_fd());
    let mut programs = vec![0_u32; 64];
    loop {
        let capacity = u32::try_from(programs.len()).map_err(io::Error::other)?;
        let mut attr = zeroed();
        attr.query.__bindgen_anon_1.target_fd = target;
        attr.query.attach_type = attach_type as u32;
        attr.query.prog_ids = address(programs.as_mut_ptr());
        attr.query.__bindgen_anon_2.prog_cnt = capacity;
        let result = bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr);
        // SAFETY: `query` was the member last written, by us and by the kernel; all its bit patterns are valid integers.
        let (count, flags) = unsafe {
            (
                attr.query.__bindgen_anon_2.prog_cnt,
                attr.query.attach_flags,
            )
        };
        match result {
            Ok(_) => {
                programs.truncate(count as usize);
                return Ok(Attached { programs, flags });
            }
            // The kernel says how many there are when they don't fit.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                programs.resize(programs.len().max(count as usize) * 2, 0);
            }
            Err(error) => return Err(error),
        }
    }
}

/// What the kernel says of a loaded program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Unique until reboot.
    pub id: u32,
    /// A `bpf_prog_type`.
    pub kind: u32,
    /// Its first 15 bytes, as the loader gave it.
    pub name: String,
    /// A hash of its instructions.
    pub tag: [u8; 8],
    /// How many instructions the verifier went through (0 before Linux 5.16).
    pub verified_instructions: u32,
    /// User id of the process that loaded it.
    pub created_by: u32,
}

/// Reads what the kernel says of a program (`BPF_OBJ_GET_INFO_BY_FD`).
///
/// # Errors
/// `InvalidInput` where the file is no program.
pub fn prog_info(program: impl AsFd) -> io::Result<ProgramInfo> {
    require(&program, Object::Program)?;
    // SAFETY: the structure consists of integers, arrays of them, and padding.
    let mut info = unsafe { std::mem::zeroed::<bpf_prog_info>() };
    object_info(program.as_fd(), &mut info)?;
    Ok(ProgramInfo {
        id: info.id,
        kind: info.type_,
        name: text(&info.name),
        tag: info.tag,
        verified_instructions: info.verified_insns,
        created_by: info.created_by_uid,
    })
}

/// Opens a loaded program by its id (`BPF_PROG_GET_FD_BY_ID`).
///
/// # Errors
/// `ENOENT` where it is gone; `EPERM` without `CAP_SYS_ADMIN`.
pub fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    bpf(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr).and_then(owned)
}

/// What a descriptor of a BPF object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// A program.
    Program,
    /// A map.
    Map,
    /// An attachment.
    Link,
}

impl Object {
    /// Tells what a descriptor is, if it is a BPF object at all.
    ///
    /// # Errors
    /// Where `/proc` isn't mounted.
    pub fn of(object: impl AsFd) -> io::Result<Option<Self>> {
        // kernel/bpf/syscall.c names the files so; a link's is written either way.
        let link = std::fs::read_link(format!("/proc/self/fd/{}", object.as_fd().as_raw_fd()))?;
        Ok(match link.to_str() {
            Some("anon_inode:bpf-prog") => Some(Self::Program),
            Some("anon_inode:bpf-map") => Some(Self::Map),
            Some("anon_inode:bpf_link" | "anon_inode:bpf-link") => Some(Self::Link),
            _ => None,
        })
    }
}

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Unique until reboot.
    pub id: u32,
    /// The program that it holds in place; 0 for the kinds of link that hold none.
    pub program: u32,
    /// What it is attached to.
    pub target: LinkTarget,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkTarget {
    /// A cgroup.
    Cgroup {
        /// Its id: the inode of its directory. 0 once it is gone.
        id: u64,
        /// A `bpf_attach_type`.
        attach_type: u32,
    },
    /// A network namespace.
    Netns {
        /// The inode of its file in `/proc/PID/ns/net`. 0 once it is gone (`bpf_netns_link_fill_info`, `kernel/bpf/net_namespace.c`).
        inode: u32,
        /// A `bpf_attach_type`.
        attach_type: u32,
    },
    /// Anything else.
    Other,
}

/// Reads what the kernel says of a link (`BPF_OBJ_GET_INFO_BY_FD`).
///
/// # Errors
/// `InvalidInput` where the file is no link.
pub fn link_info(link: impl AsFd) -> io::Result<LinkInfo> {
    require(&link, Object::Link)?;
    // SAFETY: the structure consists of integers, arrays and unions of them, and padding.
    let mut info = unsafe { std::mem::zeroed::<bpf_link_info>() };
    object_info(link.as_fd(), &mut info)?;
    // SAFETY: `type_` says which member of the union the kernel has filled in; all their bit patterns are valid integers.
    let target = unsafe {
        if info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
            LinkTarget::Cgroup {
                id: info.__bindgen_anon_1.cgroup.cgroup_id,
                attach_type: info.__bindgen_anon_1.cgroup.attach_type,
            }
        } else if info.type_ == bpf_link_type::BPF_LINK_TYPE_NETNS as u32 {
            LinkTarget::Netns {
                inode: info.__bindgen_anon_1.netns.netns_ino,
                attach_type: info.__bindgen_anon_1.netns.attach_type,
            }
        } else {
            LinkTarget::Other
        }
    };
    Ok(LinkInfo {
        id: info.id,
        program: info.prog_id,
        target,
    })
}

/// The id of the program that a link holds in place; 0 for the kinds of link that hold none.
///
/// # Errors
/// `InvalidInput` where the file is no link.
pub fn link_program(link: impl AsFd) -> io::Result<u32> {
    link_info(link).map(|info| info.program)
}

/// What the kernel says of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// Unique until reboot.
    pub id: u32,
    /// A `bpf_map_type`.
    pub kind: u32,
    /// Its first 15 bytes, as the loader gave it.
    pub name: String,
    /// Bytes.
    pub key_size: u32,
    /// Bytes.
    pub value_size: u32,
    /// Elements, or bytes of a ring buffer.
    pub max_entries: u32,
    /// `BPF_F_*` as given when it was made.
    pub flags: u32,
}

/// Reads what the kernel says of a map (`BPF_OBJ_GET_INFO_BY_FD`).
///
/// # Errors
/// `InvalidInput` where the file is no map.
pub fn map_info(map: impl AsFd) -> io::Result<MapInfo> {
    require(&map, Object::Map)?;
    // SAFETY: the structure consists of integers, arrays of them, and padding.
    let mut info = unsafe { std::mem::zeroed::<bpf_map_info>() };
    object_info(map.as_fd(), &mut info)?;
    Ok(MapInfo {
        id: info.id,
        kind: info.type_,
        name: text(&info.name),
        key_size: info.key_size,
        value_size: info.value_size,
        max_entries: info.max_entries,
        flags: info.map_flags,
    })
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
    /// A map of one element with keys of four bytes and values of eight, to be changed by struct update.
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
    bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr).and_then(owned)
}

/// Loads type information (`BPF_BTF_LOAD`).
///
/// # Errors
/// `EINVAL` where the kernel doesn't take it.
pub fn btf_load(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_7.btf = address(bytes.as_ptr());
    attr.__bindgen_anon_7.btf_size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    bpf(bpf_cmd::BPF_BTF_LOAD, &mut attr).and_then(owned)
}

/// Type id of a 32-bit integer in [`plain_types`].
pub const PLAIN_U32: u32 = 1;
/// Type id of a 64-bit integer in [`plain_types`].
pub const PLAIN_U64: u32 = 2;
/// Type id of a static function in [`plain_types`].
pub const PLAIN_FUNCTION: u32 = 4;

/// Loads the type information that a small map or program needs which no compiler made.
///
/// # Errors
/// As [`btf_load`].
pub fn plain_types() -> io::Result<OwnedFd> {
    // include/uapi/linux/btf.h: kinds, and the names' places in the string section.
    const INT: u32 = 1 << 24;
    const FUNC: u32 = 12 << 24;
    const FUNC_PROTO: u32 = 13 << 24;
    const STRINGS: &[u8] = b"\0u32\0u64\0function\0";
    let types: [u32; 14] = [
        1, INT, 4, 32, // 1: u32
        5, INT, 8, 64, // 2: u64
        0, FUNC_PROTO, PLAIN_U32, // 3: a function that returns a u32
        9, FUNC, 3, // 4: static, of that type
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

/// Loads a program, which lives as long as the descriptor (`BPF_PROG_LOAD`).
///
/// # Errors
/// What the kernel returned and what its verifier said.
pub fn prog_load(spec: &ProgramSpec<'_>) -> Result<OwnedFd, LoadError> {
    let mut attr = program_attr(spec);
    if let Ok(fd) = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr) {
        return owned(fd).map_err(|source| LoadError {
            source,
            log: String::new(),
        });
    }
    let mut log = vec![0_u8; LOG_BYTES];
    log_to(&mut attr, &mut log, 1);
    bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr)
        .and_then(owned)
        .map_err(|source| LoadError {
            source,
            log: last_words(&log),
        })
}

/// Loads a program, and returns with it the verifier's statistics: how long it took, the stack of each function, its work.
///
/// # Errors
/// What the kernel returned. The verifier doesn't say why: for that, [`prog_load`].
pub fn prog_load_with_statistics(spec: &ProgramSpec<'_>) -> Result<(OwnedFd, String), LoadError> {
    /// `BPF_LOG_STATS` (`include/linux/bpf_verifier.h`).
    const STATISTICS: u32 = 4;
    let mut attr = program_attr(spec);
    let mut log = vec![0_u8; LOG_BYTES];
    log_to(&mut attr, &mut log, STATISTICS);
    let loaded = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr).and_then(owned);
    match loaded {
        Ok(program) => Ok((program, log_text(&log))),
        Err(source) => Err(LoadError {
            source,
            log: log_text(&log),
        }),
    }
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

/// Runs a program that reads its context alone, and nothing of a packet, so many times in a row (`BPF_PROG_TEST_RUN`); returns how long
/// a run took, as the kernel measured it. The context is what the program would be called with, in the kernel's layout for user space.
///
/// # Errors
/// `InvalidInput` where the kernel can't make such a context; `ENOTSUPP` (524) where it can't run such a program.
pub fn prog_test_run(program: impl AsFd, context: &[u8], times: u32) -> io::Result<Duration> {
    let mut attr = zeroed();
    attr.test.prog_fd = number(program.as_fd());
    attr.test.repeat = times;
    attr.test.ctx_in = address(context.as_ptr());
    attr.test.ctx_size_in = length(context);
    bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    // SAFETY: all members of the union are plain integers, and this command's is the one that was filled in above.
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

fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = zeroed();
    attr.info.bpf_fd = number(object);
    attr.info.info = address(std::ptr::from_mut(info));
    attr.info.info_len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// The kernel fills in a different structure for each kind of object, so the kind has to be known before.
fn require(object: &impl AsFd, kind: Object) -> io::Result<()> {
    if Object::of(object)? == Some(kind) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("this is no BPF {kind:?}").to_lowercase(),
    ))
}

fn zeroed() -> bpf_attr {
    // SAFETY: every member of the union consists of integers, arrays of them, and padding.
    unsafe { std::mem::zeroed() }
}

/// The one place where bpf(2) is called; callers fill `attr` with addresses of memory that they keep alive over the call and whose
/// length they give beside it.
fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is readable and writable for the size given. Every address inside it comes from `address` in this module, of
    // memory that outlives the call and is as long as the length field beside it says.
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

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: called only with the result of a bpf command that returns a new file descriptor, which is ours alone.
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

fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes
        .iter()
        .take_while(|byte| **byte != 0)
        .flat_map(|byte| byte.to_ne_bytes())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;
    use aya_obj::generated::{
        bpf_attach_type::{BPF_CGROUP_SOCK_OPS, BPF_SK_LOOKUP},
        bpf_map_type::BPF_MAP_TYPE_HASH,
        bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP,
    };
    use std::time::{Duration, Instant};

    const RETURN_PASS: [Instruction; 2] = [
        Instruction {
            code: 0xb7,
            registers: 0,
            offset: 0,
            immediate: 1,
        },
        Instruction {
            code: 0x95,
            registers: 0,
            offset: 0,
            immediate: 0,
        },
    ];

    fn pass(name: &str) -> OwnedFd {
        let spec = ProgramSpec {
            kind: BPF_PROG_TYPE_SK_LOOKUP,
            attach_type: Some(BPF_SK_LOOKUP),
            name,
            instructions: &RETURN_PASS,
            functions: None,
        };
        prog_load(&spec).expect("a program that passes everything")
    }

    #[test]
    fn a_link_is_made_listed_updated_and_ends_with_its_descriptor() {
        let netns = netns::tests::fresh();
        let attached = || prog_query(&netns, BPF_SK_LOOKUP).expect("query").programs;
        assert!(attached().is_empty());
        let (first, second) = (pass("first"), pass("second"));
        let ids = [&first, &second].map(|program| prog_info(program).expect("info").id);
        let link = link_create(&first, &netns, BPF_SK_LOOKUP).expect("attach");
        assert_eq!(attached(), [ids[0]]);
        link_update(&link, &second).expect("update");
        assert_eq!(attached(), [ids[1]]);
        assert_eq!(link_program(&link).expect("info"), ids[1]);
        let kinds =
            [first.as_fd(), link.as_fd(), netns.as_fd()].map(|fd| Object::of(fd).expect("kind"));
        assert_eq!(kinds, [Some(Object::Program), Some(Object::Link), None]);
        assert!(link_program(&first).is_err() && prog_info(&link).is_err());
        drop(link);
        assert!(attached().is_empty());
        let link = link_create(&first, &netns, BPF_SK_LOOKUP).expect("attach");
        link_detach(&link).expect("detach");
        assert!(attached().is_empty());
        link_detach(&link).expect("a second time there is nothing to do");
    }

    #[test]
    fn a_link_whose_namespace_is_gone_says_so() {
        let netns = netns::tests::fresh();
        let program = pass("orphan");
        let link = link_create(&program, &netns, BPF_SK_LOOKUP).expect("attach");
        drop(netns);
        // The kernel takes namespaces down from a work queue.
        let deadline = Instant::now() + Duration::from_secs(20);
        let error = loop {
            match link_update(&link, &program) {
                Err(error) => break error,
                Ok(()) => assert!(Instant::now() < deadline, "the namespace still lives"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOLINK), "{error}");
    }

    #[test]
    fn more_programs_than_the_first_guess_are_listed() {
        let netns = netns::tests::fresh();
        let program = pass("many");
        let links: Vec<_> =
            std::iter::from_fn(|| link_create(&program, &netns, BPF_SK_LOOKUP).ok()).collect();
        assert_eq!(links.len(), 64, "as many as a namespace can hold");
        assert_eq!(
            prog_query(&netns, BPF_SK_LOOKUP)
                .expect("query")
                .programs
                .len(),
            64
        );
    }

    #[test]
    fn programs_and_maps_tell_what_they_are() {
        let program = pass("a_name_longer_than_15");
        let info = prog_info(&program).expect("info");
        assert_eq!(
            (info.name.as_str(), info.kind),
            ("a_name_longer_t", BPF_PROG_TYPE_SK_LOOKUP as u32)
        );
        assert_eq!((info.verified_instructions, info.created_by), (2, 0));
        assert_eq!(
            prog_info(prog_by_id(info.id).expect("by id")).expect("info"),
            info
        );
        let map = map_create(&MapSpec {
            max_entries: 7,
            ..MapSpec::new(BPF_MAP_TYPE_HASH, "seven")
        })
        .expect("map");
        let info = map_info(&map).expect("info");
        assert_eq!(
            (
                info.name.as_str(),
                info.key_size,
                info.value_size,
                info.max_entries
            ),
            ("seven", 4, 8, 7)
        );
        assert!(map_info(&program).is_err() && prog_info(&map).is_err());
        assert_eq!(
            prog_by_id(u32::MAX).expect_err("none").raw_os_error(),
            Some(libc::ENOENT)
        );
    }

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

    #[test]
    fn what_does_not_fit_is_an_error() {
        let file = std::fs::File::open("/dev/null").expect("open");
        assert!(prog_query(&file, BPF_SK_LOOKUP).is_err());
        assert!(prog_query(&file, BPF_CGROUP_SOCK_OPS).is_err());
        assert_eq!(
            obj_get(Path::new("/sys/fs/bpf/no/such/pin"))
                .expect_err("none")
                .kind(),
            io::ErrorKind::NotFound
        );
        assert_eq!(
            obj_get(Path::new("a\0b")).expect_err("no path").kind(),
            io::ErrorKind::InvalidInput
        );
    }
}

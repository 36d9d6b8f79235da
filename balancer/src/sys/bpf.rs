//! `bpf(2)` commands that aya has no public function for.

use std::{
    ffi::{CString, c_char},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::{
    BPF_F_BEFORE, bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_map_info,
    bpf_map_type, bpf_prog_info,
};

/// Puts another program under a link, without a moment in which neither runs (`BPF_LINK_UPDATE`).
///
/// # Errors
/// `ENOLINK` where what the link was attached to is gone (a netns, a cgroup); `EINVAL` where the
/// program is of another type than the one that it replaces.
pub fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_update.link_fd = number(link.as_fd());
    attr.link_update.__bindgen_anon_1.new_prog_fd = number(program.as_fd());
    // SAFETY: the command takes descriptors and numbers, and no address.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Attaches a program; it stays until the link's last descriptor and pin are gone
/// (`BPF_LINK_CREATE`).
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`, or where an older program sits on the cgroup that allows no
/// second one; `E2BIG` where the target holds as many programs as it can; `EINVAL` where the target
/// doesn't fit the attach type.
pub fn link_create(
    program: impl AsFd,
    target: impl AsFd,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    link_create_with(program, target, attach_type, 0)
}

fn link_create_with(
    program: impl AsFd,
    target: impl AsFd,
    attach_type: bpf_attach_type,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = number(program.as_fd());
    attr.link_create.__bindgen_anon_2.target_fd = number(target.as_fd());
    attr.link_create.attach_type = attach_type as u32;
    attr.link_create.flags = flags;
    // SAFETY: the command takes descriptors and numbers, and no address.
    unsafe { open(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
}

/// As [`link_create`], for a cgroup: the program runs before those that are attached to it already
/// (`BPF_F_BEFORE`). Kernels that know no order of programs at a cgroup, such as 6.1, have it run
/// after them.
///
/// # Errors
/// As [`link_create`].
pub fn link_create_first(
    program: impl AsFd,
    target: impl AsFd,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    match link_create_with(&program, &target, attach_type, BPF_F_BEFORE) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            link_create(program, target, attach_type)
        }
        link => link,
    }
}

/// Makes a map of sockets by keys of eight bytes (`BPF_MAP_CREATE`). It is pinned nowhere, and lets
/// its sockets go when the last descriptor is closed.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` (`map_create`, kernel/bpf/syscall.c); `ENOMEM`.
pub fn sock_hash_create(entries: u32) -> io::Result<OwnedFd> {
    const KEY: usize = size_of::<u64>();
    const VALUE: usize = size_of::<u32>();
    let mut attr = zeroed();
    attr.__bindgen_anon_1.map_type = bpf_map_type::BPF_MAP_TYPE_SOCKHASH as u32;
    attr.__bindgen_anon_1.key_size = u32::try_from(KEY).map_err(io::Error::other)?;
    attr.__bindgen_anon_1.value_size = u32::try_from(VALUE).map_err(io::Error::other)?;
    attr.__bindgen_anon_1.max_entries = entries;
    // SAFETY: the command takes numbers, and no address.
    unsafe { open(bpf_cmd::BPF_MAP_CREATE, &mut attr) }
}

/// Makes an iterator program one that goes over the sockets that have a value in a socket storage
/// (`BPF_LINK_CREATE` of `bpf_sk_storage_map`). It lasts as long as the descriptor.
///
/// # Errors
/// `EPERM` without `CAP_PERFMON`; `EINVAL` where the map is no socket storage; `EACCES` where the
/// program reads more of a value than there is.
pub fn iter_link_create(program: impl AsFd, storage: impl AsFd) -> io::Result<OwnedFd> {
    // `union bpf_iter_link_info` (include/uapi/linux/bpf.h): `map.map_fd`, and zeros that may be
    // left out.
    let info = number(storage.as_fd());
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = number(program.as_fd());
    attr.link_create.attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
    attr.link_create.__bindgen_anon_3.__bindgen_anon_1.iter_info = address(&raw const info);
    attr.link_create
        .__bindgen_anon_3
        .__bindgen_anon_1
        .iter_info_len = u32::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    // SAFETY: `info` lives until the call returns, and is as long as is said.
    unsafe { open(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
}

/// Begins to go over what an iterator goes over: what its program writes is read from the file
/// (`BPF_ITER_CREATE`).
///
/// # Errors
/// `EINVAL` where the link is no iterator's.
pub fn iter_create(link: impl AsFd) -> io::Result<File> {
    let mut attr = zeroed();
    attr.iter_create.link_fd = number(link.as_fd());
    // SAFETY: the command takes a descriptor, and no address.
    unsafe { open(bpf_cmd::BPF_ITER_CREATE, &mut attr) }.map(File::from)
}

/// Takes a link's program off what it is attached to, now (`BPF_LINK_DETACH`). The end of its last
/// descriptor or pin does so too, but from a work queue (`bpf_link_put`, kernel/bpf/syscall.c): the
/// program may run for a while after.
///
/// # Errors
/// `EOPNOTSUPP` where links of that type can't be detached; links of netns and cgroups can.
pub fn link_detach(link: impl AsFd) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_detach.link_fd = number(link.as_fd());
    // SAFETY: the command takes descriptors and numbers, and no address.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// Opens a pinned program, map or link (`BPF_OBJ_GET`).
///
/// # Errors
/// `ENOENT` where nothing is pinned there; `EPERM` or `EACCES` where the file is no pin or the
/// privilege is missing.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = address(path.as_ptr());
    // SAFETY: the path lives until the call returns.
    unsafe { open(bpf_cmd::BPF_OBJ_GET, &mut attr) }
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
    // SAFETY: the path lives until the call returns.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// The programs of one type that are attached to a netns or a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// The programs' ids, in the order in which they run.
    pub programs: Vec<u32>,
    /// How they were attached to a cgroup: `BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI`; 0
    /// elsewhere.
    pub flags: u32,
}

/// Lists the programs of a type that are attached to a netns or directly to a cgroup
/// (`BPF_PROG_QUERY`).
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
        // SAFETY: `programs` lives until the call returns, and is as long as is said.
        let result = unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) };
        // SAFETY: `query` was the member last written, by us and by the kernel; all its bit
        // patterns are valid integers.
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
    /// Number that no other program has until reboot.
    pub id: u32,
    /// The first 15 bytes of the name that the loader gave it.
    pub name: String,
}

/// Reads what the kernel says of a program (`BPF_OBJ_GET_INFO_BY_FD`).
///
/// # Errors
/// `InvalidInput` where the file is no program.
pub fn prog_info(program: impl AsFd) -> io::Result<ProgramInfo> {
    require(&program, Object::Program)?;
    // SAFETY: it is a program, and the structure consists of integers and arrays of them.
    let info: bpf_prog_info = unsafe { object_info(program.as_fd()) }?;
    Ok(ProgramInfo {
        id: info.id,
        name: text(&info.name),
    })
}

/// Opens a loaded program by its id (`BPF_PROG_GET_FD_BY_ID`).
///
/// # Errors
/// `ENOENT` where it is gone; `EPERM` without `CAP_SYS_ADMIN`.
pub fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    // SAFETY: the command takes descriptors and numbers, and no address.
    unsafe { open(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr) }
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
    /// Number that no other link has until reboot.
    pub id: u32,
    /// Id of the program that it holds in place; 0 for the kinds of link that hold none.
    pub program: u32,
    /// The cgroup or netns that it is attached to.
    pub target: LinkTarget,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkTarget {
    /// A cgroup.
    Cgroup {
        /// Id of the cgroup: the inode of its directory. 0 once the cgroup is gone.
        id: u64,
        /// A `bpf_attach_type`.
        attach_type: u32,
    },
    /// A netns.
    Netns {
        /// The inode that `/proc/PID/ns/net` shows of it. 0 once the netns is gone
        /// (`bpf_netns_link_fill_info`, `kernel/bpf/net_namespace.c`).
        inode: u32,
        /// A `bpf_attach_type`.
        attach_type: u32,
    },
    /// Something that the balancer attaches nothing to.
    Other,
}

/// Reads what the kernel says of a link (`BPF_OBJ_GET_INFO_BY_FD`).
///
/// # Errors
/// `InvalidInput` where the file is no link.
pub fn link_info(link: impl AsFd) -> io::Result<LinkInfo> {
    require(&link, Object::Link)?;
    // SAFETY: it is a link, and the structure consists of integers, unions and arrays of them.
    let info: bpf_link_info = unsafe { object_info(link.as_fd()) }?;
    // SAFETY: `type_` says which member of the union the kernel has filled in; all their bit
    // patterns are valid integers.
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
    /// Number that no other map has until reboot.
    pub id: u32,
    /// A `bpf_map_type`.
    pub kind: u32,
    /// The first 15 bytes of the name that the loader gave it.
    pub name: String,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
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
    // SAFETY: it is a map, and the structure consists of integers and arrays of them.
    let info: bpf_map_info = unsafe { object_info(map.as_fd()) }?;
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

/// What was in a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elements {
    keys: Vec<u8>,
    values: Vec<u8>,
    key_size: usize,
    value_size: usize,
}

impl Elements {
    /// Key and value of each element, as they stand in memory.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let keys = self.keys.chunks_exact(self.key_size.max(1));
        keys.zip(self.values.chunks_exact(self.value_size.max(1)))
    }
}

/// Takes all elements out of a hash map (`BPF_MAP_LOOKUP_AND_DELETE_BATCH`). One that is changed
/// at that very moment may lose the change.
///
/// # Errors
/// `EINVAL` or `EOPNOTSUPP` where the map is of a type that has no such batches; `InvalidInput`
/// where the file is no map.
pub fn map_take_all(map: impl AsFd) -> io::Result<Elements> {
    let info = map_info(&map)?;
    let (key_size, value_size) = (info.key_size as usize, info.value_size as usize);
    let mut taken = Elements {
        keys: vec![0; key_size * info.max_entries as usize],
        values: vec![0; value_size * info.max_entries as usize],
        key_size,
        value_size,
    };
    // Where the next batch would begin: for a hash the number of a bucket
    // (`__htab_map_lookup_and_delete_batch`, kernel/bpf/hashtab.c).
    let mut next = 0_u32;
    let mut attr = zeroed();
    attr.batch.out_batch = address(&raw mut next);
    attr.batch.keys = address(taken.keys.as_mut_ptr());
    attr.batch.values = address(taken.values.as_mut_ptr());
    attr.batch.count = info.max_entries;
    attr.batch.map_fd = number(map.as_fd());
    // SAFETY: the buffers live until the call returns, and have room for as many elements of the
    // map's sizes as is said. The batch of a hash begins with a word.
    let result = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_AND_DELETE_BATCH, &mut attr) };
    // The end of the map is an error that comes with elements.
    if let Err(error) = result
        && error.raw_os_error() != Some(libc::ENOENT)
    {
        return Err(error);
    }
    // SAFETY: `batch` was the member last written, by us and by the kernel; all its bit patterns
    // are valid integers.
    let count = unsafe { attr.batch.count } as usize;
    taken.keys.truncate(count * key_size);
    taken.values.truncate(count * value_size);
    Ok(taken)
}

/// Asks the kernel what it says of an object.
///
/// # Safety
/// `T` is the structure that the kernel fills in for objects of this kind, and all its bit patterns
/// are valid.
unsafe fn object_info<T>(object: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: the caller says that all bit patterns are valid.
    let mut info = unsafe { std::mem::zeroed::<T>() };
    let mut attr = zeroed();
    attr.info.bpf_fd = number(object);
    attr.info.info = address(&raw mut info);
    attr.info.info_len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: `info` lives until the call returns, and is as long as is said. The kernel writes to
    // none of the addresses that `info` itself has room for: they are null, of 0 elements.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// The kernel fills in a different structure for each kind of object, so the kind has to be known
/// before.
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

/// Calls bpf(2).
///
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

/// Calls bpf(2) for something that is held by a descriptor.
///
/// # Safety
/// `attr` is as [`bpf`] demands, and the command returns a new descriptor.
unsafe fn open(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
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

/// The name in a structure of the kernel, without the zeros behind it.
fn text(bytes: &[c_char]) -> String {
    let bytes = bytes.iter().take_while(|byte| **byte != 0);
    let bytes: Vec<u8> = bytes.map(|byte| byte.cast_unsigned()).collect();
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

    fn pass(name: &str) -> OwnedFd {
        testbpf::idle(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, name)
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
        // The kernel takes netns down from a work queue.
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
        assert_eq!(info.name, "a_name_longer_t");
        assert_eq!(
            prog_info(prog_by_id(info.id).expect("by id")).expect("info"),
            info
        );
        let map = testbpf::map_create(&testbpf::MapSpec {
            max_entries: 7,
            ..testbpf::MapSpec::new(BPF_MAP_TYPE_HASH, "seven")
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
    fn what_does_not_fit_is_an_error() {
        let file = File::open("/dev/null").expect("open");
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

//! Where the running kernel keeps the fields that the kernel half reads: byte offsets out of the
//! kernel's own BTF.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use btf_rs::{Btf, BtfType, Member, Struct, Type};

const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// More typedefs and qualifiers in a row than any kernel has: a chain this long is a loop.
const LONGEST_TYPE_CHAIN: usize = 64;

/// Byte offsets of kernel structure members.
///
/// Members of `struct sock_common`, `struct sock`, `struct inet_connection_sock` and `struct
/// tcp_sock` are relative to the start of the socket, which these four share; the others are
/// relative to the structure that the field's comment names. A member that is a bit field has the
/// byte that holds it and its mask within that byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelOffsets {
    /// `sock_common.skc_net.net`: pointer to `struct net`.
    pub netns: u32,
    /// The byte of the bit field `sock_common.skc_ipv6only` (`IPV6_V6ONLY` is set).
    pub ipv6only: u32,
    /// Mask of `skc_ipv6only` in its byte.
    pub ipv6only_mask: u32,
    /// `sock.sk_ack_backlog`: u32, connections that wait for `accept()`.
    pub ack_backlog: u32,
    /// `sock.sk_max_ack_backlog`: u32, the listener's backlog.
    pub max_ack_backlog: u32,
    /// `sock.sk_uid.val`: u32, owner of the socket.
    pub uid: u32,
    /// `sock.sk_reuseport_cb`: pointer to `struct sock_reuseport`, null outside a group.
    pub reuseport_cb: u32,
    /// `inet_connection_sock.icsk_accept_queue.qlen`: i32, half-open connections.
    pub accept_qlen: u32,
    /// `inet_connection_sock.icsk_accept_queue.young`: i32, those whose SYN-ACK was not yet sent
    /// again.
    pub accept_young: u32,
    /// `inet_connection_sock.icsk_accept_queue.fastopenq.qlen`: i32, TCP Fast Open requests not yet
    /// confirmed.
    pub fastopen_qlen: u32,
    /// `tcp_sock.rx_opt.ts_recent_stamp`: i32, on a listener the low half of jiffies at its last
    /// SYN queue overflow.
    pub ts_recent_stamp: u32,
    /// `sock_reuseport.synq_overflow_ts`: u32, the same for a `SO_REUSEPORT` group; relative to
    /// `struct sock_reuseport`.
    pub synq_overflow_ts: u32,
    /// `net.ipv4.sysctl_tcp_syncookies`: u8; relative to `struct net`.
    pub sysctl_tcp_syncookies: u32,
    /// `task_struct.tgid`: i32, the process id; relative to `struct task_struct`.
    pub task_tgid: u32,
    /// `task_struct.pid`: i32, the thread id; relative to `struct task_struct`.
    pub task_pid: u32,
}

/// Reads the layout of the running kernel from `/sys/kernel/btf/vmlinux`.
///
/// # Errors
/// Where the kernel has no BTF (`CONFIG_DEBUG_INFO_BTF`), or a field is missing or of another size
/// than the kernel half expects; the error names the field.
pub fn kernel_offsets() -> Result<KernelOffsets> {
    let btf = Btf::from_file(Path::new(VMLINUX_BTF)).with_context(|| {
        format!(
            "cannot read the kernel's type information from {VMLINUX_BTF}: the kernel was built without \
             CONFIG_DEBUG_INFO_BTF (distribution kernels since Debian 11 and RHEL 8.2 have it), or /sys isn't mounted here"
        )
    })?;
    offsets(&Layout(&btf))
}

fn offsets(layout: &Layout<'_>) -> Result<KernelOffsets> {
    for (outer, first) in [
        ("tcp_sock", "inet_conn"),
        ("inet_connection_sock", "icsk_inet"),
        ("inet_sock", "sk"),
        ("sock", "__sk_common"),
    ] {
        let at = layout.field(outer, first)?.bits / 8;
        ensure!(
            at == 0,
            "the kernel's {outer}.{first} is at byte {at} and not at the start: {UNSUPPORTED}"
        );
    }
    let (ipv6only, ipv6only_mask) = layout.bit("sock_common", "skc_ipv6only")?;
    let queue = |member| layout.byte("inet_connection_sock", member, 4);
    Ok(KernelOffsets {
        netns: layout.byte("sock_common", "skc_net.net", 8)?,
        ipv6only,
        ipv6only_mask,
        ack_backlog: layout.byte("sock", "sk_ack_backlog", 4)?,
        max_ack_backlog: layout.byte("sock", "sk_max_ack_backlog", 4)?,
        uid: layout.byte("sock", "sk_uid.val", 4)?,
        reuseport_cb: layout.byte("sock", "sk_reuseport_cb", 8)?,
        accept_qlen: queue("icsk_accept_queue.qlen.counter")?,
        accept_young: queue("icsk_accept_queue.young.counter")?,
        fastopen_qlen: queue("icsk_accept_queue.fastopenq.qlen")?,
        ts_recent_stamp: layout.byte("tcp_sock", "rx_opt.ts_recent_stamp", 4)?,
        synq_overflow_ts: layout.byte("sock_reuseport", "synq_overflow_ts", 4)?,
        sysctl_tcp_syncookies: layout.byte("net", "ipv4.sysctl_tcp_syncookies", 1)?,
        task_tgid: layout.byte("task_struct", "tgid", 4)?,
        task_pid: layout.byte("task_struct", "pid", 4)?,
    })
}

const UNSUPPORTED: &str = "this kernel is older than 6.1, or so new that its layout changed and a newer balancer is needed";

/// A member that was found.
struct Field {
    /// Its position, from the start of the outermost structure.
    bits: u32,
    /// Its width in bits, for a bit field only.
    width: Option<u32>,
    type_id: u32,
}

struct Layout<'a>(&'a Btf);

impl Layout<'_> {
    /// Byte offset of a member that must be `size` bytes wide.
    fn byte(&self, root: &str, path: &str, size: usize) -> Result<u32> {
        let field = self.field(root, path)?;
        ensure!(
            field.width.is_none() && field.bits % 8 == 0,
            "the kernel's {root}.{path} is a bit field: {UNSUPPORTED}"
        );
        let found = self.size(field.type_id)?;
        ensure!(
            found == size,
            "the kernel's {root}.{path} has {found} bytes and not {size}: {UNSUPPORTED}"
        );
        Ok(field.bits / 8)
    }

    /// Byte offset and mask of a bit field that must be one bit wide.
    fn bit(&self, root: &str, path: &str) -> Result<(u32, u32)> {
        let field = self.field(root, path)?;
        ensure!(
            field.width == Some(1),
            "the kernel's {root}.{path} isn't a field of one bit: {UNSUPPORTED}"
        );
        let within = field.bits % 8;
        // BTF counts from the low end of a byte on little-endian machines, from its high end on the
        // others.
        let position = if cfg!(target_endian = "little") {
            within
        } else {
            7 - within
        };
        Ok((field.bits / 8, 1 << position))
    }

    /// Follows a dotted path of member names; anonymous structures and unions on the way are looked
    /// through.
    fn field(&self, root: &str, path: &str) -> Result<Field> {
        let mut structure = self.root(root)?;
        let mut names = path.split('.').peekable();
        let mut bits = 0;
        while let Some(name) = names.next() {
            let found = self.member(&structure, name)?.ok_or_else(|| {
                anyhow!("the kernel has no field `{name}`, needed for {root}.{path}: {UNSUPPORTED}")
            })?;
            bits += found.bits;
            if names.peek().is_none() {
                return Ok(Field { bits, ..found });
            }
            structure = self.structure(found.type_id)?.ok_or_else(|| {
                anyhow!("the kernel's `{name}`, needed for {root}.{path}, is no structure: {UNSUPPORTED}")
            })?;
        }
        bail!("no member of {root} is named")
    }

    fn root(&self, name: &str) -> Result<Struct> {
        let named = self.0.resolve_types_by_name(name).unwrap_or_default();
        named
            .into_iter()
            .find_map(|candidate| match candidate {
                Type::Struct(structure) => Some(structure),
                _ => None,
            })
            .ok_or_else(|| {
                anyhow!("the kernel's type information has no `struct {name}`: {UNSUPPORTED}")
            })
    }

    fn member(&self, structure: &Struct, name: &str) -> Result<Option<Field>> {
        for member in &structure.members {
            let type_id = member
                .get_type_id()
                .context("a structure member without a type")?;
            let member_name = self.0.resolve_name(member)?;
            if member_name == name {
                return Ok(Some(Field {
                    bits: member.bit_offset(),
                    width: bit_width(member),
                    type_id,
                }));
            }
            if !member_name.is_empty() {
                continue;
            }
            let Some(anonymous) = self.structure(type_id)? else {
                continue;
            };
            if let Some(inner) = self.member(&anonymous, name)? {
                return Ok(Some(Field {
                    bits: member.bit_offset() + inner.bits,
                    ..inner
                }));
            }
        }
        Ok(None)
    }

    /// The structure or union behind a type.
    fn structure(&self, type_id: u32) -> Result<Option<Struct>> {
        Ok(match self.bare(type_id)? {
            Type::Struct(inner) | Type::Union(inner) => Some(inner),
            _ => None,
        })
    }

    fn size(&self, type_id: u32) -> Result<usize> {
        Ok(match self.bare(type_id)? {
            Type::Int(inner) => inner.size(),
            Type::Enum(inner) => inner.size(),
            Type::Struct(inner) | Type::Union(inner) => inner.size(),
            Type::Ptr(_) => size_of::<usize>(),
            other => bail!(
                "the kernel's type information has a {} where a number was expected",
                other.name()
            ),
        })
    }

    /// The type behind typedefs and qualifiers.
    fn bare(&self, type_id: u32) -> Result<Type> {
        let mut id = type_id;
        for _ in 0..LONGEST_TYPE_CHAIN {
            let found = self.0.resolve_type_by_id(id)?;
            match &found {
                Type::Typedef(_)
                | Type::Const(_)
                | Type::Volatile(_)
                | Type::Restrict(_)
                | Type::TypeTag(_) => {
                    id = found
                        .as_btf_type()
                        .and_then(BtfType::get_type_id)
                        .context("a typedef of nothing")?;
                }
                _ => return Ok(found),
            }
        }
        bail!("the kernel's type information refers to itself at type {type_id}")
    }
}

/// Zero and absent both mean: not a bit field.
fn bit_width(member: &Member) -> Option<u32> {
    member.bitfield_size().filter(|width| *width > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(check: impl FnOnce(&Layout<'_>)) {
        check(&Layout(
            &Btf::from_file(VMLINUX_BTF).expect("the kernel has BTF"),
        ));
    }

    #[test]
    fn the_running_kernel_has_every_field_inside_its_structure() {
        let found = kernel_offsets().expect("this kernel is supported");
        layout(|layout| {
            let size = |name| u32::try_from(layout.root(name).expect(name).size()).expect("small");
            for at in [found.netns, found.ipv6only] {
                assert!(at < size("sock_common"), "{found:?}");
            }
            for at in [
                found.ack_backlog,
                found.max_ack_backlog,
                found.uid,
                found.reuseport_cb,
            ] {
                assert!(
                    (size("sock_common")..size("sock")).contains(&at),
                    "{found:?}"
                );
            }
            for at in [found.accept_qlen, found.accept_young, found.fastopen_qlen] {
                assert!(
                    (size("inet_sock")..size("inet_connection_sock")).contains(&at),
                    "{found:?}"
                );
            }
            assert!(
                (size("inet_connection_sock")..size("tcp_sock")).contains(&found.ts_recent_stamp)
            );
            assert!(found.synq_overflow_ts < size("sock_reuseport"));
            assert!(found.sysctl_tcp_syncookies < size("net"));
            assert!(found.task_tgid < size("task_struct"));
        });
    }

    /// `struct sock_common` starts with the lookup keys, in this order since before 6.1
    /// (include/net/sock.h).
    #[test]
    fn well_known_places_come_out_right() {
        let found = kernel_offsets().expect("this kernel is supported");
        assert_eq!((found.ipv6only, found.ipv6only_mask), (19, 0x20));
        assert_eq!(found.netns, 48);
        assert_eq!(found.accept_young, found.accept_qlen + 4);
        assert_eq!(found.max_ack_backlog, found.ack_backlog + 4);
    }

    #[test]
    fn a_missing_field_is_named() {
        layout(|layout| {
            let missing = |root, path| {
                format!(
                    "{:#}",
                    layout.byte(root, path, 4).expect_err("it isn't there")
                )
            };
            assert!(missing("sock", "sk_no_such").contains("sock.sk_no_such"));
            assert!(missing("no_such_struct", "x").contains("no_such_struct"));
            assert!(missing("sock", "sk_ack_backlog.inner").contains("no structure"));
            assert!(missing("sock", "sk_reuseport_cb").contains("8 bytes and not 4"));
            assert!(missing("sock_common", "skc_reuseport").contains("bit field"));
            assert!(layout.bit("sock", "sk_ack_backlog").is_err());
        });
    }
}

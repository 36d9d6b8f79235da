//! Where the running kernel keeps the fields that the kernel half reads: byte offsets out of the
//! kernel's own BTF.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use btf_rs::{Backend, Btf, BtfType, Member, Struct, Type};

const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// More typedefs and qualifiers in a row than any kernel has: a chain this long is a loop.
const LONGEST_TYPE_CHAIN: usize = 64;

/// A constant of the kernel half, the member whose byte offset it is, and the member's size in
/// bytes.
type Offset = (&'static str, &'static str, &'static str, usize);

/// Offsets in `struct sock_common`, `struct sock`, `struct inet_connection_sock` and `struct
/// tcp_sock` are those from the start of the socket, which these four share.
const OFFSETS: [Offset; 23] = [
    ("AT_STATE", "sock_common", "skc_state", 1),
    ("AT_NET", "sock_common", "skc_net.net", 8),
    ("AT_QUEUE", "sock", "sk_ack_backlog", 4),
    ("AT_BACKLOG", "sock", "sk_max_ack_backlog", 4),
    ("AT_ERROR", "sock", "sk_err", 4),
    ("AT_SHUTDOWN", "sock", "sk_shutdown", 1),
    ("AT_UID", "sock", "sk_uid.val", 4),
    ("AT_REUSEPORT", "sock", "sk_reuseport_cb", 8),
    (
        "AT_HALF_OPEN",
        "inet_connection_sock",
        "icsk_accept_queue.qlen.counter",
        4,
    ),
    (
        "AT_YOUNG",
        "inet_connection_sock",
        "icsk_accept_queue.young.counter",
        4,
    ),
    (
        "AT_FAST_OPEN",
        "inet_connection_sock",
        "icsk_accept_queue.fastopenq.qlen",
        4,
    ),
    ("AT_OVERFLOW", "tcp_sock", "rx_opt.ts_recent_stamp", 4),
    ("AT_KEEP_IDLE", "tcp_sock", "keepalive_time", 4),
    ("AT_KEEP_INTERVAL", "tcp_sock", "keepalive_intvl", 4),
    ("AT_KEEP_PROBES", "tcp_sock", "keepalive_probes", 1),
    (
        "AT_USER_TIMEOUT",
        "inet_connection_sock",
        "icsk_user_timeout",
        4,
    ),
    ("AT_GROUP_OVERFLOW", "sock_reuseport", "synq_overflow_ts", 4),
    ("AT_SYNCOOKIES", "net", "ipv4.sysctl_tcp_syncookies", 1),
    ("AT_CGROUP", "sock", "sk_cgrp_data.cgroup", 8),
    ("AT_CGROUP_NODE", "cgroup", "kn", 8),
    ("AT_NODE_ID", "kernfs_node", "id", 8),
    ("AT_TGID", "task_struct", "tgid", 4),
    ("AT_PID", "task_struct", "pid", 4),
];

/// The values of the kernel half's constants that say where the running kernel keeps what it reads,
/// from `/sys/kernel/btf/vmlinux`.
///
/// # Errors
/// Where the kernel has no BTF (`CONFIG_DEBUG_INFO_BTF`), or a field is missing or of another size
/// than the kernel half expects; the error names the field.
pub fn kernel_offsets() -> Result<Vec<(&'static str, u32)>> {
    // The reader of a file asks the kernel where it stands at each of the types. Since Linux 6.16
    // the file can be mapped (`btf_sysfs_vmlinux_mmap`, kernel/bpf/sysfs_btf.c).
    let mapped = Btf::from_file_with_backend(VMLINUX_BTF, Backend::Mmap);
    let btf = mapped.or_else(|_| Btf::from_file(VMLINUX_BTF));
    let btf = btf.with_context(|| {
        format!(
            "cannot read the kernel's type information from {VMLINUX_BTF}: the kernel was built without \
             CONFIG_DEBUG_INFO_BTF (distribution kernels since Debian 11 and RHEL 8.2 have it), or /sys isn't mounted here"
        )
    })?;
    offsets(&Layout(&btf))
}

fn offsets(layout: &Layout<'_>) -> Result<Vec<(&'static str, u32)>> {
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
    // A bit field has the byte that holds it and its mask within that byte.
    let (v6_only, mask) = layout.bit("sock_common", "skc_ipv6only")?;
    let mut offsets = vec![("AT_V6_ONLY", v6_only), ("V6_ONLY_BIT", mask)];
    for (name, root, path, size) in OFFSETS {
        offsets.push((name, layout.byte(root, path, size)?));
    }
    Ok(offsets)
}

const UNSUPPORTED: &str = "this kernel is older than 6.1, or so new that its layout changed and a newer balancer is needed";

/// A member that was found.
struct Field {
    /// Bits before it, from the start of the outermost structure.
    bits: u32,
    /// Bits that it is wide, for a bit field only.
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

    fn found() -> impl Fn(&str) -> u32 {
        let found = kernel_offsets().expect("this kernel is supported");
        move |wanted| {
            let known = found.iter().find(|(name, _)| *name == wanted);
            known.unwrap_or_else(|| panic!("no {wanted}")).1
        }
    }

    #[test]
    fn the_running_kernel_has_every_field_inside_its_structure() {
        let found = found();
        // A structure begins where the one before it, which it contains, ends.
        let begins = [
            ("sock", "sock_common"),
            ("inet_connection_sock", "inet_sock"),
        ];
        let begins = begins
            .into_iter()
            .chain([("tcp_sock", "inet_connection_sock")]);
        let begins: std::collections::HashMap<_, _> = begins.collect();
        layout(|layout| {
            let size = |name| u32::try_from(layout.root(name).expect(name).size()).expect("small");
            for (name, root, ..) in OFFSETS {
                let first = begins.get(root).map_or(0, |inner| size(inner));
                assert!((first..size(root)).contains(&found(name)), "{name}");
            }
            assert!(found("AT_V6_ONLY") < size("sock_common"));
        });
    }

    /// `struct sock_common` starts with the lookup keys, in this order since before 6.1
    /// (include/net/sock.h).
    #[test]
    fn well_known_places_come_out_right() {
        let found = found();
        assert_eq!((found("AT_V6_ONLY"), found("V6_ONLY_BIT")), (19, 0x20));
        assert_eq!(found("AT_NET"), 48);
        assert_eq!(found("AT_YOUNG"), found("AT_HALF_OPEN") + 4);
        assert_eq!(found("AT_BACKLOG"), found("AT_QUEUE") + 4);
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

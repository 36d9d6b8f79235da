//! The messages of `sock_diag(7)`: pure functions from and to bytes.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
};

use super::{Family, Query, Received, Socket, State, Storage, Timer};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;

const NLA_F_NESTED: u16 = 1 << 15;
/// Without the flags in its two highest bits.
const NLA_TYPE: u16 = 0x3fff;

const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const INET_DIAG_CGROUP_ID: u16 = 21;
const INET_ULP_INFO_NAME: u16 = 1;
const INET_DIAG_REQ_BYTECODE: u16 = 1;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
// Operations of the filter's program: `enum` in include/uapi/linux/inet_diag.h.
const INET_DIAG_BC_JMP: u8 = 1;
const INET_DIAG_BC_S_GE: u8 = 2;
const INET_DIAG_BC_S_LE: u8 = 3;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;

/// Ports of a filter: its jumps have 16 bits.
const MOST_PORTS: usize = 3_000;

const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// `struct inet_diag_msg`.
const SOCKET_MESSAGE: usize = 72;
/// Where `struct tcp_info` has `tcpi_last_data_recv`, `tcpi_last_ack_recv` and
/// `tcpi_bytes_received`.
const INFO_LAST_RECEIVED: usize = 52;
const INFO_LAST_ACKNOWLEDGED: usize = 56;
const INFO_BYTES_RECEIVED: usize = 128;

/// Bytes that are no `sock_diag` answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    what: &'static str,
    at: usize,
}

impl fmt::Display for Malformed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "the kernel's socket list makes no sense: {} at byte {}",
            self.what, self.at
        )
    }
}

impl std::error::Error for Malformed {}

/// How far an answer has come with one datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The answer is complete: 0, or the error number with which it ended.
    pub end: Option<i32>,
    /// The kernel says that the table changed so much that the answer may be inconsistent.
    pub interrupted: bool,
}

/// Reads one datagram of an answer and adds the sockets in it. Messages with another sequence
/// number are passed over.
///
/// # Errors
/// Where lengths contradict each other or a message is too short for what it claims to be.
pub fn parse(
    datagram: &[u8],
    sequence: u32,
    sockets: &mut Vec<Socket>,
) -> Result<Progress, Malformed> {
    let mut progress = Progress::default();
    let mut at = 0;
    while at < datagram.len() && progress.end.is_none() {
        let rest = &datagram[at..];
        let malformed = |what| Malformed { what, at };
        let header = Header::read(rest).ok_or(malformed("a message header"))?;
        let message = rest
            .get(HEADER..header.length)
            .ok_or(malformed("the length of a message"))?;
        if header.sequence == sequence {
            progress.interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
            match header.kind {
                NLMSG_DONE => progress.end = Some(errno(message).unwrap_or(0)),
                NLMSG_ERROR => {
                    progress.end = Some(errno(message).ok_or(malformed("an error message"))?);
                }
                NLMSG_OVERRUN => progress.interrupted = true,
                SOCK_DIAG_BY_FAMILY => sockets.extend(socket(message).map_err(malformed)?),
                _ => {}
            }
        }
        at += header.length.next_multiple_of(4);
    }
    Ok(progress)
}

struct Header {
    length: usize,
    kind: u16,
    flags: u16,
    sequence: u32,
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Self> {
        let length = u32_at(bytes, 0)? as usize;
        (length >= HEADER).then_some(Self {
            length,
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            sequence: u32_at(bytes, 8)?,
        })
    }
}

/// The kernel sends errors negated.
fn errno(message: &[u8]) -> Option<i32> {
    u32_at(message, 0).map(|value| value.cast_signed().saturating_neg().max(0))
}

/// One `struct inet_diag_msg` with its attributes; nothing for a socket of a family or state that
/// isn't ours.
fn socket(message: &[u8]) -> Result<Option<Socket>, &'static str> {
    const SHORT: &str = "a socket";
    let fixed: &[u8; SOCKET_MESSAGE] = message.first_chunk().ok_or(SHORT)?;
    let (Some(family), Some(state)) = (family(fixed[0]), state(fixed[1])) else {
        return Ok(None);
    };
    let word = |at| u32_at(fixed, at).ok_or(SHORT);
    let mut socket = Socket {
        family,
        state,
        local: address(family, fixed, 8, 4).ok_or(SHORT)?,
        remote: address(family, fixed, 24, 6).ok_or(SHORT)?,
        interface: word(40)?,
        cookie: u64::from(word(44)?) | u64::from(word(48)?) << 32,
        receive_queue: word(56)?,
        send_queue: word(60)?,
        uid: word(64)?,
        inode: word(68)?,
        timer: timer(fixed[2], fixed[3], word(52)?),
        v6only: None,
        cgroup: None,
        mptcp: false,
        received: None,
        storage: None,
    };
    for attribute in Attributes(&message[SOCKET_MESSAGE..]) {
        let (kind, value) = attribute?;
        match kind {
            INET_DIAG_INFO => socket.received = received(value),
            INET_DIAG_SKV6ONLY => socket.v6only = value.first().map(|only| *only != 0),
            INET_DIAG_ULP_INFO => {
                socket.mptcp = find(value, INET_ULP_INFO_NAME)?
                    .is_some_and(|name| name.starts_with(b"mptcp\0"));
            }
            INET_DIAG_CGROUP_ID => {
                socket.cgroup = value.first_chunk().map(|id| u64::from_ne_bytes(*id));
            }
            INET_DIAG_SK_BPF_STORAGES => socket.storage = storage(value)?,
            _ => {}
        }
    }
    Ok(Some(socket))
}

/// Of a `struct tcp_info`; nothing where the kernel's is too short to have it.
fn received(info: &[u8]) -> Option<Received> {
    let bytes = info.get(INFO_BYTES_RECEIVED..)?.first_chunk()?;
    Some(Received {
        bytes: u64::from_ne_bytes(*bytes),
        ms_ago: u32_at(info, INFO_LAST_RECEIVED)?,
        acknowledged_ms_ago: u32_at(info, INFO_LAST_ACKNOWLEDGED)?,
    })
}

/// `idiag_timer`, `idiag_retrans` and `idiag_expires`.
const fn timer(kind: u8, unanswered: u8, due_ms: u32) -> Timer {
    const KEEPALIVE: u8 = 2;
    match kind {
        0 => Timer::None,
        KEEPALIVE => Timer::Keepalive { due_ms, unanswered },
        _ => Timer::Other,
    }
}

/// The first value found: one map is asked for.
fn storage(storages: &[u8]) -> Result<Option<Storage>, &'static str> {
    let Some(first) = find(storages, SK_DIAG_BPF_STORAGE)? else {
        return Ok(None);
    };
    Ok(find(first, SK_DIAG_BPF_STORAGE_MAP_VALUE)?.map(Storage::from_slice))
}

fn find(attributes: &[u8], kind: u16) -> Result<Option<&[u8]>, &'static str> {
    for attribute in Attributes(attributes) {
        let (found, value) = attribute?;
        if found == kind {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn family(number: u8) -> Option<Family> {
    match i32::from(number) {
        libc::AF_INET => Some(Family::V4),
        libc::AF_INET6 => Some(Family::V6),
        _ => None,
    }
}

fn state(number: u8) -> Option<State> {
    use State::{
        Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynReceived,
        SynSent, TimeWait,
    };
    [
        Established,
        SynSent,
        SynReceived,
        FinWait1,
        FinWait2,
        TimeWait,
        Close,
        CloseWait,
        LastAck,
        Listen,
        Closing,
    ]
    .into_iter()
    .find(|state| *state as u8 == number)
}

fn address(family: Family, bytes: &[u8], address_at: usize, port_at: usize) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*bytes.get(port_at..)?.first_chunk()?);
    let rest = bytes.get(address_at..)?;
    let ip = match family {
        Family::V4 => IpAddr::from(Ipv4Addr::from(*rest.first_chunk::<4>()?)),
        Family::V6 => IpAddr::from(Ipv6Addr::from(*rest.first_chunk::<16>()?)),
    };
    Some(SocketAddr::new(ip, port))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|chunk| u16::from_ne_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|chunk| u32::from_ne_bytes(*chunk))
}

/// Attributes one after the other: type and value.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        if bytes.is_empty() {
            return None;
        }
        self.0 = &[];
        let length = u16_at(bytes, 0).map(usize::from);
        let (Some(length), Some(kind)) = (length, u16_at(bytes, 2)) else {
            return Some(Err("an attribute header"));
        };
        let Some(value) = bytes.get(ATTRIBUTE_HEADER..length) else {
            return Some(Err("the length of an attribute"));
        };
        self.0 = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok((kind & NLA_TYPE, value)))
    }
}

/// Asks for all sockets that fit a query: a `struct inet_diag_req_v2` with its attributes.
pub(super) fn dump_request(query: &Query<'_>, sequence: u32) -> Vec<u8> {
    let family = match query.family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    let [family, protocol] =
        [family, libc::IPPROTO_TCP].map(|number| u8::try_from(number).expect("both are small"));
    let extensions = u8::from(query.info) << (INET_DIAG_INFO - 1);
    let mut body = vec![family, protocol, extensions, 0];
    body.extend(query.states.0.to_ne_bytes());
    // No socket is named.
    body.extend([0; 48]);
    if (1..=MOST_PORTS).contains(&query.ports.len()) {
        body.extend(attribute(
            INET_DIAG_REQ_BYTECODE,
            &bound_to_any_of(query.ports),
        ));
    }
    if let Some(map) = query.storage {
        let map = map.as_raw_fd().to_ne_bytes();
        let map = attribute(SK_DIAG_BPF_STORAGE_REQ_MAP_FD, &map);
        let kind = INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED;
        body.extend(attribute(kind, &map));
    }
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    message(SOCK_DIAG_BY_FAMILY, flags, sequence, &body)
}

/// Asks for the end of one connection: a `struct inet_diag_req_v2` that names it.
pub(super) fn destroy_request(socket: &Socket, sequence: u32) -> Vec<u8> {
    // Of an IPv4 client of a dual-stack listener, too, the kernel looks in the table for IPv4
    // (`inet_diag_find_one_icsk`, `net/ipv4/inet_diag.c`).
    let (local, remote) = (
        socket.local.ip().to_canonical(),
        socket.remote.ip().to_canonical(),
    );
    let family = if remote.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let [family, protocol] =
        [family, libc::IPPROTO_TCP].map(|number| u8::try_from(number).expect("both are small"));
    let mut body = vec![family, protocol, 0, 0];
    body.extend((1_u32 << State::Established as u32).to_ne_bytes());
    body.extend(socket.local.port().to_be_bytes());
    body.extend(socket.remote.port().to_be_bytes());
    body.extend(words_of(local));
    body.extend(words_of(remote));
    body.extend(socket.interface.to_ne_bytes());
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low half, then the high one"
    )]
    let halves = [socket.cookie as u32, (socket.cookie >> 32) as u32];
    body.extend(halves.into_iter().flat_map(u32::to_ne_bytes));
    message(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, sequence, &body)
}

/// An address in the 16 bytes of a `struct inet_diag_sockid`.
fn words_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V6(v6) => v6.octets(),
        IpAddr::V4(v4) => {
            let mut words = [0; 16];
            words[..4].copy_from_slice(&v4.octets());
            words
        }
    }
}

/// The program of a filter that takes what is bound to one of these ports: for each port two
/// comparisons and a jump to the end. A jump beyond the end refuses (`inet_diag_bc_run`,
/// `net/ipv4/inet_diag.c`).
fn bound_to_any_of(ports: &[u16]) -> Vec<u8> {
    /// `struct inet_diag_bc_op`; a comparison has its port in a second one.
    const OP: u16 = 4;
    const COMPARISON: u16 = 2 * OP;
    const OF_A_PORT: u16 = 2 * COMPARISON + OP;
    let mut program = Vec::with_capacity(ports.len() * usize::from(OF_A_PORT));
    let mut op = |code: u8, yes: u16, no: u16| {
        let yes = u8::try_from(yes).expect("an operation is short");
        program.extend([code, yes]);
        program.extend(no.to_ne_bytes());
    };
    for (at, port) in ports.iter().enumerate() {
        let behind = u16::try_from(ports.len() - 1 - at).expect("at most so many ports");
        // Where no other port follows: out of the program.
        let next = if behind == 0 { OP } else { 0 };
        op(INET_DIAG_BC_S_GE, COMPARISON, OF_A_PORT + next);
        op(0, 0, *port);
        op(INET_DIAG_BC_S_LE, COMPARISON, COMPARISON + OP + next);
        op(0, 0, *port);
        op(INET_DIAG_BC_JMP, OP, OP + behind * OF_A_PORT);
    }
    program
}

fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).expect("requests are short");
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(body);
    message
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length =
        u16::try_from(ATTRIBUTE_HEADER + value.len()).expect("attributes of requests are short");
    let mut attribute = Vec::new();
    attribute.extend(length.to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEQUENCE: u32 = 7;

    /// An IPv6 listener as the kernel sends it, with storage.
    fn listener() -> Vec<u8> {
        let mut body = vec![10, 10, 2, 1];
        body.extend(11800_u16.to_be_bytes());
        body.extend([0; 2 + 32]);
        body.extend(3_u32.to_ne_bytes());
        body.extend(0x0102_0304_u32.to_ne_bytes());
        body.extend(0x0506_0708_u32.to_ne_bytes());
        for word in [9_500_u32, 5, 128, 1000, 4242] {
            body.extend(word.to_ne_bytes());
        }
        assert_eq!(body.len(), SOCKET_MESSAGE);
        let mut info = [0; 232];
        info[INFO_LAST_RECEIVED..][..4].copy_from_slice(&250_u32.to_ne_bytes());
        info[INFO_BYTES_RECEIVED..][..8].copy_from_slice(&70_000_000_000_u64.to_ne_bytes());
        info[INFO_LAST_ACKNOWLEDGED..][..4].copy_from_slice(&200_u32.to_ne_bytes());
        body.extend(attribute(INET_DIAG_INFO, &info));
        body.extend(attribute(INET_DIAG_SKV6ONLY, &[1]));
        body.extend(attribute(INET_DIAG_CGROUP_ID, &77_u64.to_ne_bytes()));
        body.extend(attribute(
            INET_DIAG_ULP_INFO | NLA_F_NESTED,
            &attribute(INET_ULP_INFO_NAME, b"mptcp\0"),
        ));
        let value = attribute(SK_DIAG_BPF_STORAGE_MAP_VALUE, &[9; 24]);
        let one = attribute(SK_DIAG_BPF_STORAGE | NLA_F_NESTED, &value);
        body.extend(attribute(INET_DIAG_SK_BPF_STORAGES | NLA_F_NESTED, &one));
        message(SOCK_DIAG_BY_FAMILY, 2, SEQUENCE, &body)
    }

    fn done(code: i32) -> Vec<u8> {
        message(NLMSG_DONE, 2, SEQUENCE, &code.to_ne_bytes())
    }

    fn read(datagram: &[u8]) -> Result<(Progress, Vec<Socket>), Malformed> {
        let mut sockets = Vec::new();
        parse(datagram, SEQUENCE, &mut sockets).map(|progress| (progress, sockets))
    }

    #[test]
    fn every_field_is_read() {
        let (progress, sockets) = read(&[listener(), done(0)].concat()).expect("well-formed");
        assert_eq!(
            progress,
            Progress {
                end: Some(0),
                interrupted: false
            }
        );
        let expected = Socket {
            family: Family::V6,
            state: State::Listen,
            local: "[::]:11800".parse().expect("an address"),
            remote: "[::]:0".parse().expect("an address"),
            interface: 3,
            cookie: 0x0506_0708_0102_0304,
            uid: 1000,
            inode: 4242,
            receive_queue: 5,
            send_queue: 128,
            timer: Timer::Keepalive {
                due_ms: 9_500,
                unanswered: 1,
            },
            v6only: Some(true),
            cgroup: Some(77),
            mptcp: true,
            received: Some(Received {
                bytes: 70_000_000_000,
                ms_ago: 250,
                acknowledged_ms_ago: 200,
            }),
            storage: Some(Storage::from_slice(&[9; 24])),
        };
        assert_eq!(sockets, [expected]);
    }

    #[test]
    fn ends_errors_and_interruptions_are_told() {
        let end = |datagram: &[u8]| read(datagram).expect("well-formed").0;
        assert_eq!(end(&listener()).end, None);
        assert_eq!(end(&done(-libc::ENOMEM)).end, Some(libc::ENOMEM));
        assert_eq!(
            end(&message(
                NLMSG_ERROR,
                0,
                SEQUENCE,
                &(-libc::EPERM).to_ne_bytes()
            ))
            .end,
            Some(libc::EPERM)
        );
        assert_eq!(end(&message(NLMSG_DONE, 0, SEQUENCE, &[])).end, Some(0));
        assert!(end(&message(NLMSG_DONE, NLM_F_DUMP_INTR, SEQUENCE, &[0; 4])).interrupted);
        assert!(end(&message(NLMSG_OVERRUN, 0, SEQUENCE, &[])).interrupted);
        let foreign = message(NLMSG_ERROR, NLM_F_DUMP_INTR, SEQUENCE + 1, &[0xff; 4]);
        assert_eq!(end(&foreign), Progress::default());
        assert_eq!(
            end(&message(NLMSG_ERROR, 0, SEQUENCE, &i32::MIN.to_ne_bytes())).end,
            Some(i32::MAX)
        );
    }

    #[test]
    fn other_families_and_states_are_passed_over() {
        for (at, value) in [(HEADER, 1), (HEADER + 1, 13)] {
            let mut bytes = listener();
            bytes[at] = value;
            assert_eq!(read(&bytes).expect("well-formed").1, []);
        }
    }

    #[test]
    fn whatever_is_cut_off_is_malformed() {
        let whole = listener();
        for length in 1..whole.len() {
            assert!(read(&whole[..length]).is_err(), "cut to {length} bytes");
        }
        assert!(read(&message(NLMSG_ERROR, 0, SEQUENCE, &[0; 3])).is_err());
        let short = message(SOCK_DIAG_BY_FAMILY, 0, SEQUENCE, &[0; SOCKET_MESSAGE - 1]);
        assert_eq!(
            read(&short).expect_err("too short").to_string(),
            "the kernel's socket list makes no sense: a socket at byte 0"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_hang(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&bytes);
        }

        #[test]
        fn no_damage_makes_it_panic_or_hang(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut bytes = [listener(), listener(), done(0)].concat();
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let mut sockets = Vec::new();
            let _ = parse(&bytes, SEQUENCE, &mut sockets);
            prop_assert!(sockets.len() <= 2);
        }
    }
}

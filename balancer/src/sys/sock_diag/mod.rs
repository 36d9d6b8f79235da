//! The kernel's table of TCP sockets (`sock_diag(7)`), of the netns that the calling thread is in.

mod message;

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recvmsg, send,
            setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

pub use message::{Malformed, Progress, parse};
use smallvec::SmallVec;

/// Larger than anything the kernel puts into one datagram of a dump (32 KiB, more only for huge
/// storage).
const DATAGRAM: usize = 256 * 1024;
/// The kernel answers at once; a longer silence means that the answer was lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a dump is begun again that the kernel says is incomplete.
const ATTEMPTS: usize = 5;

/// Address family of a socket. A dual-stack socket is `V6`, also for connections of IPv4 clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`.
    V6,
}

/// State of a TCP socket (`include/net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// `TCP_ESTABLISHED`.
    Established = 1,
    /// `TCP_SYN_SENT`.
    SynSent,
    /// `TCP_SYN_RECV`: half open.
    SynReceived,
    /// `TCP_FIN_WAIT1`.
    FinWait1,
    /// `TCP_FIN_WAIT2`.
    FinWait2,
    /// `TCP_TIME_WAIT`.
    TimeWait,
    /// `TCP_CLOSE`.
    Close,
    /// `TCP_CLOSE_WAIT`: the other side has closed.
    CloseWait,
    /// `TCP_LAST_ACK`.
    LastAck,
    /// `TCP_LISTEN`.
    Listen,
    /// `TCP_CLOSING`.
    Closing,
}

/// The timer that runs for a socket (`inet_sk_diag_fill`, `net/ipv4/inet_diag.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// None: no data is unacknowledged, and keepalive is off.
    None,
    /// That of keepalive.
    Keepalive {
        /// When the kernel looks next whether a probe is due, in ms from now.
        due_ms: u32,
        /// Probes that were sent and not answered.
        unanswered: u8,
    },
    /// Another one, which says nothing of keepalive: data is unacknowledged.
    Other,
}

/// A set of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(u32);

impl States {
    /// Every state of [`State`].
    pub const ALL: Self = Self(0xffe);

    /// The set of these.
    pub const fn of(states: &[State]) -> Self {
        let mut mask = 0;
        let mut at = 0;
        while at < states.len() {
            mask |= 1 << states[at] as u32;
            at += 1;
        }
        Self(mask)
    }
}

/// What to list.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Sockets of this family only: the kernel lists one at a time.
    pub family: Family,
    /// In one of these states.
    pub states: States,
    /// Bound to one of these ports only; none, or more than 3,000: to any. The kernel passes the
    /// others over.
    pub ports: &'a [u16],
    /// No more than so many: the rest of the answer is read and dropped.
    pub most: usize,
    /// A socket storage map: report what it holds for each socket.
    pub storage: Option<BorrowedFd<'a>>,
    /// Report what a connection has received, and whether a socket belongs to MPTCP. The kernel
    /// then adds a few hundred bytes a socket (`struct tcp_info`).
    pub info: bool,
}

impl Query<'_> {
    /// Sockets of a family in some states, with nothing extra.
    pub fn new(family: Family, states: States) -> Self {
        Self {
            family,
            states,
            ports: &[],
            most: usize::MAX,
            storage: None,
            info: false,
        }
    }
}

/// What has come in on a connection (`struct tcp_info`, `include/uapi/linux/tcp.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes since it began, whether they have been read or not.
    pub bytes: u64,
    /// How long ago the last ones came, in milliseconds.
    pub ms_ago: u32,
    /// How long ago the peer acknowledged something last, if only a probe, in milliseconds.
    pub acknowledged_ms_ago: u32,
}

impl Received {
    /// For how many milliseconds neither data nor an acknowledgement came.
    pub fn heard_ms_ago(self) -> u32 {
        self.ms_ago.min(self.acknowledged_ms_ago)
    }
}

/// What a storage map holds for a socket. Of very many sockets each one's few bytes must not be an
/// allocation of their own.
pub type Storage = SmallVec<[u8; 16]>;

/// A TCP socket as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// What kind of socket: an IPv4 client of a dual-stack listener is on a `V6` one with mapped
    /// addresses.
    pub family: Family,
    /// The state that it was in when it was listed.
    pub state: State,
    /// The address and port of this end.
    pub local: SocketAddr,
    /// The peer's address and port; unspecified for a listener.
    pub remote: SocketAddr,
    /// The interface it is bound to, 0 for any.
    pub interface: u32,
    /// Unique among all sockets until reboot; what `bpf_get_socket_cookie` returns.
    pub cookie: u64,
    /// Id of the user who made it.
    pub uid: u32,
    /// The inode that `/proc/PID/fd` shows; 0 while no process has it (half open, not yet
    /// accepted).
    pub inode: u32,
    /// Bytes to be read; for a listener, connections that wait for `accept()`.
    pub receive_queue: u32,
    /// Bytes to be sent; for a listener, its backlog.
    pub send_queue: u32,
    /// `IPV6_V6ONLY`, reported for `V6` listeners.
    pub v6only: Option<bool>,
    /// Id of the cgroup2 directory (its inode) that the socket was made in, where the kernel
    /// reports it.
    pub cgroup: Option<u64>,
    /// The timer that runs for it.
    pub timer: Timer,
    /// Belongs to an MPTCP socket. Known only with [`Query::info`].
    pub mptcp: bool,
    /// What has come in on a connection. Known only with [`Query::info`].
    pub received: Option<Received>,
    /// What the storage map of the query holds for it.
    pub storage: Option<Storage>,
}

/// Lists TCP sockets. Sockets that come and go meanwhile may or may not be in it; no other is
/// missed.
///
/// # Errors
/// Those of netlink; `NotFound` where the kernel has no `tcp_diag`; `EPERM` for storage without
/// `CAP_BPF`; `Interrupted` where the kernel could not complete a dump in several attempts;
/// `InvalidData` where its answer makes no sense.
pub fn tcp_sockets(query: &Query<'_>) -> io::Result<Vec<Socket>> {
    let mut last = io::Error::from(io::ErrorKind::Interrupted);
    for _ in 0..ATTEMPTS {
        match dump(query) {
            Err(error) if worth_repeating(&error) => last = error,
            // The kernel asks for the module by itself, and says so if nothing comes of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let advice = "the kernel can't list TCP sockets: it lacks tcp_diag (modprobe tcp_diag, CONFIG_INET_TCP_DIAG)";
                return Err(io::Error::new(error.kind(), advice));
            }
            result => return result,
        }
    }
    Err(io::Error::new(
        last.kind(),
        format!("the kernel's socket list stayed incomplete {ATTEMPTS} times: {last}"),
    ))
}

/// Ends a connection at once: its process reads an error, and its client gets a RST (`tcp_abort`,
/// `net/ipv4/tcp.c`). It is named by its addresses and its cookie; without the cookie the kernel
/// would end the listener in its place where it is gone.
///
/// # Errors
/// `NotFound` where the connection is gone; `EPERM` without `CAP_NET_ADMIN`; `EOPNOTSUPP` where the
/// kernel lacks it (`CONFIG_INET_DIAG_DESTROY`); those of netlink.
pub fn destroy(socket: &Socket) -> io::Result<()> {
    let (channel, sequence) = (Channel::open()?, next_sequence());
    channel.send(&message::destroy_request(socket, sequence))?;
    channel.receive(sequence, 0, &mut Vec::new()).map(drop)
}

fn dump(query: &Query<'_>) -> io::Result<Vec<Socket>> {
    let (channel, sequence) = (Channel::open()?, next_sequence());
    channel.send(&message::dump_request(query, sequence))?;
    let mut sockets = Vec::new();
    let interrupted = channel.receive(sequence, query.most, &mut sockets)?;
    if interrupted {
        Err(io::ErrorKind::Interrupted.into())
    } else {
        Ok(sockets)
    }
}

/// Adds the sockets of an answer, which `next` writes into `buffer` one datagram at a time: it
/// gives the length, or nothing where the datagram is to be passed over. Keeps no more than `most`.
/// Returns whether the kernel says that the answer is inconsistent.
///
/// # Errors
/// Those of `next`; that with which the kernel ended the answer; `InvalidData` where the answer
/// makes no sense.
pub fn read_answer(
    sequence: u32,
    most: usize,
    sockets: &mut Vec<Socket>,
    buffer: &mut [u8],
    mut next: impl FnMut(&mut [u8]) -> io::Result<Option<usize>>,
) -> io::Result<bool> {
    let mut interrupted = false;
    loop {
        let Some(length) = next(buffer)? else {
            continue;
        };
        let progress = parse(&buffer[..length], sequence, sockets)
            .map_err(|malformed| io::Error::new(io::ErrorKind::InvalidData, malformed))?;
        sockets.truncate(most);
        interrupted |= progress.interrupted;
        match progress.end {
            None => {}
            Some(0) => return Ok(interrupted),
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn worth_repeating(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted || error.raw_os_error() == Some(libc::ENOBUFS)
}

fn next_sequence() -> u32 {
    static SEQUENCE: AtomicU32 = AtomicU32::new(1);
    SEQUENCE.fetch_add(1, Ordering::Relaxed)
}

/// A netlink socket for one request.
struct Channel(OwnedFd);

impl Channel {
    fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        let patience = TimeVal::new(
            i64::try_from(PATIENCE.as_secs()).map_err(io::Error::other)?,
            0,
        );
        setsockopt(&socket, ReceiveTimeout, &patience)?;
        Ok(Self(socket))
    }

    fn send(&self, request: &[u8]) -> io::Result<()> {
        let sent = send(self.0.as_raw_fd(), request, MsgFlags::empty())?;
        if sent == request.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Reads until the kernel says that it has answered in full; returns whether it says that the
    /// answer is inconsistent.
    fn receive(&self, sequence: u32, most: usize, sockets: &mut Vec<Socket>) -> io::Result<bool> {
        let mut buffer = vec![0; DATAGRAM];
        read_answer(sequence, most, sockets, &mut buffer, |buffer| {
            self.datagram(buffer)
        })
    }

    /// The length of the next datagram; nothing where it isn't from the kernel.
    fn datagram(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut parts = [IoSliceMut::new(buffer)];
        let received = loop {
            match recvmsg::<NetlinkAddr>(
                self.0.as_fd().as_raw_fd(),
                &mut parts,
                None,
                MsgFlags::empty(),
            ) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the kernel's answer was lost",
                    ));
                }
                result => break result?,
            }
        };
        if received.flags.contains(MsgFlags::MSG_TRUNC) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a datagram of more than {DATAGRAM} bytes"),
            ));
        }
        let from_kernel = received.address.is_some_and(|sender| sender.pid() == 0);
        Ok(from_kernel.then_some(received.bytes))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sys::netns;
    use aya::maps::{Map, MapData, SkStorage};
    use aya_obj::generated::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE,
    };
    use std::{
        net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
        os::fd::FromRawFd as _,
    };
    use testbpf::{MapSpec, MapTypes};

    fn list(family: Family, states: States, port: u16) -> Vec<Socket> {
        let mut found = tcp_sockets(&Query::new(family, states)).expect("a dump");
        found.retain(|socket| socket.local.port() == port);
        found
    }

    fn connected(listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        (client, listener.accept().expect("accept").0)
    }

    #[test]
    fn a_listener_shows_its_queue_backlog_and_owner() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let address = listener.local_addr().expect("address");
        let waiting: Vec<_> = (0..3)
            .map(|_| TcpStream::connect(address).expect("connect"))
            .collect();
        let found = list(Family::V4, States::of(&[State::Listen]), address.port());
        let [socket] = &found[..] else {
            panic!("one listener, not {found:?}")
        };
        assert_eq!(
            (socket.local, socket.state, socket.family),
            (address, State::Listen, Family::V4)
        );
        assert_eq!(
            (socket.receive_queue, socket.send_queue, socket.uid),
            (3, 128, 0)
        );
        let inode = nix::sys::stat::fstat(&listener).expect("stat").st_ino;
        assert_eq!(u64::from(socket.inode), inode);
        assert!(
            socket.cookie != 0
                && !socket.mptcp
                && socket.v6only.is_none()
                && socket.storage.is_none()
        );
        drop(waiting);
    }

    #[test]
    fn a_dual_stack_listener_and_its_ipv4_client_are_of_the_v6_family() {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).expect("bind");
        let port = listener.local_addr().expect("address").port();
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connect");
        assert_eq!(
            list(
                Family::V4,
                States::of(&[State::Listen, State::Established]),
                port
            ),
            []
        );
        let found = list(Family::V6, States::of(&[State::Listen]), port);
        assert_eq!(
            found.iter().map(|socket| socket.v6only).collect::<Vec<_>>(),
            [Some(false)]
        );
        let found = list(Family::V6, States::of(&[State::Established]), port);
        let [socket] = &found[..] else {
            panic!("one connection, not {found:?}")
        };
        assert_eq!(socket.local.ip().to_canonical(), Ipv4Addr::LOCALHOST);
        assert_eq!(
            socket.remote.port(),
            client.local_addr().expect("address").port()
        );
        assert_eq!(socket.inode, 0, "not accepted yet");
    }

    /// With what MPTCP asks for a socket takes half a kilobyte, and a datagram holds 32.
    #[test]
    fn a_list_of_many_datagrams_comes_whole() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let port = listener.local_addr().expect("address").port();
        let pairs: Vec<_> = (0..200).map(|_| connected(&listener)).collect();
        let query = Query {
            info: true,
            ..Query::new(Family::V4, States::of(&[State::Established]))
        };
        let mut found = tcp_sockets(&query).expect("a dump");
        found.retain(|socket| socket.local.port() == port);
        let cookies: std::collections::HashSet<u64> =
            found.iter().map(|socket| socket.cookie).collect();
        let expected = pairs
            .iter()
            .map(|(_, server)| crate::sys::socket::cookie(server).expect("cookie"))
            .collect();
        assert_eq!(cookies, expected);
        assert_eq!(found.len(), pairs.len());
        let few = Query { most: 50, ..query };
        assert_eq!(tcp_sockets(&few).expect("a dump").len(), 50);
    }

    #[test]
    fn another_netns_has_its_own_sockets() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let port = listener.local_addr().expect("address").port();
        let netns = netns::tests::fresh();
        let there = netns::inside(&netns, || list(Family::V4, States::ALL, port)).expect("inside");
        assert_eq!(there, []);
        assert_eq!(list(Family::V4, States::ALL, port).len(), 1);
    }

    #[test]
    fn a_connection_is_ended_and_its_listener_is_not() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let listener = TcpListener::bind(address).expect("bind");
            let port = listener.local_addr().expect("address").port();
            let to = match address {
                "[::1]:0" => format!("[::1]:{port}"),
                _ => format!("127.0.0.1:{port}"),
            };
            let mut client = TcpStream::connect(to).expect("connect");
            let (_server, _) = listener.accept().expect("accept");
            let (_other, _still) = connected(&listener);
            let established = States::of(&[State::Established]);
            let mut found = [Family::V4, Family::V6]
                .iter()
                .flat_map(|family| list(*family, established, port));
            let client_port = client.local_addr().expect("address").port();
            let connection = found
                .find(|one| one.remote.port() == client_port)
                .expect("the accepted end");
            destroy(&connection).expect("ended");
            let error = io::Read::read(&mut client, &mut [0]).expect_err("a RST");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{address}");
            let again = destroy(&connection).expect_err("gone");
            assert_eq!(again.kind(), io::ErrorKind::NotFound, "{address}");
            connected(&listener);
        }
    }

    /// A listener as every Go server makes it; the standard library has no way to ask for one.
    pub(crate) fn mptcp_listener() -> TcpListener {
        use nix::sys::socket::{Backlog, SockaddrIn, bind, listen};
        // SAFETY: the call takes three integers and no pointer.
        let fd = unsafe {
            libc::socket(
                libc::AF_INET,
                libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
                libc::IPPROTO_MPTCP,
            )
        };
        assert!(fd >= 0, "this kernel has MPTCP");
        // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        bind(fd, &SockaddrIn::new(127, 0, 0, 1, 0)).expect("bind");
        listen(&socket, Backlog::new(16).expect("small")).expect("listen");
        TcpListener::from(socket)
    }

    #[test]
    fn an_mptcp_listener_is_told_from_an_ordinary_one() {
        let (ordinary, special) = (
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind"),
            mptcp_listener(),
        );
        let query = Query {
            info: true,
            ..Query::new(Family::V4, States::of(&[State::Listen]))
        };
        let found = tcp_sockets(&query).expect("a dump");
        for (listener, mptcp) in [(&ordinary, false), (&special, true)] {
            let address = listener.local_addr().expect("address");
            let inode = nix::sys::stat::fstat(listener).expect("stat").st_ino;
            let socket = found
                .iter()
                .find(|socket| socket.local == address)
                .expect("listed");
            assert_eq!((socket.mptcp, u64::from(socket.inode)), (mptcp, inode));
        }
    }

    #[test]
    fn only_sockets_of_the_ports_asked_for_are_listed() {
        let netns = netns::tests::fresh();
        let listed = |ports: &[u16]| {
            let query = Query {
                ports,
                ..Query::new(Family::V4, States::of(&[State::Listen]))
            };
            let listed = netns::inside(&netns, || tcp_sockets(&query).expect("a dump"));
            let listed = listed.expect("inside").into_iter();
            let mut listed: Vec<_> = listed.map(|socket| socket.local.port()).collect();
            listed.sort_unstable();
            listed
        };
        let bind = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("bind");
        let _listeners = netns::inside(&netns, || [1, 2, 3, 4, 40_000, 65_535].map(bind));
        assert_eq!(listed(&[]), [1, 2, 3, 4, 40_000, 65_535]);
        assert_eq!(listed(&[2]), [2]);
        assert_eq!(listed(&[40_000, 5, 1, 3]), [1, 3, 40_000]);
        assert_eq!(listed(&[5]), [0; 0]);
        // As many as a filter can have, and one more.
        let most: Vec<u16> = (3..3_003).collect();
        assert_eq!(listed(&most), [3, 4]);
        let more: Vec<u16> = (3..3_004).collect();
        assert_eq!(listed(&more), [1, 2, 3, 4, 40_000, 65_535]);
    }

    #[test]
    fn what_came_in_is_reported_with_what_is_unread() {
        use std::io::{Read as _, Write as _};
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let port = listener.local_addr().expect("address").port();
        let (mut client, mut server) = connected(&listener);
        let seen = || {
            let query = Query {
                info: true,
                ports: &[port],
                ..Query::new(Family::V4, States::of(&[State::Established]))
            };
            let found = tcp_sockets(&query).expect("a dump");
            let [socket] = &found[..] else {
                panic!("one connection, not {found:?}")
            };
            let received = socket.received.expect("asked for");
            (received.bytes, socket.receive_queue)
        };
        assert_eq!(seen(), (0, 0));
        client.write_all(&[7; 100]).expect("sent");
        while seen().0 < 100 {
            std::thread::yield_now();
        }
        assert_eq!(seen(), (100, 100));
        server.read_exact(&mut [0; 30]).expect("read");
        assert_eq!(seen(), (100, 70));
    }

    #[test]
    fn storage_is_reported_where_there_is_some() {
        let types = testbpf::plain_types().expect("type information");
        let map = testbpf::map_create(&MapSpec {
            max_entries: 0,
            flags: BPF_F_NO_PREALLOC | BPF_F_CLONE,
            types: Some(MapTypes {
                btf: types.as_fd(),
                key: testbpf::PLAIN_U32,
                value: testbpf::PLAIN_U64,
            }),
            ..MapSpec::new(BPF_MAP_TYPE_SK_STORAGE, "storage")
        })
        .expect("a storage map");
        let with = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let without = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let data = MapData::from_fd(map.try_clone().expect("clone")).expect("map");
        let mut storage: SkStorage<_, u64> =
            Map::SkStorage(data).try_into().expect("socket storage");
        storage.insert(&with, 0x1234_5678_9abc, 0).expect("set");
        let _clients = [connected(&with), connected(&without)];
        let states = States::of(&[State::Listen, State::Established]);
        let query = Query {
            storage: Some(map.as_fd()),
            ..Query::new(Family::V4, states)
        };
        let found = tcp_sockets(&query).expect("a dump");
        for (listener, expected) in [(&with, Some(0x1234_5678_9abc_u64)), (&without, None)] {
            let port = listener.local_addr().expect("address").port();
            let values: Vec<_> = found
                .iter()
                .filter(|socket| socket.local.port() == port)
                .map(|socket| socket.storage.clone())
                .collect();
            let expected = expected.map(|value| Storage::from_slice(&value.to_ne_bytes()));
            assert_eq!(
                values,
                [expected.clone(), expected],
                "a listener and the child that inherits from it"
            );
        }
    }

    #[test]
    fn a_file_that_is_no_storage_map_is_an_error() {
        let file = std::fs::File::open("/dev/null").expect("open");
        let query = Query {
            storage: Some(file.as_fd()),
            ..Query::new(Family::V4, States::ALL)
        };
        assert!(tcp_sockets(&query).is_err());
    }
}
